"""LoKr (KronA, Edalati et al., arXiv 2212.10650; LyCORIS, Yeh et al., arXiv 2309.14859): ΔW = s · w1 ⊗ w2, where each
of w1 and w2 is stored whole or as two factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import AdapterFormatError
from formats.spec import TensorSpec
from surgery.exact.fixed_order import matmul
from surgery.exact.rounding import Delta, Kronecker, RowsOf
from surgery.methods.base import AdditiveMethod
from surgery.methods.loha import cored
from surgery.methods.shapes import PLAIN, check_matrix, factor_shape

if TYPE_CHECKING:
    import torch


class LoKr(AdditiveMethod):
    """ΔW = alpha/rank · kron(w1, w2).

    Factors: lokr_w1 (a, c), or lokr_w1_a (a, rank) and lokr_w1_b (rank, c); lokr_w2 (b, d, *kernel), or lokr_w2_a
    (b, rank) and lokr_w2_b (rank, d · kernel), or lokr_t2 (rank, rank, *kernel), lokr_w2_a (rank, b) and lokr_w2_b
    (rank, d). The weight is (a b, c d, *kernel).
    """

    name = "lokr"
    title = "LoKr"
    paper = "LoKr, arXiv 2212.10650 and 2309.14859"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises AdapterFormatError if factors are missing, ShapeMismatch and NotMergeable as check_matrix."""
        shapes = {role.removeprefix("lokr_"): ref.spec.shape for role, ref in module.factors.items()}
        for role, ref in module.factors.items():
            several = len(ref.spec.shape) > 2 and role in ("lokr_w2", "lokr_t2")
            factor_shape(module, role, len(ref.spec.shape) if several else 2)
        sides = []
        for number in (1, 2):
            whole, pair = f"w{number}" in shapes, f"w{number}_a" in shapes and f"w{number}_b" in shapes
            if whole is pair:
                raise AdapterFormatError(
                    "LoKr's factors are not complete",
                    where=weight.name,
                    expected=f"lokr_w{number}, or lokr_w{number}_a and lokr_w{number}_b",
                    found=", ".join(module.factors),
                )
            if whole:
                sides.append(shapes[f"w{number}"])
            elif number == 2 and "t2" in shapes:
                sides.append((shapes["w2_a"][1], shapes["w2_b"][1], *shapes["t2"][2:]))
            else:
                sides.append((shapes[f"w{number}_a"][0], shapes[f"w{number}_b"][1]))
        (a, c), (b, *d) = sides
        check_matrix(module, weight, a * b, c * math.prod(d), PLAIN)

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """Bytes for w1 and w2 as matrices, and for the products from which they are computed."""
        shapes = {role: ref.spec.shape for role, ref in module.factors.items()}
        a, c = shapes["lokr_w1"] if "lokr_w1" in shapes else (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
        return 5 * 8 * (a * c + weight.size // (a * c))

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · s · kron(w1, w2), whose rows are computed on demand."""
        w1 = factors["lokr_w1"] if "lokr_w1" in factors else matmul(factors["lokr_w1_a"], factors["lokr_w1_b"])
        w1 = w1.double() * (weight * module.scaling)  # (a, c)
        if "lokr_w2" in factors:
            w2 = factors["lokr_w2"].double()
        elif "lokr_t2" in factors:
            core = factors["lokr_t2"]
            w2 = matmul(factors["lokr_w2_a"].mT, cored(core, factors["lokr_w2_b"]))
        else:
            w2 = matmul(factors["lokr_w2_a"], factors["lokr_w2_b"])
        if w2.dim() == 3:  # a one-dimensional convolution: torch.kron aligns w1 with the last two dimensions
            columns = w1.shape[1] * w2[0].numel()
            return RowsOf(columns, lambda begin, end: _aligned_last(w1, w2, begin, end))
        return Kronecker(w1, w2.flatten(1))  # (b, d · kernel)


def _aligned_last(w1: torch.Tensor, w2: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Rows of torch.kron(w1 (a, c), w2 (b, d, kernel)) as peft reshapes it, with b before a and c next to the kernel.
    Such adapters were trained in this form."""
    import torch

    at, a = torch.arange(begin, end), w1.shape[0]
    ours, theirs = w1[at % a], w2[at // a]  # (rows, c), (rows, d, kernel)
    return (ours[:, None, :, None] * theirs[:, :, None, :]).flatten(1)
