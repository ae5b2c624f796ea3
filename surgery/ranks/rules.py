"""Rules that choose the rank of one weight from its own spectrum.

Pure: a spectrum in, a rank out. Knows no tensor, no file and no way to compute a spectrum; a rule returns
None if the leading values that it gets do not decide the rank yet.
`surgery.ranks.budget` holds budgets for all weights together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    import numpy as np

# Share of ‖ΔW‖² by which total − Σσ² may be wrong, because σ comes from float32.
PRECISION = 1e-6


class RankRule(Protocol):
    """Chooses the rank of one weight from the known part of its spectrum. Frozen and picklable; `str` is one line."""

    def __call__(self, values: np.ndarray, total: float, size: int) -> int | None:
        """The rank, or None if the values do not determine it. More values never change an answer.

        Args:
            values: (k,) the leading singular values, float64, descending, 1 ≤ k ≤ size.
            total: ‖ΔW‖², the sum of all squared singular values.
            size: min(rows, columns), the number of all singular values.

        Returns:
            The rank, 1 ≤ rank ≤ k; never None if k = size.
        """

    def most(self, size: int) -> int:
        """The largest rank that it can return for a weight of this size, for which a plan must reserve space."""


@dataclass(frozen=True)
class FixedRank:
    """The same rank for every weight, clamped to the weight's size."""

    rank: int

    def __post_init__(self) -> None:
        _check(self.rank >= 1, "a rank must be at least 1", "a whole number from 1 on", self.rank, "--rank")

    def __call__(self, values: np.ndarray, total: float, size: int) -> int | None:
        """Decides once this many values are known."""
        rank = self.most(size)
        return rank if rank <= len(values) else None

    def most(self, size: int) -> int:
        """The rank, clamped."""
        return min(self.rank, size)

    def __str__(self) -> str:
        return f"rank {self.rank}"


@dataclass(frozen=True)
class EnergyRule:
    """The smallest r with σ1² + … + σr² ≥ share · ‖ΔW‖². kohya's sv_fro f is a share of f²."""

    share: float

    def __post_init__(self) -> None:
        _check(0 < self.share <= 1, "the share of energy is out of range", "above 0, at most 1", self.share, "--energy")

    def __call__(self, values: np.ndarray, total: float, size: int) -> int | None:
        """Decides once the known energies reach the goal."""
        return _reaching(values * values, self.share * total, size)

    def most(self, size: int) -> int:
        """All of it, for a flat spectrum."""
        return size

    def __str__(self) -> str:
        return f"energy ≥ {self.share:.6g}"


@dataclass(frozen=True)
class ResidualRule:
    """The smallest r with ‖ΔW − BA‖ ≤ bound · ‖ΔW‖: an energy of 1 − bound²."""

    bound: float

    def __post_init__(self) -> None:
        _check(
            0 <= self.bound < 1, "the relative error is out of range", "0 or more, below 1", self.bound, "--residual"
        )

    def __call__(self, values: np.ndarray, total: float, size: int) -> int | None:
        """Decides once the known energies reach the goal."""
        return _reaching(values * values, (1 - self.bound**2) * total, size)

    def most(self, size: int) -> int:
        """All of it, for a flat spectrum."""
        return size

    def __str__(self) -> str:
        return f"residual ≤ {self.bound:.6g}"


@dataclass(frozen=True)
class RatioRule:
    """Keeps the values above a share of the largest, and at least one.

    Both conventions are accepted: kohya's sv_ratio 10 and LyCORIS's ratio 0.1 both keep σ > σ1 / 10. Older versions of
    kohya's resize_lora.py keep one more value.
    """

    ratio: float

    def __post_init__(self) -> None:
        fits = 0 < self.ratio < math.inf
        _check(
            fits,
            "the ratio is out of range",
            "kohya's form, such as 10, or LyCORIS's, such as 0.1",
            self.ratio,
            "--sv-ratio",
        )

    def __call__(self, values: np.ndarray, total: float, size: int) -> int | None:
        """Decides once a known value falls to the share or below."""
        largest = float(values[0])
        return _above(values, largest / self.ratio if self.ratio > 1 else self.ratio * largest, size)

    def most(self, size: int) -> int:
        """All of it, for a flat spectrum."""
        return size

    def __str__(self) -> str:
        return f"σ > σ1 / {max(self.ratio, 1 / self.ratio):.6g}"


@dataclass(frozen=True)
class ThresholdRule:
    """Keeps the values above a threshold, and at least one: LyCORIS's threshold."""

    threshold: float

    def __post_init__(self) -> None:
        fits = 0 <= self.threshold < math.inf
        _check(fits, "the threshold for singular values is out of range", "0 or more", self.threshold, "--sv-threshold")

    def __call__(self, values: np.ndarray, total: float, size: int) -> int | None:
        """Decides once a known value falls to the threshold or below."""
        return _above(values, self.threshold, size)

    def most(self, size: int) -> int:
        """All of it, for a spectrum above the threshold."""
        return size

    def __str__(self) -> str:
        return f"σ > {self.threshold:.6g}"


@dataclass(frozen=True)
class QuantileRule:
    """The smallest r with σ1 + … + σr ≥ share · (the sum of all σ): kohya's sv_cumulative.

    LyCORIS's quantile counts the sums *below* the share, and so keeps one value fewer. Older versions of kohya's
    resize_lora.py keep one more.
    """

    share: float

    def __post_init__(self) -> None:
        _check(0 < self.share <= 1, "the quantile is out of range", "above 0, at most 1", self.share, "--sv-quantile")

    def __call__(self, values: np.ndarray, total: float, size: int) -> int | None:
        """Decides once the sum of the unknown values, which their energy bounds, cannot change the rank."""
        # Of the unknown values we know the number, the energy, and that none exceeds the last known value. Their sum is
        # largest if all are equal (Cauchy and Schwarz), and each is at least its square divided by the last known one.
        rest, known, last = size - len(values), float(values.cumsum()[-1]), float(values[-1])
        if rest == 0:
            return _reaching(values, self.share * known, size)
        energy = total - float((values * values).sum())
        most = math.sqrt(rest * max(0.0, energy + PRECISION * total))
        least = max(0.0, energy - PRECISION * total) / last if last > 0 else 0.0
        low = _reaching(values, self.share * (known + least), size)
        return low if low == _reaching(values, self.share * (known + most), size) else None

    def most(self, size: int) -> int:
        """All of it, for a flat spectrum."""
        return size

    def __str__(self) -> str:
        return f"Σσ ≥ {self.share:.6g} of all"


@dataclass(frozen=True)
class Bounded:
    """A rule limited to a minimum and a maximum, both clamped to the weight's size.

    It looks at no more than `maximum` values. If these do not determine the rule's rank, the rank is the maximum. (Only
    a quantile could have chosen a smaller one.)
    """

    rule: RankRule
    minimum: int = 1
    maximum: int | None = None

    def __post_init__(self) -> None:
        _check(self.minimum >= 1, "a rank must be at least 1", "a whole number from 1 on", self.minimum, "--min-rank")
        fits = self.maximum is None or self.maximum >= self.minimum
        _check(fits, "no rank lies within these bounds", f"{self.minimum} or more", self.maximum, "--max-rank")

    def __call__(self, values: np.ndarray, total: float, size: int) -> int | None:
        """The rule's rank, within the bounds."""
        least, most = self._bounds(size)
        if len(values) < least:
            return None
        rank = self.rule(values[:most], total, size)
        if rank is None:
            return most if len(values) >= most else None
        return max(least, min(rank, most))

    def most(self, size: int) -> int:
        """The rule's largest rank, within the bounds."""
        least, most = self._bounds(size)
        return max(least, min(self.rule.most(size), most))

    def _bounds(self, size: int) -> tuple[int, int]:
        return min(self.minimum, size), size if self.maximum is None else min(self.maximum, size)

    def __str__(self) -> str:
        least = f"at least {self.minimum}" if self.minimum > 1 else ""
        most = f"at most {self.maximum}" if self.maximum is not None else ""
        bounds = " and ".join(filter(None, (least, most)))
        return f"{self.rule}, {bounds}" if bounds else str(self.rule)


def rank_rule(
    *,
    rank: int | None = None,
    energy: float | None = None,
    residual: float | None = None,
    sv_ratio: float | None = None,
    sv_threshold: float | None = None,
    sv_quantile: float | None = None,
    minimum: int | None = None,
    maximum: int | None = None,
) -> RankRule:
    """Makes the one rule that the arguments ask for, within the bounds.

    Raises:
        SurgeryError: no rule or several are given, or a value is out of range.
    """
    asked: list[tuple[str, RankRule]] = []
    if rank is not None:
        asked.append(("--rank", FixedRank(rank)))
    if energy is not None:
        asked.append(("--energy", EnergyRule(energy)))
    if residual is not None:
        asked.append(("--residual", ResidualRule(residual)))
    if sv_ratio is not None:
        asked.append(("--sv-ratio", RatioRule(sv_ratio)))
    if sv_threshold is not None:
        asked.append(("--sv-threshold", ThresholdRule(sv_threshold)))
    if sv_quantile is not None:
        asked.append(("--sv-quantile", QuantileRule(sv_quantile)))
    if len(asked) != 1:
        raise SurgeryError(
            "the rank must be chosen in exactly one way",
            expected="one of --rank, --energy, --residual, --sv-ratio, --sv-threshold, --sv-quantile, --budget",
            found=", ".join(option for option, _ in asked) or "none",
            then="choose one; --min-rank and --max-rank can be added to any of them",
        )
    rule = asked[0][1]
    return rule if minimum is None and maximum is None else Bounded(rule, 1 if minimum is None else minimum, maximum)


def _reaching(terms: np.ndarray, goal: float, size: int) -> int | None:
    """The smallest count of leading terms whose sum reaches the goal; all terms if only rounding prevents it."""
    sums = terms.cumsum()
    count = int(sums.searchsorted(goal)) + 1
    return count if count <= len(terms) else size if len(terms) == size else None


def _above(values: np.ndarray, threshold: float, size: int) -> int | None:
    """The number of values above the threshold, at least 1; None if the values do not determine it."""
    count = int((values > threshold).sum())
    return None if count == len(values) < size else max(1, count)


def _check(fits: bool, what: str, expected: str, found: object, option: str) -> None:
    if not fits:
        raise SurgeryError(what, expected=expected, found=found, then=f"choose it with {option}")
