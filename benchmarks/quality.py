"""How far extract is from the best that any factors of a rank can do, and how far its peers are.

    make demo && python benchmarks/quality.py          # the demo's pair, demo-out/base and demo-out/tuned
    python benchmarks/quality.py --alone               # without the peers, whose environments take minutes to install

On a really fine-tuned model, and on pairs whose difference has a slow, a fast and a flat spectrum and that of noise.
For every linear weight and rank: the residual ‖ΔW − BA‖/‖ΔW‖ of the factors as stored (float32), formed in float64,
against the exact singular values of ΔW in float64 (Eckart and Young: nothing is below their tail), and ours also
against what the report said. Fails if our worst excess is above a thousandth.

Then, on the fine-tuned model, what `--budget` gains over a uniform rank at the same size, and DoRA over LoRA at the
same rank (`choices`). Fails if one of them loses.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import choices
import report
import torch
from environments import LYCORIS, MERGEKIT, python_of
from report import Sheet
from safetensors.torch import load_file, save_file
from synthetic import SPECTRA, write_pair

import surgery
from formats.dialects.peft_writing import factor_keys, full_key
from formats.layers import LayerKind, layer_kinds, owner

HERE = Path(__file__).parent
LIMIT = 1e-3  # of our worst excess
FLOOR = 1e-6  # a residual below which the rounding of factors stored as float32 shows in the fourth digit
DORA_UP_TO = 32  # beyond it factors take what a magnitude could
OURS, PEERS = "surgery", ("mergekit", "kohya", "lycoris")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", nargs="?", default="demo-out/base")
    parser.add_argument("tuned", nargs="?", default="demo-out/tuned")
    parser.add_argument("--rank", type=int, action="append", help="may be given several times [8 32 128]")
    parser.add_argument("--alone", action="store_true", help="without the peers")
    parser.add_argument("--mergekit", type=Path, help="the mergekit-extract-lora to use [installs one]")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    ranks = options.rank or [8, 32, 128]
    pythons = {} if options.alone else interpreters(options.mergekit)
    rows: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder:
        for pair, base, tuned in pairs(options.base, options.tuned, Path(folder)):
            print(f"measuring {pair}", file=sys.stderr)
            exact = exact_spectra(base, tuned)
            rows += measure_ours(pair, base, tuned, ranks, exact)
            for tool, python in pythons.items():
                rows += measure_peer(pair, tool, python, ranks, exact)
    print("measuring budgets and DoRA", file=sys.stderr)
    spent = choices.spend(options.base, options.tuned, ranks, DORA_UP_TO)
    lines = summary(rows)
    sheets = [as_sheet(lines), choices.as_sheet(spent)]
    report.show(sheets, [])
    keep(options.results, pythons, rows, lines, spent, sheets)
    wrong = choices.failures(spent)
    worst = max(line["worst_excess"] for line in lines if line["tool"] == OURS)
    wrong += [f"our worst excess is {worst}, more than {LIMIT}"] if worst > LIMIT else []
    if wrong:
        sys.exit("\n".join(wrong))


def interpreters(mergekit: Path | None) -> dict[str, Path]:
    """The peers' interpreters, in their own environments where they have packages."""
    theirs = mergekit.absolute().with_name("python") if mergekit else python_of("mergekit", MERGEKIT)
    return {"mergekit": theirs, "kohya": Path(sys.executable), "lycoris": python_of("lycoris", LYCORIS)}


def pairs(base: str, tuned: str, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Name, base and tuned: the model's, then the synthetic ones."""
    yield "fine-tuned model", base, tuned
    for name, (formula, _) in SPECTRA.items():
        yield f"{name}, {formula}", *write_pair(folder, name)


@dataclass(frozen=True)
class Exact:
    """ΔW of a linear weight, (out, in) in float64, and its exact singular values."""

    delta: torch.Tensor
    values: torch.Tensor

    def optimum(self, rank: int) -> float:
        """The least residual at a rank."""
        return float((self.values[rank:].square().sum() / self.values.square().sum()).sqrt())

    def residual(self, product: torch.Tensor) -> float:
        """‖ΔW − BA‖/‖ΔW‖."""
        return float((self.delta - product.double()).norm() / self.delta.norm())


def exact_spectra(base: str, tuned: str) -> dict[str, Exact]:
    """Every linear weight that changed. (The peers' dense decompositions of an embedding would not fit in memory.)"""
    spectra = {}
    with surgery.open_checkpoint(base) as before, surgery.open_checkpoint(tuned) as after:
        kinds = layer_kinds(after.specs)
        for name, spec in after.specs.items():
            kind = kinds.get(owner(name))
            if name.endswith(".weight") and len(spec.shape) == 2 and kind is not LayerKind.EMBEDDING:
                delta = (after.read(name).float() - before.read(name).float()).double()
                delta = delta if kind is LayerKind.LINEAR else delta.mT
                if delta.any():
                    spectra[name] = Exact(delta, torch.linalg.svdvals(delta))
    return spectra


@dataclass(frozen=True)
class Measured:
    """One weight at one rank by one tool: residual ‖ΔW − BA‖/‖ΔW‖ as formed, as the tool reported it, and the best
    possible; ‖ΔW‖; and what the tool stores for it."""

    pair: str
    tool: str
    weight: str
    rank: int
    residual: float
    reported: float | None
    optimum: float
    norm: float
    nbytes: int

    @property
    def excess(self) -> float:
        """Above the optimum; none where that is so small that rounding decides, as at full rank."""
        return self.residual / self.optimum - 1 if self.optimum > FLOOR else 0.0


def measure_ours(pair: str, base: str, tuned: str, ranks: list[int], exact: Mapping[str, Exact]) -> list[Measured]:
    """One extraction for each rank, weight by weight; a weight that is smaller than its factors is carried in full."""
    rows = []
    for rank in ranks:
        with tempfile.TemporaryDirectory() as folder, surgery.open_checkpoint(base) as before:
            kinds = layer_kinds(before.specs)
            done = surgery.extract(base, tuned, f"{folder}/adapter", rank=rank, dtype="float32")
            stored = load_file(f"{folder}/adapter/adapter_model.safetensors")
            reported = {module.name: module.residual for module in done.modules}
            for name, known in exact.items():
                kind = kinds[owner(name)]
                if name in reported:
                    kept = tuple(stored[key] for key in factor_keys(owner(name), kind))  # (rank, in), (out, rank)
                    product = kept[1].double() @ kept[0].double()
                else:
                    kept = (stored[full_key(name, wrappers=0)],)
                    product = kept[0].float() - before.read(name).float()
                    product = product if kind is LayerKind.LINEAR else product.mT
                rows.append(_measured(pair, OURS, name, rank, known, product, kept, reported.get(name)))
    return rows


def measure_peer(pair: str, tool: str, python: Path, ranks: list[int], exact: Mapping[str, Exact]) -> list[Measured]:
    """The peer's factors of the same matrices, made in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/deltas.safetensors", f"{folder}/factors.safetensors"
        save_file({name: known.delta.float().contiguous() for name, known in exact.items()}, source)
        command = [python, HERE / "peer_factors.py", tool, source, target, *map(str, ranks)]
        subprocess.run(command, check=True)
        found = load_file(target)
    rows = []
    for rank in ranks:
        for name, known in exact.items():
            if f"{rank}|full|{name}" in found:
                stored: tuple[torch.Tensor, ...] = (found[f"{rank}|full|{name}"],)
                product = stored[0].double()
            else:
                stored = found[f"{rank}|A|{name}"], found[f"{rank}|B|{name}"]
                product = stored[1].double() @ stored[0].double()
            rows.append(_measured(pair, tool, name, rank, known, product, stored, None))
    return rows


def _measured(
    pair: str,
    tool: str,
    name: str,
    rank: int,
    known: Exact,
    product: torch.Tensor,
    stored: tuple[torch.Tensor, ...],
    reported: float | None,
) -> Measured:
    nbytes = sum(tensor.nbytes for tensor in stored)
    figures = known.residual(product), reported, known.optimum(rank), float(known.delta.norm())
    return Measured(pair, tool, name, rank, *figures, nbytes)


def summary(rows: list[Measured]) -> list[dict[str, str | float]]:
    """A line for each pair, rank and tool: all weights together, and the worst of them."""
    lines = []
    for pair, rank, tool in dict.fromkeys((row.pair, row.rank, row.tool) for row in rows):
        chosen = [row for row in rows if (row.pair, row.rank, row.tool) == (pair, rank, tool)]
        changed = sum(row.norm**2 for row in chosen)
        lines.append(
            {
                "pair": pair,
                "rank": rank,
                "tool": tool,
                "weights": len(chosen),
                "nbytes": sum(row.nbytes for row in chosen),
                "optimum": (sum((row.norm * row.optimum) ** 2 for row in chosen) / changed) ** 0.5,
                "residual": (sum((row.norm * row.residual) ** 2 for row in chosen) / changed) ** 0.5,
                "worst_excess": max(row.excess for row in chosen),
                "worst_report_error": max(
                    (abs(row.residual - row.reported) for row in chosen if row.reported is not None), default=None
                ),
            }
        )
    return lines


def as_sheet(lines: list[dict[str, str | float]]) -> Sheet:
    """A row for each pair and rank: residuals of all weights together, and the worst excess of ours."""
    tools = [tool for tool in (OURS, *PEERS) if any(line["tool"] == tool for line in lines)]
    headings = ("pair", "rank", "MB", "optimum", *tools, "our worst excess", "our report's worst error")
    rows = []
    for pair, rank in dict.fromkeys((line["pair"], line["rank"]) for line in lines):
        by_tool = {line["tool"]: line for line in lines if (line["pair"], line["rank"]) == (pair, rank)}
        ours = by_tool[OURS]
        cells = [_cell(by_tool[tool], ours) for tool in tools]
        errors = (f"{ours['worst_excess']:.1e}", f"{ours['worst_report_error']:.1e}")
        rows.append((pair, str(rank), f"{ours['nbytes'] / 1e6:.2f}", f"{ours['optimum']:.6f}", *cells, *errors))
    return Sheet("Residuals ‖ΔW − BA‖/‖ΔW‖ of all linear weights together", headings, rows)


def _cell(line: dict[str, str | float], ours: dict[str, str | float]) -> str:
    """The residual, and the size where it is not ours."""
    size, usual = (f" ({one['nbytes'] / 1e6:.2f} MB)" for one in (line, ours))
    return f"{line['residual']:.6f}{'' if size == usual else size}"


def keep(
    folder: Path,
    pythons: Mapping[str, Path],
    rows: list[Measured],
    lines: list[dict[str, str | float]],
    spent: list[choices.Spent],
    sheets: list[Sheet],
) -> None:
    """The raw figures with versions, and the tables for people."""
    versions = {"surgery": surgery.__version__, "torch": torch.__version__, "python": platform.python_version()}
    packages = {"mergekit": "mergekit", "lycoris": "lycoris-lora"}
    for tool in pythons.keys() & packages.keys():
        ask = f"import importlib.metadata as m; print(m.version({packages[tool]!r}))"
        said = subprocess.run([pythons[tool], "-c", ask], check=True, capture_output=True, text=True)
        versions[tool] = said.stdout.strip()
    command = "python benchmarks/quality.py" + ("" if pythons else " --alone")
    document = {
        "command": command,
        "versions": versions,
        "table": lines,
        "choices": [asdict(one) for one in spent],
        "weights": [asdict(row) for row in rows],
    }
    remark = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    page = report.as_markdown(sheets, {"make demo first": command}, [remark])
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    report.write(folder, f"{datetime.date.today():%Y-%m-%d}-quality", text, page)


if __name__ == "__main__":
    main()
