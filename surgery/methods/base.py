"""What a method is to the rest: it checks while planning, and turns factors into a delta, or W0 into W, while running.

A method gets tensors and never a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from formats.adapter import AdapterModule
from formats.spec import DType, TensorSpec
from surgery.rounding import Delta

if TYPE_CHECKING:
    import torch


class AdditiveMethod(Protocol):
    """The mathematics of one way of adding to a weight: W = W0 + ΔW, ΔW independent of W0. Stateless."""

    name: str

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Called while planning. Raises NotMergeable with the reason, or ShapeMismatch."""

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW in the base weight's stored order, seen as a matrix; a vector as one column."""


class TransformingMethod(Protocol):
    """The mathematics of one way of making another weight out of W0. Stateless.

    Such a method has no delta: it stands alone on its tensor, has no strength, and cannot be taken off.
    """

    name: str
    forgets: str  # what of W0 its result does not determine, as a sentence

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Called while planning. Raises NotMergeable with the reason, or ShapeMismatch."""

    def transform(
        self, module: AdapterModule, weight: torch.Tensor, factors: Mapping[str, torch.Tensor], dtype: DType
    ) -> torch.Tensor:
        """W in the stored shape, computed in float64 and rounded once to `dtype`."""
