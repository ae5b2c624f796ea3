"""BOFT (Liu et al., arXiv 2311.06243): W = s ∘ (W0 Rᵀ), where R is a product of butterfly factors.

Each factor is a block-diagonal rotation (the Cayley transform of a skew matrix) between a permutation and its inverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import ShapeMismatch
from formats.spec import DType, TensorSpec
from surgery.errors import NotMerged
from surgery.exact.fixed_order import inverse, multiplier
from surgery.methods.base import TransformingMethod
from surgery.methods.oft import INVERSE, cayley
from surgery.methods.shapes import PLAIN, change_outputs, check_matrix

if TYPE_CHECKING:
    import torch


class Boft(TransformingMethod):
    """W = s ∘ W0 B₁ᵀ B₂ᵀ …, Bᵢ = Pᵢ blockdiag(Rᵢ) Pᵢᵀ.

    Factors: boft_R (factors, blocks, b, b), boft_s (out, 1); for a convolution (1, out).
    """

    name = "boft"
    title = "BOFT"
    paper = "BOFT, arXiv 2311.06243"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises ShapeMismatch if the blocks do not cover the weight's inputs, NotMergeable as check_matrix."""
        shape = module.factors["boft_R"].spec.shape
        if len(shape) != 4 or shape[2] != shape[3]:
            raise ShapeMismatch("the rotations are not square blocks", where=weight.name, found=shape)
        check_matrix(module, weight, module.factors["boft_s"].spec.size, shape[1] * shape[2], PLAIN)

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """Bytes for the rotations and the computation of their inverses."""
        return INVERSE * module.factors["boft_R"].spec.size

    def transform(
        self,
        module: AdapterModule,
        weight: torch.Tensor,
        factors: Mapping[str, torch.Tensor],
        dtype: DType,
        *,
        back: bool = False,
    ) -> torch.Tensor:
        """s ∘ W0 Rᵀ, or (W / s) R⁻ᵀ; the latter raises NotMerged if s has a zero."""
        import torch

        blocks = factors["boft_R"].double()
        scale = factors["boft_s"].double().flatten()
        count, number, size, _ = blocks.shape
        if back and not scale.all():
            raise NotMerged(
                "BOFT multiplied by zero here: nothing is left to divide",
                where=module.target,
                then="go back to the base itself",
            )
        rotations = cayley(0.5 * (blocks - blocks.mT))
        turns = [multiplier((inverse(each) if back else each).mT) for each in rotations]  # (blocks, b, b) each
        orders = [butterfly(number * size, number >> level, size // 2, count - 1) for level in range(count)]
        steps = list(zip(orders, turns, strict=True))

        def rotated(rows: torch.Tensor, begin: int, end: int) -> torch.Tensor:
            if back:
                rows = rows / scale[begin:end, None]
            for order, turn in reversed(steps) if back else steps:
                placed = torch.empty_like(rows)
                placed[:, order] = rows
                split = placed.reshape(len(placed), -1, size).transpose(0, 1)  # (blocks, rows, b)
                rows = turn(split).transpose(0, 1).flatten(1)[:, order]
            return rows if back else rows * scale[begin:end, None]

        return change_outputs(module, weight, dtype, rotated)


def butterfly(width: int, groups: int, half: int, factors: int) -> torch.Tensor:
    """The order of the inputs at one level of a butterfly, as in peft: in each group, the even runs of `half` inputs
    come before the odd ones. `factors` is the number of butterfly factors after the first.  # (width,)"""
    import torch

    places = torch.arange(width)
    if factors == 0:
        return places
    runs = places.view(groups, -1, half)  # (groups, runs, half)
    return torch.cat([runs[:, ::2], runs[:, 1::2]], 1).flatten()
