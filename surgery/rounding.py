"""A product whose bits depend on nothing but its factors, and rounding once.

Floating-point sums depend on their order, and the order on threads, block sizes and libraries. Here the factors are
first brought to fixed point against the maximum of each row of the left and each column of the right one: to as many
bits b as let a sum of products fit float64's 53, which is 2 b + log2(terms): 24 bits up to 32 terms, 22 up to 512.
Every partial sum is then exact, so order cannot matter. Longer sums are taken in chunks of 512, added in a fixed
order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from formats.spec import DType
from formats.tensors import torch_dtype

if TYPE_CHECKING:
    import torch

EXACT_TERMS = 512  # of one exact sum
# Low bits of a float32 that are zero wherever it lies on a tie of the narrower type (and where it is representable).
_TIE_BITS = {DType.BF16: 0x7FFF, DType.F16: 0x0FFF}
_BLOCK_ELEMENTS = 1 << 17  # float64 elements of one block: 1 MiB, so that it stays in cache


@dataclass(frozen=True)
class ExactProduct:
    """scale · left @ right, by blocks of rows, with bits that no order of summation can change.

    Attributes:
        left: (rows, terms) float64; a row's values are integers of few bits times one power of two.
        right: (terms, columns) float64; likewise for each column.
        scale: the factor applied to the sum, in float64.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows begin to end of the product.  # (end - begin, columns) float64"""
        terms = self.left.shape[1]
        total = self.left[begin:end, :EXACT_TERMS] @ self.right[:EXACT_TERMS]  # (end - begin, columns)
        for first in range(EXACT_TERMS, terms, EXACT_TERMS):
            chunk = slice(first, first + EXACT_TERMS)
            total += self.left[begin:end, chunk] @ self.right[chunk]
        return total if self.scale == 1.0 else total.mul_(self.scale)


def exact_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> ExactProduct:
    """Prepares scale · left @ right.

    Args:
        left: (rows, terms), any floating dtype.
        right: (terms, columns), any floating dtype.
        scale: float64 factor of the whole product.
    """
    bits = fixed_point_bits(left.shape[1])
    return ExactProduct(_fixed_point(left, 1, bits), _fixed_point(right, 0, bits), scale)


def fixed_point_bits(terms: int) -> int:
    """The most bits that two factors may have so that a sum of this many products is exact in float64."""
    return (53 - math.ceil(math.log2(min(max(terms, 1), EXACT_TERMS)))) // 2


def _fixed_point(factor: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """The factor with every line along `dim` rounded to `bits` bits against the line's maximum.  # float64"""
    import torch

    factor = factor.to(torch.float64)
    largest = factor.abs().amax(dim=dim, keepdim=True)
    _, exponent = torch.frexp(largest)  # largest = m · 2^exponent, 0.5 ≤ m < 1; 0 for a line of zeros
    integers = torch.ldexp(factor, bits - exponent).round_()
    return torch.ldexp(integers, exponent - bits)


def add_rounded(weight: torch.Tensor, deltas: Sequence[ExactProduct], dtype: DType) -> torch.Tensor:
    """weight + Σ deltas, summed in float64 in the order given, rounded once to `dtype`.

    Args:
        weight: (rows, columns), any floating dtype.
        deltas: products of the weight's shape.
        dtype: of the result.

    Returns:
        A new tensor of the weight's shape.
    """
    import torch

    rows, columns = weight.shape
    result = torch.empty(rows, columns, dtype=torch_dtype(dtype))
    step = max(1, _BLOCK_ELEMENTS // max(1, columns))
    for begin in range(0, rows, step):
        end = min(rows, begin + step)
        block = deltas[0].rows(begin, end)  # (end - begin, columns) float64
        for delta in deltas[1:]:
            block += delta.rows(begin, end)
        block += weight[begin:end].to(torch.float64)  # twice as fast as adding across dtypes
        result[begin:end] = round_once(block, dtype)
    return result


def round_once(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Rounds float64 to the nearest value of `dtype`, ties to even, in a single rounding.

    torch converts float64 to the 16-bit types by way of float32, which rounds twice and misses the nearest value
    where the float32 lies on a tie of the target. Those few are rounded to odd in float32 instead (24 bits, at
    least two more than the target), which makes the second rounding the only one that counts (Boldo and Melquiond,
    doi:10.1109/TC.2007.70819).
    """
    import torch

    if dtype not in _TIE_BITS:
        return values.to(torch_dtype(dtype))
    nearest = values.to(torch.float32)
    bits = nearest.numpy().view(np.int32)
    ties = np.nonzero((bits & _TIE_BITS[dtype]) == 0)  # numpy finds them five times as fast as torch
    at = nearest.numpy()[ties]
    with np.errstate(invalid="ignore"):
        error = values.numpy()[ties] - at  # float64; its sign tells on which side of the value `nearest` lies
    away = ((error < 0) == (at > 0)).astype(np.int32)  # 1 where rounded away from zero
    bits[ties] = np.where((error != 0) & np.isfinite(error), (bits[ties] - away) | 1, bits[ties])
    return nearest.to(torch_dtype(dtype))
