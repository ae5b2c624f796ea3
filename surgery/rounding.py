"""A product whose bits depend on nothing but its factors, and rounding once.

Floating-point sums depend on their order, and the order on threads, block sizes and libraries. Here the factors are
first brought to fixed point against the maximum of each row of the left and each column of the right one: to as many
bits b as let a sum of products fit float64's 53, which is 2 b + log2(terms): 24 bits up to 32 terms, 22 up to 512.
Every partial sum is then exact, so order cannot matter. Longer sums are taken in chunks of 512, added in a fixed
order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from formats.spec import DType
from formats.tensors import torch_dtype
from surgery.certain import CertainSum

if TYPE_CHECKING:
    import torch

EXACT_TERMS = 512  # of one exact sum
# Low bits of a float32 that are zero wherever it lies on a tie of the narrower type (and where it is representable).
_TIE_BITS = {DType.BF16: 0x7FFF, DType.F16: 0x0FFF}
_SETTLED = 1 << 15  # elements that are computed one by one, at a time
_LEAST_EXPONENT = -900  # of a line in fixed point; a shorter one has fewer bits, and both factors stay in range
_BLOCK_ELEMENTS = 1 << 17  # float64 elements of one block: 1 MiB, so that it stays in cache


class Delta(Protocol):
    """What is added to a weight seen as a matrix: float64, by blocks of rows, the same whatever the blocks."""

    @property
    def columns(self) -> int:
        """Columns of the matrix; they tell how a weight of more dimensions is to be seen as one."""

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows begin to end.  # (end - begin, columns) float64, the caller's to overwrite"""


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
        """The same product, computed there."""
        return replace(self, left=self.left.to(device), right=self.right.to(device))


@dataclass(frozen=True)
class StackedProducts:
    """Products of one shape, each below the last: the experts of one tensor."""

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
class RowsOf:
    """A delta given by a function of begin and end that computes its rows element by element, in no order."""

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
    """The most bits that two factors may have so that a sum of this many products is exact in float64."""
    return (53 - math.ceil(math.log2(min(max(terms, 1), EXACT_TERMS)))) // 2


def fixed_point(factor: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """The factor with every line along `dim` rounded to `bits` bits against the line's maximum.  # float64"""
    import torch

    factor = factor.to(torch.float64)
    largest = factor.abs().amax(dim=dim, keepdim=True)
    _, exponent = torch.frexp(largest)  # largest = m · 2^exponent, 0.5 ≤ m < 1; 0 for a line of zeros
    unit = torch.ldexp(torch.ones_like(largest), exponent.clamp(min=_LEAST_EXPONENT) - bits)  # exact, as its inverse
    return (factor * unit.reciprocal()).round_().mul_(unit)  # by powers of two: four times as fast as torch.ldexp


def add_rounded(weight: torch.Tensor, deltas: Sequence[Delta], dtype: DType) -> torch.Tensor:
    """weight + Σ deltas, summed in float64 in the order given, rounded once to `dtype`: where the weight is, and with
    the same bits everywhere.

    Args:
        weight: any shape and floating dtype; seen as a matrix of the deltas' columns.
        deltas: of the weight's size.
        dtype: of the result.

    Returns:
        A new tensor of the weight's shape.
    """
    import torch

    matrix = weight.reshape(-1, deltas[0].columns)
    result = torch.empty(matrix.shape, dtype=torch_dtype(dtype), device=matrix.device)
    stacks = [delta.products for delta in deltas if isinstance(delta, StackedProducts)]
    if len(stacks) == len(deltas) and len({len(stack) for stack in stacks}) == 1:
        matrices, results = (whole.chunk(len(stacks[0])) for whole in (matrix, result))
        for part, rounded, *products in zip(matrices, results, *stacks, strict=True):
            _add(part, products, dtype, rounded)
    else:
        _add(matrix, deltas, dtype, result)
    return result.reshape(weight.shape)


def _add(matrix: torch.Tensor, deltas: Sequence[Delta], dtype: DType, result: torch.Tensor) -> None:
    """As `add_rounded`, of a matrix into a result of its size."""
    import torch

    products = [delta.on(matrix.device) for delta in deltas if isinstance(delta, ExactProduct)]
    certain = None
    if len(products) == len(deltas):
        deltas = products
        certain = CertainSum(products, dtype) if CertainSum.serves(products, dtype) else None
    left_open = []
    for begin, end in _blocks(matrix):
        rest = certain.round(matrix[begin:end], begin, result[begin:end]) if certain else None
        if rest is None:
            result[begin:end] = round_once(_sum(matrix, deltas, begin, end), dtype)
        else:
            left_open.append(rest.add_(begin * matrix.shape[1]))
    if left_open:
        _settle(matrix, products, torch.cat(left_open), dtype, result)


def _settle(
    matrix: torch.Tensor,
    products: Sequence[ExactProduct],
    positions: torch.Tensor,
    dtype: DType,
    result: torch.Tensor,
) -> None:
    """Computes single elements of matrix + Σ products, with the bits they have in `_sum`."""
    import torch

    turned = [(product.left, product.right.mT.contiguous(), product.scale) for product in products]
    for some in torch.split(positions, _SETTLED):
        rows, columns = some // matrix.shape[1], some % matrix.shape[1]
        values = None
        for left, right, scale in turned:
            product = (left[rows] * right[columns]).sum(1).mul_(scale)
            values = product if values is None else values.add_(product)
        assert values is not None
        values += matrix.reshape(-1)[some].to(values.dtype)
        result.view(-1)[some] = round_once(values, dtype)


def lengthen(matrix: torch.Tensor, delta: Delta, lengths: torch.Tensor, result: torch.Tensor, dtype: DType) -> None:
    """The rows of matrix + delta brought to the lengths given, in float64, rounded once to `dtype`.

    Args:
        matrix: (rows, columns), any floating dtype and strides.
        delta: of the same size.
        lengths: (rows,), any floating dtype.
        result: (rows, columns), any strides, written to; NaN in rows without a direction.
        dtype: of the result.
    """
    for begin, end in _blocks(matrix):
        block = _sum(matrix, [delta], begin, end)
        block *= (lengths[begin:end].to(block.dtype) / _row_norms(block))[:, None]
        result[begin:end] = round_once(block, dtype)


def change_rows(
    matrix: torch.Tensor,
    result: torch.Tensor,
    change: Callable[[torch.Tensor, int, int], torch.Tensor],
    dtype: DType,
) -> None:
    """Every row of the matrix put through `change`, rounded once to `dtype`.

    Args:
        matrix: (rows, columns), any floating dtype and strides.
        result: of the same size, any strides, written to.
        change: from rows begin to end in float64 to what they become; each row by itself.
        dtype: of the result.
    """
    import torch

    for begin, end in _blocks(matrix):
        result[begin:end] = round_once(change(matrix[begin:end].to(torch.float64), begin, end).contiguous(), dtype)


def _blocks(matrix: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of rows that stay in cache."""
    rows, columns = matrix.shape
    step = max(1, _BLOCK_ELEMENTS // max(1, columns))
    for begin in range(0, rows, step):
        yield begin, min(rows, begin + step)


def _sum(matrix: torch.Tensor, deltas: Sequence[Delta], begin: int, end: int) -> torch.Tensor:
    """matrix + Σ deltas between two rows.  # (end - begin, columns) float64"""
    import torch

    block = deltas[0].rows(begin, end).to(matrix.device)
    for delta in deltas[1:]:
        block += delta.rows(begin, end).to(matrix.device)
    block += matrix[begin:end].to(torch.float64)  # twice as fast as adding across dtypes
    return block


def _row_norms(block: torch.Tensor) -> torch.Tensor:
    """‖row‖ of each row, the squares added in pairs of a fixed order, element by element: torch's own sums choose
    theirs by shape, threads and the machine's vectors.  # (rows,) float64"""
    squares = block.square()  # (rows, columns)
    count = squares.shape[1]
    while count > 1:
        half = (count + 1) // 2
        squares[:, : count - half] += squares[:, half:count]
        count = half
    return squares[:, 0].sqrt()


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
    ties = _ties(nearest, _TIE_BITS[dtype])
    at = nearest.view(-1)[ties]
    error = values.reshape(-1)[ties] - at  # float64; its sign tells on which side of the value `nearest` lies
    away = ((error < 0) == (at > 0)).to(torch.int32)  # 1 where rounded away from zero
    bits = at.view(torch.int32)
    odd = torch.where((error != 0) & error.isfinite(), (bits - away) | 1, bits)
    nearest.view(-1)[ties] = odd.view(torch.float32)
    return nearest.to(torch_dtype(dtype))


def _ties(values: torch.Tensor, mask: int) -> torch.Tensor:
    """The positions of contiguous float32 values whose low bits are all zero.  # (n,) int64"""
    import torch

    bits = values.view(torch.int32).view(-1)
    if bits.device.type == "cpu":  # numpy finds them five times as fast as torch
        return torch.from_numpy(np.flatnonzero((bits.numpy() & mask) == 0))
    return torch.nonzero((bits & mask) == 0).view(-1)
