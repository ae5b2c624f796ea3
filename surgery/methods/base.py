"""What a method is to the rest: it checks while planning, and turns factors into a delta while running.

A method gets tensors and never a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from formats.adapter import AdapterModule
from formats.spec import TensorSpec
from surgery.rounding import ExactProduct

if TYPE_CHECKING:
    import torch


class AdapterMethod(Protocol):
    """The mathematics of one way of adapting a weight. Stateless."""

    name: str

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Called while planning. Raises NotMergeable with the reason, or ShapeMismatch."""

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> ExactProduct:
        """weight · ΔW in the base weight's stored orientation, a vector as one column."""
