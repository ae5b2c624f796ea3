"""A difference that is stored whole (LyCORIS's `full`, Yeh et al., arXiv 2309.14859, and its norms): W = W0 + ΔW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.spec import TensorSpec
from surgery.exact.rounding import Delta, RowsOf
from surgery.methods.base import AdditiveMethod
from surgery.methods.lora import check_weight

if TYPE_CHECKING:
    import torch


class Full(AdditiveMethod):
    """ΔW as it is, of a weight or a bias.

    Factors: diff, in the weight's shape.
    """

    name = "full"
    title = "whole difference"
    paper = "a whole difference, LyCORIS, arXiv 2309.14859"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        check_weight(weight, module.factors["diff"].spec.shape)

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · diff; a convolution as (out, in · kernel), a vector as one column."""
        diff = factors["diff"]
        matrix = diff.reshape(diff.shape[0], -1) if diff.dim() > 1 else diff.reshape(-1, 1)
        return RowsOf(matrix.shape[1], lambda begin, end: matrix[begin:end].double() * weight)
