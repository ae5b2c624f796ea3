"""AdaLoRA (Zhang et al., arXiv 2303.10512, equation 3): ΔW = s · P Λ Q, with one singular value per rank.

peft scales by alpha / (initial rank + 1e-5), whatever rank AdaLoRA's budget left.
"""

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


class AdaLora(AdditiveMethod):
    """ΔW = alpha / (init_r + 1e-5) · B (A ∘ E).

    Factors: lora_A (rank, in), lora_B (out, rank), lora_E (rank, 1). For a convolution, A's inputs include the kernel.
    Settings: init_r.
    """

    name = "adalora"
    title = "AdaLoRA"
    paper = "AdaLoRA, arXiv 2303.10512"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        (rank, into), (out, _) = factor_shape(module, "lora_A", 2), factor_shape(module, "lora_B", 2)
        check_factor(module, "lora_B", out, rank)
        check_factor(module, "lora_E", rank, 1)
        check_matrix(module, weight, out, into)

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · s · B (A ∘ E), in the base's layout."""
        initial = float(module.settings["init_r"])
        scaling = (module.alpha if module.alpha > 0 else initial) / (initial + 1e-5)
        a = factors["lora_A"].double() * factors["lora_E"].double()  # (rank, in)
        left, right = outward(module.kind, a, factors["lora_B"])
        return exact_product(left, right, weight * scaling)
