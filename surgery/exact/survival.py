"""Measures how much of a change survives rounding: ‖stored(W) − W0‖ / ‖ΔW‖, and the cosine of the angle between them.

A delta below half a unit in the last place of the stored dtype is rounded away, and a merge that changes nothing looks
like any other. The measurement runs block by block while merging. Dot products are taken in float32 over at most 4096
elements, each by one call with a fixed order, and added in float64 block by block, so the result does not depend on
threads. This module knows no tensor names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.errors import VerificationFailed

if TYPE_CHECKING:
    import torch

_LINE = 4096  # elements of one float32 sum
_FLOOR = 1e-30  # below this, squares underflow in float32


@dataclass(frozen=True)
class Surviving:
    """How much of one tensor's change was stored.

    Attributes:
        survived: ‖stored(W) − W0‖ / ‖ΔW‖; 1 for a change of zero.
        cosine: cosine of the angle between the stored and the requested change; 0 if nothing was stored.
    """

    survived: float
    cosine: float


class Watch:
    """Adds up the requested change and the stored change, block by block in a fixed order."""

    def __init__(self) -> None:
        self._stored = self._asked = self._along = 0.0

    def __call__(self, start: torch.Tensor, change: torch.Tensor, rounded: torch.Tensor) -> None:
        """Adds one block.

        Args:
            start: W0, any floating dtype.
            change: ΔW before any rounding, of the same shape, float32 or float64.
            rounded: W0 + ΔW as stored.
        """
        import torch

        wide = torch.float64 if torch.float64 in (start.dtype, rounded.dtype) else torch.float32
        self.take(rounded.to(wide) - start.to(wide), change)

    def take(self, stored: torch.Tensor, asked: torch.Tensor) -> None:
        """Adds one block of both changes, which have one shape and are contiguous."""
        import torch

        squares, along = _products(asked, stored, torch.float32)
        if not all(_FLOOR < square < math.inf for square in squares):
            squares, along = _products(asked, stored, torch.float64)
        self._asked += squares[0]
        self._stored += squares[1]
        self._along += along

    @property
    def asks(self) -> bool:
        """Whether the requested change is not zero."""
        return self._asked != 0

    @property
    def is_finite(self) -> bool:
        """Whether there was no NaN or Inf. False may also mean that a square exceeded float64."""
        return math.isfinite(self._asked + self._stored)

    @property
    def surviving(self) -> Surviving:
        """The result for all blocks so far."""
        asked, stored = math.sqrt(self._asked), math.sqrt(self._stored)
        if not asked:
            return Surviving(1.0, 1.0)
        return Surviving(stored / asked, self._along / (asked * stored) if stored else 0.0)


def _products(asked: torch.Tensor, stored: torch.Tensor, dtype: torch.dtype) -> tuple[tuple[float, float], float]:
    """‖asked‖², ‖stored‖² and ⟨asked, stored⟩ of two flat tensors."""
    left, right = (change.reshape(-1).to("cpu", dtype).numpy() for change in (asked, stored))
    with np.errstate(all="ignore"):  # is_finite reports NaN and Inf afterwards
        return (_dot(left, left), _dot(right, right)), _dot(left, right)


def _dot(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> float:
    """Σ left · right of two flat arrays: lines of a fixed length, added in float64."""
    whole = len(left) // _LINE * _LINE
    lines = np.vecdot(left[:whole].reshape(-1, _LINE), right[:whole].reshape(-1, _LINE))
    total = float(lines.sum(dtype=np.float64))
    return total if whole == len(left) else total + float(np.vecdot(left[whole:], right[whole:]))


def least(surviving: Mapping[str, Surviving]) -> str | None:
    """The tensor whose change survived least, the first by name if several did; None if there are no tensors."""
    return min(sorted(surviving), key=lambda name: surviving[name].survived, default=None)


def middle(surviving: Mapping[str, Surviving]) -> float:
    """The median of `survived` over all tensors."""
    return median(each.survived for each in surviving.values())


def check_surviving(surviving: Mapping[str, Surviving], minimum: float) -> None:
    """Raises VerificationFailed if less than `minimum` of any tensor's change was stored."""
    name = least(surviving)
    if name is not None and surviving[name].survived < minimum:
        few = sum(each.survived < minimum for each in surviving.values())
        raise VerificationFailed(
            f"too little of the change survives rounding in {few} of {len(surviving)} merged tensors: nothing written",
            where=name,
            expected=f"‖stored(W) − W0‖ / ‖ΔW‖ of at least {minimum}",
            found=f"{surviving[name].survived:.4g}",
            then="store the result in a finer dtype: --dtype bfloat16 or float32",
        )
