"""Splits a change into magnitude and direction: W′ = m ∘ (W0 + BA) / ‖W0 + BA‖, by rows (DoRA, arXiv 2402.09353,
equation 5).

LoRA spends rank on rows that only grew or shrank. Here the magnitude expresses this, and the factors only the change of
direction. Works on matrices, never on files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.linalg.truncated import DeltaMatrix, Factors, factorise

if TYPE_CHECKING:
    import torch

_BLOCK_ELEMENTS = 1 << 17  # float64 elements of one block, 1 MiB, which fits into the cache


@dataclass(frozen=True)
class DoraFactors:
    """Factors with their magnitude.

    Attributes:
        factors: lora_A and lora_B; energy and residual include the magnitude.
        magnitude: (out,) float32; in a narrower dtype its rounding error would exceed the change itself.
        kept_lora: whether LoRA's own product was best; the magnitude then holds its norms.
    """

    factors: Factors
    magnitude: torch.Tensor
    kept_lora: bool


def add_magnitude(
    base: torch.Tensor, tuned: torch.Tensor, lora: Factors, total: float, seed: int
) -> DoraFactors | None:
    """The best of three at LoRA's rank: its product, its product with the best magnitude, and factors of the turn.

    For a given direction V = W0 + BA the best magnitude of a row is its projection ⟨w, v⟩/‖v‖, which leaves
    ‖w‖² − ⟨w, v⟩²/‖v‖² as error. LoRA's own magnitude ‖v‖ is also a candidate, so the result is never worse than LoRA.
    For the turn, each row of tuned is scaled to be as close as possible to base's row; the turn is the difference.

    Args:
        base, tuned: (out, in) as stored, any floating dtype.
        lora: the LoRA factors of tuned − base.
        total: ‖tuned − base‖².
        seed: seed for the randomised SVD.

    Returns:
        None if a row of W0 + BA is zero, since it has no direction.
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
    """The magnitude and its ‖tuned − W′‖², in float64: the best magnitude if `free`, else the norms of the product.

    None if a row of W0 + BA is zero.
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
    """Yields blocks of rows of both in float64, small enough to stay in the cache."""
    import torch

    step = max(1, _BLOCK_ELEMENTS // base.shape[1])
    for begin in range(0, base.shape[0], step):
        rows = slice(begin, begin + step)
        yield rows, base[rows].to(torch.float64), tuned[rows].to(torch.float64)
