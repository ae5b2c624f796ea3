"""Factors looked up in values that all layers share: VB-LoRA and Uni-LoRA.

VB-LoRA (Li et al., arXiv 2405.15179) makes every sub-vector of A and B a mixture of the k vectors of a bank with the
largest logits. Uni-LoRA (Li et al., arXiv 2506.00799) takes every element from one vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import AdapterFormatError, ShapeMismatch
from formats.spec import TensorSpec
from surgery.exact.rounding import Delta, exact_product
from surgery.methods.base import AdditiveMethod
from surgery.methods.lora import outward
from surgery.methods.shapes import check_factor, check_matrix, factor_shape

if TYPE_CHECKING:
    import torch


class VbLora(AdditiveMethod):
    """ΔW = B A of vectors from the bank.

    Factors: vblora_logits_A (rank, in / length, vectors), vblora_logits_B (out / length, rank, vectors),
    vblora_vector_bank (vectors, length). Instead of logits there may be _topk_indices (…, k) and _topk_weights
    (…, k - 1), where the last weight is 1 minus the others. Settings: topk.
    """

    name = "vblora"
    title = "VB-LoRA"
    paper = "VB-LoRA, arXiv 2405.15179"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises AdapterFormatError if factors are missing, ShapeMismatch and NotMergeable as check_matrix."""
        sides = []
        for role in ("vblora_logits_A", "vblora_logits_B"):
            if role not in module.factors and not {f"{role}_topk_indices", f"{role}_topk_weights"} <= set(
                module.factors
            ):
                raise AdapterFormatError(
                    "VB-LoRA's factors are not complete",
                    where=weight.name,
                    expected=f"{role}, or {role}_topk_indices and {role}_topk_weights",
                    found=", ".join(module.factors),
                )
            if role not in module.factors:
                height, width, count = factor_shape(module, f"{role}_topk_indices", 3)
                check_factor(module, f"{role}_topk_weights", height, width, count - 1)
            sides.append(factor_shape(module, role if role in module.factors else f"{role}_topk_indices", 3))
        length = factor_shape(module, "vblora_vector_bank", 2)[1]
        check_matrix(module, weight, sides[1][0] * length, sides[0][1] * length)

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · B A."""
        bank, count = factors["vblora_vector_bank"].double(), int(module.settings["topk"])
        a = _mixed(factors, "vblora_logits_A", bank, count).flatten(1)  # (rank, in)
        b = _mixed(factors, "vblora_logits_B", bank, count).mT.flatten(0, 1)  # (out, rank)
        return exact_product(*outward(module.kind, a, b), weight)


class UniLora(AdditiveMethod):
    """ΔW = B A, A = θ[indices_A] ∘ scales_A and B likewise.

    Factors: unilora_indices_A (rank, in), unilora_indices_B (out, rank), unilora_scales_A and _B of the same shapes,
    unilora_theta_d (values,).
    """

    name = "unilora"
    title = "Uni-LoRA"
    paper = "Uni-LoRA, arXiv 2506.00799"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        a, b = (factor_shape(module, f"unilora_indices_{side}", 2) for side in "AB")
        factor_shape(module, "unilora_theta_d", 1)
        check_factor(module, "unilora_indices_B", b[0], a[0])
        check_factor(module, "unilora_scales_A", *a)
        check_factor(module, "unilora_scales_B", *b)
        check_matrix(module, weight, b[0], a[1])

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · B A."""
        theta = factors["unilora_theta_d"].double()
        highest = max(int(factors[f"unilora_indices_{side}"].max()) for side in "AB")
        if highest >= len(theta):
            raise ShapeMismatch(
                "an index lies outside the shared vector",
                where=module.target,
                expected=f"below {len(theta)}",
                found=highest,
            )
        a, b = (
            theta[factors[f"unilora_indices_{side}"].long()] * factors[f"unilora_scales_{side}"].double()
            for side in "AB"
        )
        return exact_product(*outward(module.kind, a, b), weight)


def _mixed(factors: Mapping[str, torch.Tensor], role: str, bank: torch.Tensor, count: int) -> torch.Tensor:
    """The mixtures of k vectors each, added in a fixed order.  # (…, length) float64"""
    if role in factors:
        logits, indices = factors[role].double().topk(count, dim=-1)
        parts = list((logits - logits[..., :1]).exp().unbind(-1))
        total = sum(parts[1:], parts[0])
        weights = [part / total for part in parts]
    else:
        indices = factors[f"{role}_topk_indices"].long()
        weights = list(factors[f"{role}_topk_weights"].double().unbind(-1))
        weights.append(1 - sum(weights[1:], weights[0]) if weights else (indices[..., 0] * 0 + 1).double())
    mixture = weights[0][..., None] * bank[indices[..., 0]]
    for number in range(1, len(weights)):
        mixture = mixture + weights[number][..., None] * bank[indices[..., number]]
    return mixture
