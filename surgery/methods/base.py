"""The protocols of methods. A method checks while planning; while running, it turns factors into a delta, or W0 into W.

A method is given tensors and never a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from formats.adapter import AdapterModule
from formats.spec import DType, TensorSpec
from surgery.exact.rounding import Delta

if TYPE_CHECKING:
    import torch


class AdditiveMethod(Protocol):
    """A method that adds to a weight: W = W0 + ΔW, with ΔW independent of W0. It has no state."""

    name: str
    paper: str  # its short name and where it was published

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Called while planning. Raises NotMergeable with the reason, or ShapeMismatch."""

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW as a matrix in the layout of the stored base weight; a vector is one column."""


@runtime_checkable
class Spacious(Protocol):
    """A method whose computation needs more memory than a copy or two of its factors."""

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """The most bytes that the method needs in addition to a block of rows; called while planning."""


class TransformingMethod(Protocol):
    """A method that computes the new weight W from W0. It has no state.

    Such a method has no delta: it must be the only one on its tensor, and cannot be scaled.
    """

    name: str
    paper: str  # its short name and where it was published
    forgets: str  # a sentence that says what information about W0 is lost; empty if the method can be unmerged

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Called while planning. Raises NotMergeable with the reason, or ShapeMismatch."""

    def transform(
        self,
        module: AdapterModule,
        weight: torch.Tensor,
        factors: Mapping[str, torch.Tensor],
        dtype: DType,
        *,
        back: bool = False,
    ) -> torch.Tensor:
        """W from W0, in the stored shape, computed in float64 and rounded once to `dtype`.

        With `back`, W0 from W; this is never called if `forgets` is not empty. Raises NotMerged if the inverse would
        divide by zero.
        """
