"""How far extract is from the best that any factors of a rank can do, on a really fine-tuned model.

    make demo && python benchmarks/quality.py          # the demo's pair, demo-out/base and demo-out/tuned

For every adapted weight and rank: the residual ‖ΔW − BA‖/‖ΔW‖ of the factors as stored, formed in float64, against the
exact singular values of ΔW in float64 (Eckart and Young: nothing is below their tail), and against what the report
said. Fails if the worst excess is above a thousandth.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import surgery
from formats.dialects.peft_writing import factor_keys
from formats.layers import LayerKind, layer_kinds

HERE = Path(__file__).parent
LIMIT = 1e-3  # of the worst excess


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", nargs="?", default="demo-out/base")
    parser.add_argument("tuned", nargs="?", default="demo-out/tuned")
    parser.add_argument("--rank", type=int, action="append", help="may be given several times [8 32 128]")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    spectra = exact_spectra(options.base, options.tuned)
    rows = [row for rank in options.rank or (8, 32, 128) for row in measure(options.base, options.tuned, rank, spectra)]
    table = summary(rows)
    show(table)
    keep(options.results, rows, table)
    sys.exit(int(max(line["worst_excess"] for line in table) > LIMIT))


def exact_spectra(base: str, tuned: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """ΔW and its exact singular values in float64, of every weight that changed."""
    spectra = {}
    with surgery.open_checkpoint(base) as before, surgery.open_checkpoint(tuned) as after:
        for name, spec in after.specs.items():
            if name.endswith(".weight") and len(spec.shape) == 2:
                delta = (after.read(name).float() - before.read(name).float()).double()
                if delta.any():
                    spectra[name] = (delta, torch.linalg.svdvals(delta))
    return spectra


@dataclass(frozen=True)
class Measured:
    """One weight at one rank: residuals ‖ΔW − BA‖/‖ΔW‖ as formed, as reported, and the best possible."""

    weight: str
    asked: int
    rank: int
    residual: float
    reported: float
    optimum: float

    @property
    def excess(self) -> float:
        """Above the optimum. At full rank that is zero and what is left is float32's rounding: no excess."""
        return self.residual / self.optimum - 1 if self.optimum > 1e-6 else 0.0


def measure(base: str, tuned: str, rank: int, spectra: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> list[Measured]:
    """One extraction, weight by weight."""
    with tempfile.TemporaryDirectory() as folder:
        report = surgery.extract(base, tuned, f"{folder}/adapter", rank=rank, dtype="float32")
        factors = load_file(f"{folder}/adapter/adapter_model.safetensors")
    with surgery.open_checkpoint(tuned) as checkpoint:
        kinds = layer_kinds(checkpoint.specs)
    rows = []
    for module in report.modules:
        delta, values = spectra[module.name]
        owner = module.name.removesuffix(".weight")
        a, b = (factors[key].double() for key in factor_keys(owner, kinds[owner]))
        product = b @ a if kinds[owner] is LayerKind.LINEAR else (b @ a).mT
        residual = float((delta - product).norm() / delta.norm())
        optimum = float((values[module.rank :].square().sum() / values.square().sum()).sqrt())
        rows.append(Measured(module.name, rank, module.rank, residual, module.residual, optimum))
    return rows


def summary(rows: list[Measured]) -> list[dict[str, float]]:
    """The worst of each rank."""
    lines = []
    for rank in sorted({row.asked for row in rows}):
        chosen = [row for row in rows if row.asked == rank]
        lines.append(
            {
                "rank": rank,
                "weights": len(chosen),
                "least_residual": min(row.residual for row in chosen),
                "most_residual": max(row.residual for row in chosen),
                "worst_excess": max(row.excess for row in chosen),
                "worst_report_error": max(abs(row.residual - row.reported) for row in chosen),
            }
        )
    return lines


def show(table: list[dict[str, float]]) -> None:
    """On the terminal."""
    made = Table("rank", "weights", "residual", "worst excess over exact SVD", "worst error of the report")
    for line in table:
        span = f"{line['least_residual']:.3f} – {line['most_residual']:.3f}"
        figures = (f"{line['worst_excess']:.1e}", f"{line['worst_report_error']:.1e}")
        made.add_row(str(line["rank"]), str(line["weights"]), span, *figures)
    Console().print(made)


def keep(folder: Path, rows: list[Measured], table: list[dict[str, float]]) -> None:
    """The raw figures, with versions."""
    versions = {"surgery": surgery.__version__, "torch": torch.__version__, "python": platform.python_version()}
    command = "python benchmarks/quality.py"
    document = {"command": command, "versions": versions, "table": table, "weights": [asdict(row) for row in rows]}
    path = folder / f"{datetime.date.today():%Y-%m-%d}-quality.json"
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
