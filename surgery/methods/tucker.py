"""LoCon with a core (LyCORIS, Yeh et al., arXiv 2309.14859, section 3): a convolution's ΔW = s · B (T ×₂ Aᵀ).

A and B are 1 × 1 convolutions, and the core T between them has the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.spec import TensorSpec
from surgery.exact.rounding import Delta, exact_product
from surgery.methods.base import AdditiveMethod
from surgery.methods.loha import cored
from surgery.methods.lora import check_weight

if TYPE_CHECKING:
    import torch


class TuckerLora(AdditiveMethod):
    """ΔW = s · Σ B[out, i] T[i, j, *kernel] A[j, in], s = alpha / rank.

    Factors: lora_A (rank, in, 1, …), lora_mid (rank, rank, *kernel), lora_B (out, rank, 1, …).
    """

    name = "lora_tucker"
    title = "LoCon"
    paper = "LoCon with a core, LyCORIS, arXiv 2309.14859"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        a, b, mid = (module.factors[role].spec.shape for role in ("lora_A", "lora_B", "lora_mid"))
        check_weight(weight, (b[0], a[1], *mid[2:]))

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """Bytes for the core times A, and for its product with B in fixed point."""
        sizes = [ref.spec.size for ref in module.factors.values()]
        return 16 * sum(sizes) + 5 * 8 * module.rank * (weight.size // weight.shape[0])

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW as (out, in · kernel)."""
        inner = cored(factors["lora_mid"], factors["lora_A"].flatten(1))  # (rank, in · kernel)
        return exact_product(factors["lora_B"].flatten(1), inner, weight * module.scaling)
