"""BEFT (peft.tuners.beft; after BitFit, Ben Zaken et al., arXiv 2106.10199): Δb, a change of only the bias."""

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


class Beft(AdditiveMethod):
    """Δb = beft_bias.

    Factors: beft_bias (1, out).
    """

    name = "beft"
    title = "BEFT"
    paper = "BEFT, peft.tuners.beft"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the bias is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        check_weight(weight, (module.factors["beft_bias"].spec.size,))

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · Δb as one column."""
        column = factors["beft_bias"].double().view(-1, 1) * weight  # (out, 1)
        return RowsOf(1, lambda begin, end: column[begin:end].clone())
