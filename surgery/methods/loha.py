"""LoHa (FedPara; Hyeon-Woo et al., arXiv 2108.06098, proposition 1): ΔW = s · (W1a W1b) ∘ (W2a W2b).

A convolution in the effective form (proposition 3) has a core between its two factors: T ×₁ Wa ×₂ Wb.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import AdapterFormatError
from formats.spec import TensorSpec
from surgery.exact.fixed_order import matmul
from surgery.exact.rounding import Delta, ExactProduct, Hadamard, exact_product
from surgery.methods.base import AdditiveMethod
from surgery.methods.shapes import PLAIN, check_factor, check_matrix, factor_shape

if TYPE_CHECKING:
    import torch


class LoHa(AdditiveMethod):
    """ΔW = alpha/rank · (w1_a w1_b) ∘ (w2_a w2_b).

    Factors: hada_w1_a, hada_w2_a (out, rank) and hada_w1_b, hada_w2_b (rank, in · kernel). With cores hada_t1, hada_t2
    (rank, rank, *kernel), the shapes are w1_a, w2_a (rank, out) and w1_b, w2_b (rank, in).
    """

    name = "loha"
    title = "LoHa"
    paper = "LoHa (FedPara), arXiv 2108.06098"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises AdapterFormatError if one of the two cores is missing, ShapeMismatch and NotMergeable as
        check_matrix."""
        cores = [role in module.factors for role in ("hada_t1", "hada_t2")]
        if cores[0] is not cores[1]:
            raise AdapterFormatError("one of two cores is missing", where=weight.name, expected="hada_t1 and hada_t2")
        a, b = (factor_shape(module, f"hada_w1_{side}", 2) for side in "ab")
        kernel = 1
        if cores[0]:
            a, core = a[::-1], module.factors["hada_t1"].spec.shape
            kernel = module.factors["hada_t1"].spec.size // (a[1] * a[1])
            check_factor(module, "hada_t1", a[1], a[1], *core[2:])
            check_factor(module, "hada_t2", *core)
        check_factor(module, "hada_w1_b", a[1], b[1])
        check_factor(module, "hada_w2_a", *module.factors["hada_w1_a"].spec.shape)
        check_factor(module, "hada_w2_b", *b)
        check_matrix(module, weight, a[0], b[1] * kernel, PLAIN)

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · s · the elementwise product of both products."""
        return Hadamard(_product(factors, 1, weight * module.scaling), _product(factors, 2, 1.0))


def _product(factors: Mapping[str, torch.Tensor], number: int, scale: float) -> ExactProduct:
    a, b = (factors[f"hada_w{number}_{side}"] for side in "ab")
    core = factors.get(f"hada_t{number}")
    return exact_product(a, b, scale) if core is None else exact_product(a.mT, cored(core, b), scale)


def cored(core: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The core times the second factor: Σ_j core[i, j, *kernel] b[j, in].

    Args:
        core: (rank, rank, *kernel).
        b: (rank, in).

    Returns:
        (rank, in · kernel) float64.
    """
    rank = core.shape[0]
    product = matmul(core.reshape(rank, rank, -1).mT, b)  # (rank, kernel, in)
    return product.mT.reshape(rank, -1)
