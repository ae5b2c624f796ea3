"""W0 + Σ ΔW rounded once: by blocks of rows that stay in cache, in float32 where that is certain, else in float64.

Where the weight is, and with the same bits everywhere. Knows no file and no method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from formats.spec import DType
from formats.tensors import torch_dtype
from surgery.certain import CertainSum
from surgery.rounding import Delta, ExactProduct, StackedProducts, blocks, round_once, sum_of
from surgery.survival import Watch

if TYPE_CHECKING:
    import torch


class RoundedSum:
    """Rows of a matrix plus the same rows of Σ deltas, rounded once. One for each thread: it has buffers of its own."""

    def __init__(self, deltas: Sequence[Delta], dtype: DType, device: torch.device) -> None:
        self._products = [delta.on(device) for delta in deltas if isinstance(delta, ExactProduct)]
        self._deltas = self._products if len(self._products) == len(deltas) else deltas
        self._dtype = dtype
        serves = self._deltas is self._products and CertainSum.serves(self._products, dtype)
        self._certain = CertainSum(self._products, dtype) if serves else None
        # Of single elements: rows of both factors, so that each lies in one piece.
        self._turned = [(product.left, product.right.mT.contiguous(), product.scale) for product in self._products]

    def round(self, rows: torch.Tensor, begin: int, out: torch.Tensor, watch: Watch | None = None) -> None:
        """Rounds one block.

        Args:
            rows: (n, columns), any floating dtype: the matrix from row `begin` on.
            begin: its first row.
            out: (n, columns) of the dtype, contiguous, written to.
            watch: is shown the block: W0, Σ deltas in float32, the rounded sum.
        """
        import torch

        rest = self._certain.round(rows, begin, out) if self._certain else None
        if self._certain and rest is not None:
            self._settle(rows, begin, rest, out)
            change = self._certain.change(len(rows))
        else:
            exact = sum_of(self._deltas, begin, begin + len(rows)).to(rows.device)
            change = exact if watch is None else exact.to(torch.float32)
            exact += rows.to(torch.float64)  # twice as fast as adding across dtypes
            out.copy_(round_once(exact, self._dtype))
        if watch is not None:
            watch(rows, change, out)

    def _settle(self, rows: torch.Tensor, begin: int, positions: torch.Tensor, out: torch.Tensor) -> None:
        """Computes single elements of a block, with the bits they have as part of it."""
        if not positions.numel():
            return
        row, column = positions // rows.shape[1], positions % rows.shape[1]
        exact = None
        for left, right, scale in self._turned:
            product = (left[begin + row] * right[column]).sum(1).mul_(scale)
            exact = product if exact is None else exact.add_(product)
        assert exact is not None
        exact += rows.reshape(-1)[positions].to(exact.dtype)
        out.view(-1)[positions] = round_once(exact, self._dtype)


def segments(deltas: Sequence[Delta], rows: int) -> Iterator[tuple[int, int, Sequence[Delta]]]:
    """Ranges of a matrix's rows, each with its deltas: one for each product of a stack, else the whole matrix."""
    stacks = [delta.products for delta in deltas if isinstance(delta, StackedProducts)]
    if not deltas or len(stacks) != len(deltas) or len({len(stack) for stack in stacks}) > 1:
        yield 0, rows, deltas
        return
    height = rows // len(stacks[0])
    for number, products in enumerate(zip(*stacks, strict=True)):
        yield number * height, (number + 1) * height, products


def add_rounded(
    weight: torch.Tensor, deltas: Sequence[Delta], dtype: DType, watch: Watch | None = None
) -> torch.Tensor:
    """weight + Σ deltas, summed in float64 in the order given, rounded once to `dtype`.

    Args:
        weight: any shape and floating dtype; seen as a matrix of the deltas' columns.
        deltas: of the weight's size.
        dtype: of the result.
        watch: is shown each block, as `RoundedSum` shows it.

    Returns:
        A new tensor of the weight's shape.
    """
    import torch

    matrix = weight.reshape(-1, deltas[0].columns)
    result = torch.empty(matrix.shape, dtype=torch_dtype(dtype), device=matrix.device)
    for first, last, parts in segments(deltas, len(matrix)):
        total = RoundedSum(parts, dtype, matrix.device)
        part, rounded = matrix[first:last], result[first:last]
        for begin, end in blocks(part):
            total.round(part[begin:end], begin, rounded[begin:end], watch)
    return result.reshape(weight.shape)


def store_rounded(weight: torch.Tensor, exact: torch.Tensor, dtype: DType, watch: Watch) -> torch.Tensor:
    """A result that is there in float64, rounded once to `dtype`.

    Args:
        weight: W0, any shape and floating dtype.
        exact: what became of it, of the same shape.
        dtype: of the result.
        watch: is shown each block, as `RoundedSum` shows it.
    """
    import torch

    result = torch.empty(exact.shape, dtype=torch_dtype(dtype))
    flat = [tensor.reshape(-1, 1) for tensor in (weight, exact)]
    stored = result.view(-1, 1)
    for begin, end in blocks(stored):
        start, block = (tensor[begin:end] for tensor in flat)
        stored[begin:end] = round_once(block, dtype)
        watch(start, block - start.to(torch.float64), stored[begin:end])
    return result
