"""Products whose bits depend only on their factors, and rounding exactly once.

The result of a floating-point sum depends on its order, and the order depends on threads, block sizes and libraries. So
the factors are first rounded to fixed point, relative to the maximum of each row of the left factor and each column of
the right one. The number of bits b is chosen so that a sum of products fits float64's 53 bits: 2 b + log2(terms) ≤ 53,
which gives 24 bits up to 32 terms and 22 bits up to 512. Every partial sum is then exact, so the order cannot matter.
Longer sums are taken in chunks of 512 terms, which are added in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from formats.spec import DType
from formats.tensors import torch_dtype

if TYPE_CHECKING:
    import torch

EXACT_TERMS = 512  # the most terms in one exact sum
# Low bits of a float32 that are zero if it is a tie between two values of the narrower type (or is one of its values).
_TIE_BITS = {DType.BF16: 0x7FFF, DType.F16: 0x0FFF, DType.F8_E4M3: 0x7FFFF, DType.F8_E5M2: 0xFFFFF}
_E4M3_LIMIT = 464.0  # halfway from its largest value, 448, to where the next would be; a tie goes to 448
_LEAST_EXPONENT = -900  # of a row or column in fixed point; smaller ones keep fewer bits, so both factors stay in range
_BLOCK_ELEMENTS = 1 << 17  # float64 elements of one block: 1 MiB, so that it stays in cache


class Delta(Protocol):
    """A change of a weight, seen as a matrix, in float64. It is computed by blocks of rows, and its bits do not depend
    on the blocks."""

    @property
    def columns(self) -> int:
        """Columns of the matrix, as which a weight with more dimensions is reshaped."""

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows begin to end.  # (end - begin, columns) float64; the caller may overwrite them"""


@dataclass(frozen=True)
class ExactProduct:
    """scale · left @ right, by blocks of rows, with bits that do not depend on the order of summation.

    Attributes:
        left: (rows, terms) float64; the values of a row are integers with few bits, times one power of two.
        right: (terms, columns) float64; the same for each column.
        scale: factor of the sum, in float64.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    @property
    def columns(self) -> int:
        """Columns of the product."""
        return self.right.shape[1]

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows begin to end of the product.  # (end - begin, columns) float64"""
        terms = self.left.shape[1]
        total = self.left[begin:end, :EXACT_TERMS] @ self.right[:EXACT_TERMS]  # (end - begin, columns)
        for first in range(EXACT_TERMS, terms, EXACT_TERMS):
            chunk = slice(first, first + EXACT_TERMS)
            total += self.left[begin:end, chunk] @ self.right[chunk]
        return total if self.scale == 1.0 else total.mul_(self.scale)

    def on(self, device: torch.device) -> ExactProduct:
        """The same product with its factors on another device."""
        return replace(self, left=self.left.to(device), right=self.right.to(device))


@dataclass(frozen=True)
class StackedProducts:
    """Products of one shape, stacked by rows: the experts of one tensor."""

    products: tuple[ExactProduct, ...]

    @property
    def columns(self) -> int:
        """Columns of every product."""
        return self.products[0].columns

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows begin to end of the stack.  # (end - begin, columns) float64"""
        import torch

        height = self.products[0].left.shape[0]
        parts = [
            self.products[index].rows(max(begin - index * height, 0), min(end - index * height, height))
            for index in range(begin // height, (end - 1) // height + 1)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class Hadamard:
    """Two products of one shape, multiplied element by element."""

    first: ExactProduct
    second: ExactProduct

    @property
    def columns(self) -> int:
        """Columns of either product."""
        return self.first.columns

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows begin to end.  # (end - begin, columns) float64"""
        return self.first.rows(begin, end).mul_(self.second.rows(begin, end))


@dataclass(frozen=True)
class Kronecker:
    """first ⊗ second.

    Attributes:
        first: (a, c) float64.
        second: (b, d) float64.
    """

    first: torch.Tensor
    second: torch.Tensor

    @property
    def columns(self) -> int:
        """c · d."""
        return self.first.shape[1] * self.second.shape[1]

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows begin to end of the product (a b, c d).  # (end - begin, columns) float64"""
        import torch

        at, height = torch.arange(begin, end), self.second.shape[0]
        return (self.first[at // height][:, :, None] * self.second[at % height][:, None, :]).flatten(1)


@dataclass(frozen=True)
class RowsOf:
    """A delta given by a function of begin and end that computes its rows element by element, without sums."""

    columns: int
    of: Callable[[int, int], torch.Tensor]

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows begin to end.  # (end - begin, columns) float64"""
        return self.of(begin, end)


def exact_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> ExactProduct:
    """Prepares scale · left @ right.

    Args:
        left: (rows, terms), any floating dtype.
        right: (terms, columns), any floating dtype.
        scale: float64 factor of the whole product.
    """
    bits = fixed_point_bits(left.shape[1])
    return ExactProduct(fixed_point(left, 1, bits), fixed_point(right, 0, bits), scale)


def fixed_point_bits(terms: int) -> int:
    """The most bits that each factor may have for a sum of this many products to be exact in float64."""
    return (53 - math.ceil(math.log2(min(max(terms, 1), EXACT_TERMS)))) // 2


def fixed_point(factor: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """The factor with every row or column along `dim` rounded to `bits` bits relative to its maximum.  # float64"""
    import torch

    factor = factor.to(torch.float64)
    largest = factor.abs().amax(dim=dim, keepdim=True)
    _, exponent = torch.frexp(largest)  # largest = m · 2^exponent, 0.5 ≤ m < 1; 0 for a line of zeros
    unit = torch.ldexp(torch.ones_like(largest), exponent.clamp(min=_LEAST_EXPONENT) - bits)  # exact, as its inverse
    return (factor * unit.reciprocal()).round_().mul_(unit)  # by powers of two: four times as fast as torch.ldexp


def lengthen(matrix: torch.Tensor, delta: Delta, lengths: torch.Tensor, result: torch.Tensor, dtype: DType) -> None:
    """Scales the rows of matrix + delta to the given norms, in float64, and rounds once to `dtype`.

    Args:
        matrix: (rows, columns), any floating dtype and strides.
        delta: a delta of the same size.
        lengths: (rows,), any floating dtype: the norms.
        result: (rows, columns), any strides, written to; NaN in rows that are all zeros.
        dtype: dtype of the result.
    """
    for begin, end in blocks(matrix):
        block = delta.rows(begin, end)
        block += matrix[begin:end].to(block.dtype)
        block *= (lengths[begin:end].to(block.dtype) / row_norms(block))[:, None]
        result[begin:end] = round_once(block, dtype)


def change_rows(
    matrix: torch.Tensor,
    result: torch.Tensor,
    change: Callable[[torch.Tensor, int, int], torch.Tensor],
    dtype: DType,
) -> None:
    """Applies `change` to every row of the matrix and rounds once to `dtype`.

    Args:
        matrix: (rows, columns), any floating dtype and strides.
        result: a tensor of the same size, any strides, written to.
        change: maps rows begin to end in float64 to their new values, each row on its own.
        dtype: dtype of the result.
    """
    import torch

    for begin, end in blocks(matrix):
        result[begin:end] = round_once(change(matrix[begin:end].to(torch.float64), begin, end).contiguous(), dtype)


def blocks(matrix: torch.Tensor, elements: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of rows that fit in the cache."""
    rows, columns = matrix.shape
    step = max(1, (elements or _BLOCK_ELEMENTS) // max(1, columns))
    for begin in range(0, rows, step):
        yield begin, min(rows, begin + step)


def sum_of(deltas: Sequence[Delta], begin: int, end: int) -> torch.Tensor:
    """Rows begin to end of Σ deltas, added in the order given.  # (end - begin, columns) float64"""
    block = deltas[0].rows(begin, end)
    for delta in deltas[1:]:
        block += delta.rows(begin, end)
    return block


def row_norms(block: torch.Tensor) -> torch.Tensor:
    """‖row‖ of each row. Squares are added in pairs, in a fixed order: the order of torch's own sums depends on shape,
    threads and the machine's vector width.  # (rows,) float64"""
    squares = block.square()  # (rows, columns)
    count = squares.shape[1]
    while count > 1:
        half = (count + 1) // 2
        squares[:, : count - half] += squares[:, half:count]
        count = half
    return squares[:, 0].sqrt()


def round_once(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Rounds float64 to the nearest value of `dtype`, ties to even, in a single rounding.

    torch converts float64 to 16-bit and 8-bit types through float32. That rounds twice, and misses the nearest value if
    the float32 value is a tie of the target type. These few values are rounded to odd in float32 instead (24 bits, at
    least two more than the target), so that only the second rounding counts (Boldo and Melquiond,
    doi:10.1109/TC.2007.70819).
    """
    import torch

    if dtype not in _TIE_BITS:
        return values.to(torch_dtype(dtype))
    nearest = values.to("cpu", torch.float32)
    bits = nearest.numpy().reshape(-1).view(np.int32)
    ties = np.flatnonzero((bits & _TIE_BITS[dtype]) == 0)
    if len(ties):
        at = nearest.numpy().reshape(-1)[ties]
        with np.errstate(invalid="ignore"):
            error = (
                values.cpu().numpy().reshape(-1)[ties] - at
            )  # its sign shows on which side of the value `nearest` is
        away = ((error < 0) == (at > 0)).astype(np.int32)  # 1 where rounded away from zero
        bits[ties] = np.where((error != 0) & np.isfinite(error), (bits[ties] - away) | 1, bits[ties])
    if dtype is DType.F8_E4M3:  # it has no Inf; beyond its range, torch versions differ: the largest value, or NaN
        nearest[nearest.abs() > _E4M3_LIMIT] = math.nan
    return nearest.to(torch_dtype(dtype)).to(values.device)
