"""A change as magnitude and direction: W′ = m ∘ (W0 + BA) / ‖W0 + BA‖, row by row (DoRA, arXiv 2402.09353, equation 5).

LoRA spends rank on rows that merely grew or shrank; here the magnitude takes that, and the factors only the turn. Gets
matrices, never a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.linalg.truncated import DeltaMatrix, Factors, factorise

if TYPE_CHECKING:
    import torch

_BLOCK_ELEMENTS = 1 << 17  # float64 elements of one block: 1 MiB, so that it stays in cache


@dataclass(frozen=True)
class DoraFactors:
    """Factors with their magnitude.

    Attributes:
        factors: lora_A and lora_B; energy and residual are those of the whole, magnitude included.
        magnitude: (out,) float32: in a narrower type its rounding would weigh more than the change itself.
        kept_lora: whether nothing was better than LoRA's own product, whose norms the magnitude then repeats.
    """

    factors: Factors
    magnitude: torch.Tensor
    kept_lora: bool


def add_magnitude(
    base: torch.Tensor, tuned: torch.Tensor, lora: Factors, total: float, seed: int
) -> DoraFactors | None:
    """The best of three at LoRA's rank: LoRA's product as it is, with the best magnitude, and with factors of the turn.

    For a given direction V = W0 + BA the best magnitude of a row is its projection ⟨w, v⟩/‖v‖, which leaves
    ‖w‖² − ⟨w, v⟩²/‖v‖²; as LoRA's own magnitude ‖v‖ is one of those it is chosen from, it is never worse than LoRA. The
    turn is what is left of tuned, each row scaled to come as near as it can to base's, after base is taken off.

    Args:
        base, tuned: (out, in) as stored, any floating dtype.
        lora: of tuned − base.
        total: ‖tuned − base‖².
        seed: of the random start of the decomposition.

    Returns:
        None where a row of W0 + BA is zero: it has no direction.
    """
    import torch

    own = _measure(base, tuned, lora, free=False)
    scaled = _measure(base, tuned, lora, free=True)
    if own is None or scaled is None:
        return None
    turn = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    for rows, before, after in _blocks(base, tuned):
        scale = (before * after).sum(dim=1) / after.square().sum(dim=1).clamp_min(1e-300)
        turn[rows] = (scale[:, None] * after - before).to(torch.float32)
    candidates = [(lora, *own, True), (lora, *scaled, False)]
    delta = DeltaMatrix.of(turn)
    if delta.total > 0:
        turned = factorise(delta, lora.rank, lora.lora_A.dtype, seed)
        measured = _measure(base, tuned, turned, free=True)
        candidates += [(turned, *measured, False)] if measured is not None else []
    factors, magnitude, left_out, kept = min(candidates, key=lambda candidate: candidate[2])
    share = left_out / total
    factors = replace(factors, energy=1.0 - share, residual=math.sqrt(share), singular_values=lora.singular_values)
    return DoraFactors(factors, magnitude, kept)


def _measure(
    base: torch.Tensor, tuned: torch.Tensor, factors: Factors, *, free: bool
) -> tuple[torch.Tensor, float] | None:
    """The magnitude and ‖tuned − W′‖² with it, in float64: the best magnitude if `free`, else the product's own norms.

    None where a row of W0 + BA is zero.
    """
    import torch

    a = factors.lora_A.to(base.device, torch.float64)  # (rank, in)
    b = factors.lora_B.to(base.device, torch.float64)  # (out, rank)
    magnitude = torch.empty(base.shape[0], dtype=torch.float32, device=base.device)
    left_out = 0.0
    for rows, before, after in _blocks(base, tuned):
        direction = before + b[rows] @ a  # (rows, in)
        norm = torch.linalg.vector_norm(direction, dim=1)
        if not bool(norm.all()):
            return None
        magnitude[rows] = ((direction * after).sum(dim=1) / norm if free else norm).to(torch.float32)
        direction *= (magnitude[rows].to(torch.float64) / norm)[:, None]
        left_out += float((after - direction).square().sum())
    return magnitude, left_out


def _blocks(base: torch.Tensor, tuned: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Rows of both in float64, few enough to stay in the cache."""
    import torch

    step = max(1, _BLOCK_ELEMENTS // base.shape[1])
    for begin in range(0, base.shape[0], step):
        rows = slice(begin, begin + step)
        yield rows, base[rows].to(torch.float64), tuned[rows].to(torch.float64)
