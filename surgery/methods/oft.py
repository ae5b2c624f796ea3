"""OFT (Qiu et al., arXiv 2306.07280; OFTv2, arXiv 2506.19847): W = W0 Rᵀ, where R is block-diagonal and orthogonal.

R is the Cayley transform (I − Q)(I + Q)⁻¹ of a skew Q, or the first terms of its Neumann series, which is only nearly
orthogonal. A constrained Q (COFT) is first projected into a ball.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import ShapeMismatch
from formats.spec import DType, TensorSpec, shape_text
from surgery.errors import NotMergeable
from surgery.exact.fixed_order import definite_inverse, inverse, matmul, multiplier, norms
from surgery.methods.base import TransformingMethod
from surgery.methods.shapes import PLAIN, change_outputs, check_matrix, factor_shape, matrix_shape

if TYPE_CHECKING:
    import torch


INVERSE = 12 * 8  # bytes per element of a matrix while it is inverted by elimination


class Oft(TransformingMethod):
    """W = W0 · blockdiag(R)ᵀ.

    Factors: oft_R.weight (blocks, b (b − 1) / 2), the upper triangles of Q; with block_share one block serves for all.
    Settings: block_share, coft, eps, use_cayley_neumann, num_cayley_neumann_terms.
    """

    name = "oft"
    title = "OFT"
    paper = "OFT, arXiv 2306.07280 and 2506.19847"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises ShapeMismatch if the blocks do not cover the weight's inputs, NotMergeable as check_matrix and for a
        convolution that is not 1 × 1."""
        blocks, elements = factor_shape(module, "oft_R.weight", 2)
        size = _size(elements)
        out, into = matrix_shape(module, weight)
        shared = bool(module.settings["block_share"]) and blocks == 1 and into % size == 0
        if size * (size - 1) // 2 != elements:
            raise ShapeMismatch(
                "the rotations are not the upper triangles of square blocks",
                where=weight.name,
                found=shape_text((blocks, elements)),
            )
        if set(weight.shape[2:]) - {1}:
            raise NotMergeable(
                "peft trains OFT on a convolution by rotating overlapping patches of its input, which no kernel does; "
                "what peft merges there gives other outputs than what it trained",
                where=weight.name,
                found=shape_text(weight.shape),
            )
        check_matrix(module, weight, out, into if shared else blocks * size, PLAIN)

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """Bytes for the rotations and the computation of their inverses."""
        blocks, elements = factor_shape(module, "oft_R.weight", 2)
        return INVERSE * blocks * _size(elements) ** 2

    def transform(
        self,
        module: AdapterModule,
        weight: torch.Tensor,
        factors: Mapping[str, torch.Tensor],
        dtype: DType,
        *,
        back: bool = False,
    ) -> torch.Tensor:
        """W0 blockdiag(R)ᵀ, or W blockdiag(R)⁻ᵀ."""
        rotations = _rotations(module.settings, factors["oft_R.weight"].double())  # (blocks, b, b)
        turn = (inverse(rotations) if back else rotations).mT
        size = turn.shape[-1]
        turned = multiplier(turn)

        def rotated(rows: torch.Tensor, _: int, __: int) -> torch.Tensor:
            blocks = rows.reshape(len(rows), -1, size).transpose(0, 1)  # (blocks, rows, b)
            return turned(blocks).transpose(0, 1).flatten(1)

        return change_outputs(module, weight, dtype, rotated)


def _size(elements: int) -> int:
    """The size of a square matrix with this many elements above the diagonal."""
    return (1 + math.isqrt(1 + 8 * elements)) // 2


def _rotations(settings: Mapping[str, object], triangles: torch.Tensor) -> torch.Tensor:
    """R of each block.  # (blocks, b, b) float64"""
    import torch

    size = _size(triangles.shape[1])
    above = torch.triu_indices(size, size, 1)
    skew = torch.zeros(triangles.shape[0], size, size, dtype=torch.float64)
    skew[:, above[0], above[1]] = triangles
    skew = skew - skew.mT
    if settings["coft"]:
        limit = float(str(settings["eps"])) / math.sqrt(skew.shape[0])
        length = norms(skew.flatten(1))[:, None, None]
        skew = torch.where(length <= limit, skew, limit * skew / length)
    if not settings["use_cayley_neumann"]:
        return cayley(skew)
    terms = int(str(settings["num_cayley_neumann_terms"]))
    total = torch.eye(size, dtype=torch.float64).expand(skew.shape)
    if terms > 1:
        total = total + 2 * skew
    if terms > 2:
        last = max(terms - 1, 3)  # peft's shortest series of more than two terms ends with the cube
        power = skew
        for exponent in range(2, last + 1):
            power = matmul(power, skew)
            total = total + (power if exponent == last else 2 * power)
    return total


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """(I − Q)(I + Q)⁻¹ of skew-symmetric Q (…, n, n).  # float64"""
    import torch

    eye = torch.eye(skew.shape[-1], dtype=torch.float64)
    return matmul(eye - skew, definite_inverse(eye + skew))
