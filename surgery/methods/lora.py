"""LoRA (Hu et al., arXiv 2106.09685, equation 3): h = W0 x + (alpha/r) B A x, so W = W0 + (alpha/r) B A.

With rsLoRA (Kalajdzievski, arXiv 2312.03732) the factor is alpha/√r.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import ShapeMismatch
from formats.layers import LayerKind
from formats.spec import TensorSpec, shape_text
from surgery.errors import NotMergeable
from surgery.rounding import ExactProduct, exact_product

if TYPE_CHECKING:
    import torch


class Lora:
    """ΔW = s · B A for a linear weight (out, in); its transpose for a Conv1D (in, out) or an embedding.

    Factors: lora_A (rank, in), lora_B (out, rank).
    """

    name = "lora"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable for a weight not stored as a plain float, ShapeMismatch for one of other shape."""
        a, b = (module.factors[role].spec.shape for role in ("lora_A", "lora_B"))
        _check(weight, (b[0], a[1]) if module.kind is LayerKind.LINEAR else (a[1], b[0]))

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> ExactProduct:
        """weight · s · B A, or (B A)ᵀ = Aᵀ Bᵀ where the base stores the transpose."""
        a, b = factors["lora_A"], factors["lora_B"]  # (rank, in), (out, rank)
        left, right = (b, a) if module.kind is LayerKind.LINEAR else (a.mT, b.mT)
        return exact_product(left, right, weight * module.scaling)


class LoraBias:
    """Δb = s · bias of lora_B, the `lora_bias` option of peft.

    Factors: lora_B.bias (out,).
    """

    name = "lora_bias"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable for a bias that is not stored as a plain float, ShapeMismatch for one of other shape."""
        _check(weight, module.factors["lora_B.bias"].spec.shape)

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> ExactProduct:
        """weight · s · bias as one column."""
        column = factors["lora_B.bias"][:, None]  # (out, 1)
        return exact_product(column, column.new_ones(1, 1), weight * module.scaling)


def _check(weight: TensorSpec, delta: tuple[int, ...]) -> None:
    """Refuses a weight that the delta cannot be added to."""
    if not weight.dtype.is_weight:
        raise NotMergeable(
            "the base stores this weight in a form that nothing can be added to",
            where=weight.name,
            expected="F16, BF16, F32 or F64",
            found=weight.dtype,
            then="merge into the unquantised base, then quantise the result",
        )
    if weight.shape != delta:
        raise ShapeMismatch(
            "the factors do not fit the weight",
            where=weight.name,
            expected=shape_text(weight.shape),
            found=shape_text(delta),
        )
