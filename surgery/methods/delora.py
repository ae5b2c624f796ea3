"""DeLoRA (Bini et al., arXiv 2503.18225): ΔW = λ/r · B Ξ A ∘ ‖W0‖, where Ξ holds the inverse norms of B's columns and
A's rows. The norms of W0's columns are those at training time and are stored in the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.layers import LayerKind
from formats.spec import TensorSpec
from surgery.exact.fixed_order import norms
from surgery.exact.rounding import Delta, exact_product
from surgery.methods.base import AdditiveMethod
from surgery.methods.shapes import check_factor, check_matrix, factor_shape

if TYPE_CHECKING:
    import torch

_SHORTEST = 1e-4  # peft's lower bound of a norm


class DeLora(AdditiveMethod):
    """ΔW = B diag(λ / (r ‖a‖ ‖b‖)) A diag(w_norm).

    Factors: delora_A (rank, in), delora_B (out, rank), delora_lambda (1,), delora_w_norm (in,).
    """

    name = "delora"
    title = "DeLoRA"
    frozen = frozenset({"delora_w_norm"})
    paper = "DeLoRA, arXiv 2503.18225"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        (rank, into), (out, _) = factor_shape(module, "delora_A", 2), factor_shape(module, "delora_B", 2)
        check_factor(module, "delora_B", out, rank)
        check_factor(module, "delora_lambda", 1)
        check_factor(module, "delora_w_norm", into)
        check_matrix(module, weight, out, into, (LayerKind.LINEAR,))

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW."""
        a, b = factors["delora_A"].double(), factors["delora_B"].double()  # (rank, in), (out, rank)
        lengths = norms(a).clamp(min=_SHORTEST) * norms(b.mT).clamp(min=_SHORTEST)  # (rank,)
        scale = factors["delora_lambda"].double() / a.shape[0] / lengths
        return exact_product(b, scale[:, None] * a * factors["delora_w_norm"].double(), weight)
