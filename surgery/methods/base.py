"""The protocols of methods. A method checks while planning; while running, it turns factors into a delta, or W0 into W.

A method gets tensors and never a path. Inherit from one of the two protocols: what has a value here is a default.
docs/extending.md has a whole method.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from formats.adapter import AdapterModule
from formats.spec import DType, TensorSpec
from surgery.exact.rounding import Delta

if TYPE_CHECKING:
    import torch


@runtime_checkable
class AdditiveMethod(Protocol):
    """The mathematics of one way of adding to a weight: W = W0 + ΔW, ΔW independent of W0. Stateless.

    Attributes:
        name: what dialects call it in `AdapterModule.method`.
        title: what people call it, as its paper spells it.
        paper: its short name and where it was published.
        frozen: factors that its files hold beside what was trained: random projections, norms of the base.
    """

    name: str
    title: str
    paper: str
    frozen: frozenset[str] = frozenset()

    @abstractmethod
    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Called while planning. Raises NotMergeable with the reason, or ShapeMismatch."""

    @abstractmethod
    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW as a matrix in the layout of the stored base weight; a vector is one column."""


@runtime_checkable
class Spacious(Protocol):
    """A method whose computation needs more memory than a copy or two of its factors."""

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """The most bytes that the method needs in addition to a block of rows; called while planning."""


@runtime_checkable
class TransformingMethod(Protocol):
    """A method that computes the new weight W from W0. It has no state.

    Such a method has no delta: it stands alone on its tensor and has no strength.

    Attributes:
        name: what dialects call it in `AdapterModule.method`.
        title: what people call it, as its paper spells it.
        paper: its short name and where it was published.
        frozen: factors that its files hold beside what was trained: random projections, norms of the base.
        forgets: what of W0 its result does not determine, as a sentence; empty if it can be taken off.
    """

    name: str
    title: str
    paper: str
    frozen: frozenset[str] = frozenset()
    forgets: str = ""

    @abstractmethod
    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Called while planning. Raises NotMergeable with the reason, or ShapeMismatch."""

    @abstractmethod
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
