"""RowLoRA, a method: ΔW = s · diag(d) B A, a LoRA whose rows are scaled. s = alpha / rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.spec import TensorSpec
from surgery.exact.rounding import Delta, exact_product
from surgery.methods.base import AdditiveMethod
from surgery.methods.lora import outward
from surgery.methods.shapes import check_factor, check_matrix, factor_shape

if TYPE_CHECKING:
    import torch


class RowLora(AdditiveMethod):
    """Factors: lora_A (rank, in), lora_B (out, rank), row_d (out,)."""

    name = "row_lora"
    title = "RowLoRA"
    paper = "RowLoRA, docs/extending.md"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Called while planning. Raises NotMergeable or ShapeMismatch for what does not fit."""
        rank, into = factor_shape(module, "lora_A", 2)
        out, _ = factor_shape(module, "lora_B", 2)
        check_factor(module, "lora_B", out, rank)
        check_factor(module, "row_d", out)
        check_matrix(module, weight, out, into)

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW as the base stores it: (out, in), or the transpose for a Conv1D or an embedding."""
        rows = factors["row_d"].double()[:, None] * factors["lora_B"].double()  # (out, rank)
        left, right = outward(module.kind, factors["lora_A"], rows)
        return exact_product(left, right, weight * module.scaling)


ROW_LORA = RowLora()
