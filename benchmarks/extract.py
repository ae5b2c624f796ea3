"""Times `surgery extract` at rank 16 against mergekit-extract-lora, and checks both against the optimum.

Linear weights only. The floors are processes that read both files and subtract, on as many threads. mergekit lives in
an environment of its own.

    python benchmarks/extract.py --layers 24           # 1.2 B parameters; the results get a name of their own
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import session
from environments import MERGEKIT, python_of
from processes import Contender
from report import Row, Spread
from session import HERE, PYTHON, SURGERY, Comparison, WrongAnswer, verdict

if TYPE_CHECKING:
    import torch

RANK = 16
TOLERANCE = 1.001  # our residual against that of the exact decomposition stored in the same dtype
FASTER = {6: 25, 24: 40}  # layers → times that we mean to be faster than mergekit, as whole processes
NEAR = 2.0  # times a floor, without imports, that we mean to take at most
_FILES = ("base/model.safetensors", "tuned/model.safetensors")
_OURS, _THEIRS = "out/surgery-extract", "out/mergekit-extract"
_SURGERY, _MERGEKIT = "surgery extract", "mergekit-extract-lora"
_WHOLE, _READ, _MAP = (f"floor: {way} and subtract" for way in ("read whole weights", "read blocks", "map blocks"))


def comparison(mergekit: Path) -> Comparison:
    """Both tools, each with its default threads and dtype (the model's, bfloat16); what does not change is left out."""
    return Comparison(
        name="extract",
        title=f"extract, rank {RANK}, linear weights",
        contenders=(
            Contender(
                _SURGERY,
                (SURGERY, "extract", "--rank", str(RANK), "base", "tuned", "-o", _OURS, "--json"),
                reads=_FILES,
                writes=_OURS,
            ),
            Contender(
                _MERGEKIT,
                # With fewer slashes mergekit takes a folder for a name at the hub, and asks there.
                (
                    *(str(mergekit), "--base-model", "./base/", "--model", "./tuned/", "--out-path", _THEIRS),
                    *("--max-rank", str(RANK), "-e", "embed_tokens", "-e", "lm_head", "-e", "norm"),
                ),
                reads=_FILES,
                writes=_THEIRS,
                imports=f"{_MERGEKIT} --help",
            ),
            Contender(f"{_MERGEKIT} --help", (str(mergekit), "--help")),
            *(
                Contender(name, (PYTHON, str(HERE / "floor_subtract.py"), way, *_FILES), reads=_FILES)
                for name, way in ((_WHOLE, "whole"), (_READ, "read"), (_MAP, "map"))
            ),
        ),
        check=check,
        environments={
            "surgery": (PYTHON, ("model-surgery", "torch", "numpy", "safetensors")),
            "mergekit": (str(mergekit.with_name("python")), ("mergekit", "torch", "transformers", "safetensors")),
        },
        floor=_READ,
        targets=targets,
    )


def targets(rows: Sequence[Row], layers: int) -> list[str]:
    """What we aim at, and whether this run got there."""
    by_name = {row.contender: row for row in rows}
    said = []
    if layers in FASTER:
        wall = by_name[_MERGEKIT].wall_ratio
        said.append(
            verdict(
                f"mergekit's wall time at least {FASTER[layers]} × ours", wall.median >= FASTER[layers], f"{wall} ×"
            )
        )
    for floor in (_WHOLE, _READ):
        share = by_name[floor].own_ratio
        if share is not None:
            near = Spread(1 / share.median, 1 / share.most, 1 / share.least)
            said.append(verdict(f"ours without imports at most {NEAR} × {floor}", near.median <= NEAR, f"{near} ×"))
    return said


def check(folder: Path) -> list[dict[str, Any]]:
    """The residuals ‖ΔW − BA‖/‖ΔW‖ of both tools and of the exact decomposition, for a few matrices.

    Raises:
        WrongAnswer: other modules than mergekit's, or a residual beyond TOLERANCE.
    """
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / out / "adapter_model.safetensors") for out in (_OURS, _THEIRS))
    if ours.keys() != theirs.keys():
        raise WrongAnswer(f"different keys: {', '.join(sorted(ours.keys() ^ theirs.keys())[:4])} ...")
    layers = 1 + max(int(key.split(".layers.")[1].split(".")[0]) for key in ours)
    chosen = (
        "model.layers.0.self_attn.q_proj",
        f"model.layers.{layers - 1}.self_attn.v_proj",
        f"model.layers.{layers // 2}.mlp.down_proj",
    )
    rows = [_compare(folder, module, ours, theirs) for module in chosen]
    for row in rows:
        if not row["surgery"] <= TOLERANCE * row["optimum, stored"]:
            raise WrongAnswer(f"the residual exceeds {TOLERANCE} × the optimum: {row}")
    return rows


def _compare(
    folder: Path, module: str, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
) -> dict[str, Any]:
    import torch
    from safetensors import safe_open

    tensors = []
    for name in _FILES:
        with safe_open(folder / name, framework="pt") as file:
            tensors.append(file.get_tensor(f"{module}.weight").to(torch.float64))
    delta = tensors[1] - tensors[0]  # (out, in)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    root = values[:RANK].sqrt()
    key = f"base_model.model.{module}.lora_"
    stored = ours[f"{key}A.weight"].dtype
    exact = (left[:, :RANK] * root).to(stored), (root[:, None] * right[:RANK]).to(stored)
    return {
        "weight": module.removeprefix("model."),
        "shape": " × ".join(map(str, delta.shape)),
        "optimum": float((values[RANK:].square().sum() / values.square().sum()).sqrt()),
        "optimum, stored": _residual(delta, *exact),
        "surgery": _residual(delta, ours[f"{key}B.weight"], ours[f"{key}A.weight"]),
        "mergekit": _residual(delta, theirs[f"{key}B.weight"], theirs[f"{key}A.weight"]),
        "dtype": str(stored).removeprefix("torch."),
    }


def _residual(delta: torch.Tensor, lora_b: torch.Tensor, lora_a: torch.Tensor) -> float:
    """‖ΔW − BA‖/‖ΔW‖ in float64; both tools write alpha = rank."""
    product = lora_b.to(delta.dtype) @ lora_a.to(delta.dtype)  # (out, in)
    return float((delta - product).norm() / delta.norm())


def mergekit_of(given: Path | None) -> Path:
    """The executable; without one given, that of an environment beside this file, made on first use."""
    return given.absolute() if given else python_of("mergekit", MERGEKIT).with_name("mergekit-extract-lora")


def main() -> None:
    parser = session.parser(__doc__.partition("\n")[0], rounds=5)
    parser.add_argument("--mergekit", type=Path, help="the mergekit-extract-lora to use [installs one]")
    options = parser.parse_args()
    session.run(comparison(mergekit_of(options.mergekit)), options)


if __name__ == "__main__":
    main()
