"""Chooses the rank of each weight so that all factors together fit a size and capture the most energy.

This module is pure: spectra and bytes in, ranks out. It knows no tensor, no file and no way to compute a spectrum, but
it reports which spectra were not known far enough.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Budget:
    """A size for a whole adapter.

    Attributes:
        nbytes: size of the adapter's weights file in bytes.
        minimum, maximum: least and largest rank of every weight.

    Raises:
        SurgeryError: the size is below 1, or no rank is within the bounds.
    """

    nbytes: int
    minimum: int = 1
    maximum: int | None = None

    def __post_init__(self) -> None:
        if self.nbytes < 1:
            raise SurgeryError(
                "not a possible size",
                expected="at least 1 byte",
                found=self.nbytes,
                then="pass a size such as --budget 20MB",
            )
        if self.minimum < 1 or (self.maximum is not None and self.maximum < self.minimum):
            raise SurgeryError(
                "no rank lies within these bounds",
                expected="1 or more",
                found=f"{self.minimum} to {self.maximum}",
                then="choose them with --min-rank and --max-rank",
            )

    def __str__(self) -> str:
        return f"the best ranks for {self.nbytes:,} bytes"


@dataclass(frozen=True, eq=False)
class Claim:
    """What one weight would gain from a share of the budget.

    Attributes:
        name: the weight's name; it breaks ties.
        energies: (k,) its leading squared singular values, float64, descending.
        size: the number of all its singular values.
        bytes_per_rank: bytes of a column of lora_B plus a row of lora_A.
        minimum, maximum: its least and largest rank, clamped to its size.
    """

    name: str
    energies: np.ndarray
    size: int
    bytes_per_rank: int
    minimum: int = 1
    maximum: int | None = None

    @property
    def least(self) -> int:
        """Its least rank."""
        return min(self.minimum, self.size)

    @property
    def most(self) -> int:
        """Its largest rank, if all its values were known."""
        return self.size if self.maximum is None else min(self.size, self.maximum)


@dataclass(frozen=True)
class Allocation:
    """How a budget was spent.

    Attributes:
        ranks: rank by name, in the order of the claims.
        nbytes: bytes of the factors, plus the fixed bytes.
        saturated: weights that took all their known values and might have taken more. Unless this is empty, the ranks
            are not final: compute more of these spectra and allocate again.
    """

    ranks: dict[str, int]
    nbytes: int
    saturated: tuple[str, ...]


def allocate(claims: Sequence[Claim], budget: int, fixed: int = 0) -> Allocation:
    """Ranks that capture the most energy Σσ² with factors of at most `budget` bytes in all.

    Columns are taken in descending order of energy per byte. Within a weight this is the order of its singular values,
    because their energies descend at equal cost. No other choice of the same size captures more: every column that it
    adds comes later in the order, and yields less energy per byte than the columns it gives up. The argument fails only
    at the end, when the next column in order does not fit. The remaining bytes are then fewer than that column needs,
    and go to later columns that fit. So the result is less than one column's energy below the optimum. With few and
    large columns a uniform rank may still capture more; then it is used.

    Args:
        claims: the weights.
        budget: bytes of the whole output.
        fixed: bytes of the output that do not depend on ranks: the header, and tensors carried in full.

    Raises:
        SurgeryError: the least ranks do not fit.
    """
    ranks = {claim.name: claim.least for claim in claims}
    spent = fixed + sum(claim.least * claim.bytes_per_rank for claim in claims)
    if spent > budget:
        raise SurgeryError(
            "the budget is too small for the least ranks",
            expected=f"at least {spent:,} bytes, of which {fixed:,} do not depend on ranks",
            found=f"{budget:,} bytes",
            then="pass a larger --budget, or leave weights out with --exclude",
        )
    ordered = sorted(claims, key=lambda claim: claim.name)
    spent += _take_in_bulk(ordered, ranks, budget - spent)
    spent += _take_what_fits(ordered, ranks, budget - spent)
    even = _uniform(claims, budget - fixed)
    if even is not None and captured(claims, even) > captured(claims, ranks):
        ranks, spent = even, fixed + sum(claim.bytes_per_rank * even[claim.name] for claim in claims)
    saturated = [claim.name for claim in claims if len(claim.energies) <= ranks[claim.name] < claim.most]
    return Allocation(ranks, spent, tuple(saturated))


def _uniform(claims: Sequence[Claim], room: int) -> dict[str, int] | None:
    """The largest uniform rank, clamped to each weight's bounds, whose factors fit; None if its energy is not known."""

    def at(rank: int) -> dict[str, int]:
        return {claim.name: min(max(rank, claim.least), claim.most) for claim in claims}

    def fits(rank: int) -> bool:
        ranks = at(rank)
        return sum(claim.bytes_per_rank * ranks[claim.name] for claim in claims) <= room

    low, high = 1, max((claim.most for claim in claims), default=1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    ranks = at(low)
    known = all(ranks[claim.name] <= len(claim.energies) for claim in claims)
    return ranks if known and fits(low) else None


def _take_in_bulk(claims: Sequence[Claim], ranks: dict[str, int], room: int) -> int:
    """Takes columns in order as long as they fit, and returns their bytes. Sorts them all at once, because there may be
    millions."""
    import numpy as np

    offered = [_offered(claim) for claim in claims]
    if not any(map(len, offered)):
        return 0
    owners = np.repeat(np.arange(len(claims)), [len(yields) for yields in offered])
    order = np.argsort(-np.concatenate(offered), kind="stable")  # ties: by name, then by index
    costs = np.array([claim.bytes_per_rank for claim in claims], dtype=np.int64)[owners[order]]
    running = np.cumsum(costs)
    taken = int(np.searchsorted(running, room, side="right"))
    for claim, count in zip(claims, np.bincount(owners[order[:taken]], minlength=len(claims)), strict=True):
        ranks[claim.name] += int(count)
    return int(running[taken - 1]) if taken else 0


def _take_what_fits(claims: Sequence[Claim], ranks: dict[str, int], room: int) -> int:
    """Spends the remaining bytes on columns in order, skipping those that do not fit, and returns their bytes."""
    yields = {claim.name: _offered(claim) for claim in claims}
    heap = []
    for index, claim in enumerate(claims):
        position = ranks[claim.name] - claim.least
        if position < len(yields[claim.name]):
            heap.append((-float(yields[claim.name][position]), index, position))
    heapq.heapify(heap)
    spent = 0
    while heap:
        _, index, position = heapq.heappop(heap)
        claim = claims[index]
        if claim.bytes_per_rank > room - spent:
            continue  # nor will any later column of this weight fit
        spent += claim.bytes_per_rank
        ranks[claim.name] += 1
        if position + 1 < len(yields[claim.name]):
            heapq.heappush(heap, (-float(yields[claim.name][position + 1]), index, position + 1))
    return spent


def _offered(claim: Claim) -> np.ndarray:
    """(columns,) energy per byte of the columns above the minimum, forced to descend despite rounding."""
    import numpy as np

    return np.minimum.accumulate(claim.energies)[claim.least : claim.most] / claim.bytes_per_rank


def captured(claims: Iterable[Claim], ranks: dict[str, int]) -> float:
    """The energy Σσ² that these ranks capture."""
    return sum(float(claim.energies[: ranks[claim.name]].sum()) for claim in claims)
