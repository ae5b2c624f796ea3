"""Computes error and size against rank from spectra, before anything is extracted.

Pure: spectra in, points out. Usually only the leading values of a spectrum are known; a curve ends where they end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.ranks.budget import Claim, allocate
from surgery.ranks.rules import EnergyRule

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Spectrum:
    """The known part of the spectrum of one weight's change ΔW.

    A stack of experts, whose factors all have one rank, counts as one weight: its i-th value is the root of the sum of
    the experts' i-th squared singular values.

    Attributes:
        name: the tensor's name.
        shape: the tensor's shape as stored.
        size: the number of all singular values.
        bytes_per_rank: bytes of a column of lora_B plus a row of lora_A as stored, summed over all experts.
        total: ‖ΔW‖².
        values: the leading singular values, descending; at least one.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    bytes_per_rank: int
    total: float
    values: tuple[float, ...]

    @property
    def complete(self) -> bool:
        """Whether all singular values are known."""
        return len(self.values) == self.size

    @functools.cached_property
    def energies(self) -> np.ndarray:
        """(known,) squared singular values."""
        import numpy as np

        return np.square(np.asarray(self.values, dtype=np.float64))

    @functools.cached_property
    def left_out(self) -> np.ndarray:
        """(1 + known,) ‖ΔW − BA‖² at ranks 0, 1, 2, …"""
        import numpy as np

        rest = 0.0 if self.complete else max(0.0, self.total - float(self.energies.sum()))
        return np.append(self.energies[::-1].cumsum()[::-1], 0.0) + rest

    def left_out_at(self, rank: int) -> float:
        """‖ΔW − BA‖² at a rank, clamped to the size."""
        return float(self.left_out[min(rank, self.size)])

    def residual(self, rank: int) -> float:
        """‖ΔW − BA‖ / ‖ΔW‖ at a rank, clamped to the size."""
        return math.sqrt(min(1.0, self.left_out_at(rank) / self.total))

    def needed(self, energy: float) -> int | None:
        """The rank that captures a share of ‖ΔW‖²; None if the known values do not reach it."""
        import numpy as np

        return EnergyRule(energy)(np.asarray(self.values, dtype=np.float64), self.total, self.size)


@dataclass(frozen=True)
class Point:
    """Error and size of all weights together at one choice of ranks.

    Attributes:
        rank: the uniform rank, clamped in smaller weights; None for a budget.
        nbytes: bytes of all factors.
        energy: share of Σ‖ΔW‖² that the factors capture.
        residual: √(Σ‖ΔW − BA‖² / Σ‖ΔW‖²).
        limited: whether some weights took all their known values; with more values known, the error could be smaller.
    """

    rank: int | None
    nbytes: int
    energy: float
    residual: float
    limited: bool = False


def known_rank(spectra: Iterable[Spectrum]) -> int:
    """The largest uniform rank that all the spectra cover."""
    spectra = list(spectra)
    ends = [len(spectrum.values) for spectrum in spectra if not spectrum.complete]
    return min(ends) if ends else max((spectrum.size for spectrum in spectra), default=0)


def doubling(limit: int) -> list[int]:
    """1, 2, 4, … up to a limit, which always comes last."""
    return [rank for rank in (1 << power for power in range(limit.bit_length())) if rank < limit] + [limit]


def uniform(spectra: Sequence[Spectrum], ranks: Iterable[int]) -> tuple[Point, ...]:
    """Points with the same rank for all weights. Ranks beyond the known values are left out."""
    limit = known_rank(spectra)
    return tuple(
        _point(spectra, [min(rank, spectrum.size) for spectrum in spectra], rank) for rank in ranks if rank <= limit
    )


def budgeted(spectra: Sequence[Spectrum], sizes: Iterable[int]) -> tuple[Point, ...]:
    """Points with the best ranks for sizes in bytes. Sizes too small for rank 1 in every weight are left out.

    A point is marked as limited if more known values could have given better ranks for its size.
    """
    claims = [Claim(spectrum.name, spectrum.energies, spectrum.size, spectrum.bytes_per_rank) for spectrum in spectra]
    least = sum(claim.bytes_per_rank for claim in claims)
    points = []
    for size in sizes:
        if size >= least:
            given = allocate(claims, size)
            points.append(_point(spectra, list(given.ranks.values()), None, limited=bool(given.saturated)))
    return tuple(points)


def _point(spectra: Sequence[Spectrum], ranks: Sequence[int], rank: int | None, limited: bool = False) -> Point:
    chosen = list(zip(spectra, ranks, strict=True))
    left_out = sum(spectrum.left_out_at(count) for spectrum, count in chosen)
    share = min(1.0, left_out / sum(spectrum.total for spectrum in spectra))
    nbytes = sum(spectrum.bytes_per_rank * count for spectrum, count in chosen)
    return Point(rank, nbytes, 1.0 - share, math.sqrt(share), limited)
