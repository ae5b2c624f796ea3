"""How a tensor that changed is carried in an adapter: as factors, in full, or not at all.

The ops of extract. Each gets tensors of base and tuned and says what became of them; none knows a file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from formats.layers import LayerKind
from formats.spec import DType
from formats.tensors import torch_dtype
from surgery.checks import check_finite
from surgery.errors import NotFinite
from surgery.linalg import factorise, squared_norm
from surgery.plan import Fate, Outcome

if TYPE_CHECKING:
    import torch

_BLOCK_ELEMENTS = 1 << 17  # of one block of a difference: it stays in the cache


@dataclass(frozen=True)
class ModuleReport:
    """One weight that became factors.

    Attributes:
        name: the tensor.
        shape: as stored.
        rank: of the factors.
        energy: share of ‖ΔW‖² they hold.
        residual: ‖ΔW − BA‖ / ‖ΔW‖, their rounding included.
        delta_norm: ‖ΔW‖.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    energy: float
    residual: float
    delta_norm: float


@dataclass(frozen=True)
class Factorise:
    """A changed matrix becomes lora_A and lora_B; whatever else its module holds goes along in full if it changed.

    Inputs: base and tuned weight, then base and tuned of each of `others`.
    Outputs: lora_A, lora_B, then each of `others` under its key with the weight adapted and without.
    """

    weight: str
    others: tuple[str, ...]
    kind: LayerKind
    rank: int
    dtype: DType
    seed: int

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Factors the difference; identical weights give nothing."""
        difference = _difference(inputs[0], inputs[1], self.weight)
        tensors: list[torch.Tensor | None] = [None, None]
        fates = {self.weight: Fate.IDENTICAL}
        figures: dict[str, Any] = {}
        if difference is not None:
            delta, total = difference  # as stored, float32
            oriented = delta if self.kind is LayerKind.LINEAR else delta.mT  # (out, in)
            factors = factorise(oriented, self.rank, torch_dtype(self.dtype), self.seed, total)
            check_finite(
                factors.lora_A, f"lora_A of {self.weight}", "the factors overflow their dtype: --dtype float32"
            )
            check_finite(
                factors.lora_B, f"lora_B of {self.weight}", "the factors overflow their dtype: --dtype float32"
            )
            tensors = [factors.lora_A, factors.lora_B]
            fates[self.weight] = Fate.LOW_RANK
            figures["module"] = ModuleReport(
                self.weight,
                tuple(delta.shape),
                self.rank,
                factors.energy,
                factors.residual,
                math.sqrt(total),
            )
            figures["rank"] = self.rank
        for index, name in enumerate(self.others):
            before, after = inputs[2 + 2 * index : 4 + 2 * index]
            changed = _changed(before, after, name)
            fates[name] = Fate.FULL if changed else Fate.IDENTICAL
            kept = after if changed else None
            tensors += [kept, None] if difference is not None else [None, kept]
        figures["full"] = [name for name in self.others if fates[name] is Fate.FULL]
        return Outcome(tuple(tensors), fates, figures)


@dataclass(frozen=True)
class KeepWhole:
    """Tensors that are carried in full if they changed, or if base lacks them.

    Inputs: tuned's tensors in order, each preceded by base's where `known`.
    Outputs: the tensors under their keys. A `module` (peft's `modules_to_save`) is carried whole or not at all.
    """

    names: tuple[str, ...]
    known: tuple[bool, ...]
    module: str | None

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Compares and keeps."""
        remaining = list(inputs)
        tensors: list[torch.Tensor | None] = []
        fates: dict[str, Fate] = {}
        for name, paired in zip(self.names, self.known, strict=True):
            before = remaining.pop(0) if paired else None
            after = remaining.pop(0)
            changed = before is None or _changed(before, after, name)
            fates[name] = Fate.FULL if changed else Fate.IDENTICAL
            tensors.append(after)
        full = [name for name, fate in fates.items() if fate is Fate.FULL]
        if not full:
            return Outcome((None,) * len(tensors), fates)
        kept = (
            tensors
            if self.module
            else [tensor if name in full else None for name, tensor in zip(self.names, tensors, strict=True)]
        )
        return Outcome(tuple(kept), fates, {"full": full, "saved": self.module})


@dataclass(frozen=True)
class LeaveBehind:
    """Tensors of base that tuned lacks, left as they are because the user said so."""

    names: tuple[str, ...]

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Accounts for them; there is nothing to read."""
        return Outcome((), dict.fromkeys(self.names, Fate.REFUSED))


def _difference(before: torch.Tensor, after: torch.Tensor, name: str) -> tuple[torch.Tensor, float] | None:
    """tuned − base in float32 and its squared norm, None if it is zero everywhere. Raises NotFinite."""
    import torch

    if before.dtype == after.dtype and torch.equal(before, after):  # NaN equals nothing, so it is still found below
        return None
    wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    delta = torch.empty(after.shape, dtype=torch.float32)
    step = max(1, _BLOCK_ELEMENTS // after.shape[1])
    for begin in range(0, after.shape[0], step):  # in the cache, and without a second copy of the whole
        rows = slice(begin, begin + step)
        delta[rows] = after[rows].to(wide).sub(before[rows].to(wide))
    total = squared_norm(delta)
    if not math.isfinite(total):
        check_finite(before, f"{name} of base")
        check_finite(after, f"{name} of tuned")
        raise NotFinite("the difference overflows float32", where=name)
    return (delta, total) if total > 0 else None


def _changed(before: torch.Tensor, after: torch.Tensor, name: str) -> bool:
    import torch

    if after.is_floating_point():
        check_finite(after, f"{name} of tuned")
    return not torch.equal(before.to(after.dtype), after)
