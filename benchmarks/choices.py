"""What the ways to spend bytes are worth on a pair: a uniform rank, `--budget` at the same size, DoRA at the same rank.

Measured from the files that extract wrote, by formulas of its own in float64, over all matrices of the model: those
that a choice carries in full leave nothing out, and their bytes count. Linear weights and embeddings.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from report import Sheet
from safetensors.torch import load_file

import surgery
from formats.dialects.peft_writing import factor_keys, magnitude_key
from formats.layers import LayerKind, layer_kinds, owner
from surgery.ranks.budget import Budget

UNIFORM, BUDGET, DORA = "uniform", "--budget", "DoRA"


@dataclass(frozen=True)
class Spent:
    """One adapter.

    Attributes:
        rank: the uniform one, or that of the adapter whose size this one was held to.
        way: UNIFORM, BUDGET or DORA.
        least, most: ranks of its weights.
        nbytes: of its weights' file.
        residual: √(Σ‖ΔW − ΔW′‖²/Σ‖ΔW‖²) of all matrices, ΔW′ what the adapter makes of them.
        reported: the same as the report says it, of those it factored.
    """

    rank: int
    way: str
    least: int
    most: int
    nbytes: int
    residual: float
    reported: float

    @property
    def energy(self) -> float:
        """The share of Σ‖ΔW‖² that it holds."""
        return 1 - self.residual**2


def spend(base: str, tuned: str, ranks: list[int], dora_up_to: int) -> list[Spent]:
    """A uniform rank and its budget for each rank, and DoRA for those that are small enough to be of interest."""
    found = []
    before, after = _weights(base), _weights(tuned)
    for rank in ranks:
        uniform = _spent(base, tuned, before, after, rank, UNIFORM, rank)
        found += [uniform, _spent(base, tuned, before, after, rank, BUDGET, Budget(uniform.nbytes))]
        if rank <= dora_up_to:
            found.append(_spent(base, tuned, before, after, rank, DORA, rank))
    return found


def failures(found: list[Spent]) -> list[str]:
    """Where a budget holds less than the uniform rank of its size, or exceeds it, or DoRA less than LoRA."""
    by_way = {(one.rank, one.way): one for one in found}
    wrong = []
    for (rank, way), one in by_way.items():
        uniform = by_way[rank, UNIFORM]
        if one.residual > uniform.residual:
            wrong.append(f"{way} at rank {rank} leaves out {one.residual}, the uniform rank {uniform.residual}")
        if way == BUDGET and one.nbytes > uniform.nbytes:
            wrong.append(f"{way} at rank {rank} takes {one.nbytes} bytes, more than {uniform.nbytes}")
    return wrong


def as_sheet(found: list[Spent]) -> Sheet:
    """A row for each adapter."""
    titles = {UNIFORM: "rank {}", BUDGET: "the size of rank {} by --budget", DORA: "rank {}, DoRA"}
    rows = []
    for one in found:
        ranks = str(one.least) if one.least == one.most else f"{one.least}–{one.most}"
        size, figures = f"{one.nbytes / 1e6:.2f}", (f"{one.residual:.6f}", f"{one.energy:.2%}", f"{one.reported:.6f}")
        rows.append((titles[one.way].format(one.rank), size, ranks, *figures))
    title = "The fine-tuned model, all matrices"
    return Sheet(title, ("adapter", "MB", "ranks", "residual", "energy", "residual reported"), rows)


def _weights(path: str) -> dict[str, torch.Tensor]:
    with surgery.open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name, spec in checkpoint.specs.items() if len(spec.shape) == 2}


def _spent(
    base: str,
    tuned: str,
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    rank: int,
    way: str,
    choice: int | Budget,
) -> Spent:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "adapter"
        method = "dora" if way == DORA else "lora"
        report = surgery.extract(base, tuned, out, rank=choice, method=method, dtype="float32")
        nbytes = (out / "adapter_model.safetensors").stat().st_size
        stored = load_file(out / "adapter_model.safetensors")
    with surgery.open_checkpoint(base) as checkpoint:
        kinds = layer_kinds(checkpoint.specs)
    factored = {module.name for module in report.modules}
    changed = left_out = 0.0
    for name, weight in after.items():
        changed += float((weight.double() - before[name].double()).square().sum())
        if name in factored:
            left_out += _left_out(stored, owner(name), kinds[owner(name)], before[name].double(), weight.double())
    ranks = [module.rank for module in report.modules]
    residual = (left_out / changed) ** 0.5
    return Spent(rank, way, min(ranks), max(ranks), nbytes, residual, report.residual)


def _left_out(
    stored: Mapping[str, torch.Tensor], module: str, kind: LayerKind, before: torch.Tensor, after: torch.Tensor
) -> float:
    """‖tuned − W′‖² with W′ = W0 + BA, or m · (W0 + BA)/‖W0 + BA‖ row by row where there is a magnitude."""
    a, b = (stored[key].double() for key in factor_keys(module, kind))  # (rank, in), (out, rank)
    if kind is LayerKind.EMBEDDING:
        before, after = before.mT, after.mT
    made = before + b @ a  # (out, in)
    magnitude = stored.get(magnitude_key(module))
    if magnitude is not None:
        made *= (magnitude.double() / torch.linalg.vector_norm(made, dim=1))[:, None]
    return float((after - made).square().sum())
