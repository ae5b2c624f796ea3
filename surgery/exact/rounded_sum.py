"""W0 + Σ ΔW, rounded once: by blocks of rows, in float32 where its result is certain, else in float64.

It runs on the weight's device and gives the same bits on every device. This module knows no file and no method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from formats.spec import DType
from formats.tensors import torch_dtype
from surgery.exact.certain import CertainSum, Positions
from surgery.exact.rounding import Delta, ExactProduct, StackedProducts, blocks, round_once, sum_of
from surgery.exact.survival import Watch

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 1 << 19  # of a float32 block: larger than the cache, because more calls would hold up other threads


class RoundedSum:
    """Rows of a matrix plus the same rows of Σ deltas, rounded once. It has buffers, so each thread needs its own."""

    def __init__(self, deltas: Sequence[Delta], dtype: DType, device: torch.device) -> None:
        self._products = [delta.on(device) for delta in deltas if isinstance(delta, ExactProduct)]
        self._deltas = self._products if len(self._products) == len(deltas) else deltas
        self._dtype = dtype
        serves = self._deltas is self._products and CertainSum.serves(self._products, dtype)
        self._certain = CertainSum(self._products, dtype) if serves else None
        # For single elements: both factors with contiguous rows.
        single = (delta for delta in deltas if serves and isinstance(delta, ExactProduct))
        self._single = [(each.left.numpy(), each.right.mT.contiguous().numpy(), each.scale) for each in single]

    def round(self, rows: torch.Tensor, begin: int, out: torch.Tensor, watch: Watch | None = None) -> bool:
        """Rounds any number of rows.

        Args:
            rows: (n, columns), any floating dtype: the matrix from row `begin` on.
            begin: index of the first row in the matrix.
            out: (n, columns) of the result's dtype, contiguous, written to.
            watch: is passed the requested change, in float32, and the change that is stored.

        Returns:
            Whether the rows were one block and float32 decided nearly all of it.
        """
        certain = False
        spans = list(blocks(rows, BLOCK_ELEMENTS if self._certain else None))
        for first, last in spans:
            certain = self._block(rows[first:last], begin + first, out[first:last], watch)
        return certain and len(spans) == 1

    def _block(self, rows: torch.Tensor, begin: int, out: torch.Tensor, watch: Watch | None) -> bool:
        rest = self._certain.round(rows, begin, out) if self._certain else None
        if self._certain is None or rest is None:
            self._sum(rows, begin, out, watch)
            return False
        self._complete(rows, begin, out, rest)
        if watch is not None:
            self._certain.show(out, watch)
        return True

    def back(self, rows: torch.Tensor, begin: int, out: torch.Tensor, forth: RoundedSum) -> None:
        """Rounds one block that another sum, with the opposite deltas, has just made.

        Args:
            rows, begin, out: as for `round`.
            forth: the other sum, for which float32 decided nearly all of the block.
        """
        assert self._certain is not None
        assert forth._certain is not None
        rest = self._certain.back(rows, begin, out, forth._certain)
        if rest is None:
            self._sum(rows, begin, out, None)
        else:
            self._complete(rows, begin, out, rest)

    def _complete(self, rows: torch.Tensor, begin: int, out: torch.Tensor, rest: Positions) -> None:
        """Rounds the elements that float32 left undecided."""
        if len(rest):
            out.view(-1)[_on(rest, out)] = self._single_sums(rows, begin, rest).to(out.device)

    def _sum(self, rows: torch.Tensor, begin: int, out: torch.Tensor, watch: Watch | None) -> None:
        """Rounds in float64."""
        import torch

        for first, last in blocks(rows):
            block, rounded = rows[first:last], out[first:last]
            exact = sum_of(self._deltas, begin + first, begin + last).to(rows.device)
            change = None if watch is None else exact.to(torch.float32)
            exact += block.to(torch.float64)  # twice as fast as adding across dtypes
            rounded.copy_(round_once(exact, self._dtype))
            if watch is not None and change is not None:
                watch(block, change, rounded)

    def _single_sums(self, rows: torch.Tensor, begin: int, positions: Positions) -> torch.Tensor:
        """Single elements, with the same bits as in a block.  # (n,) on the CPU"""
        import torch

        row, column = np.divmod(positions, rows.shape[1])
        exact = np.full(len(row), -0.0)  # adding −0.0 changes no value, not even the sign of a zero
        for left, right, scale in self._single:
            exact += np.vecdot(left[begin + row], right[column]) * scale
        exact += rows.reshape(-1)[_on(positions, rows)].to("cpu", torch.float64).numpy()
        return round_once(torch.from_numpy(exact), self._dtype)


def _on(positions: Positions, like: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.from_numpy(positions).to(like.device)


def segments(deltas: Sequence[Delta], rows: int) -> Iterator[tuple[int, int, Sequence[Delta]]]:
    """Ranges of a matrix's rows, each with its deltas: one range per product of a stack, else the whole matrix."""
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
        weight: any shape and floating dtype; reshaped to a matrix with the deltas' columns.
        deltas: deltas of the weight's size.
        dtype: dtype of the result.
        watch: is passed each block, as by `RoundedSum`.

    Returns:
        A new tensor of the weight's shape.
    """
    import torch

    matrix = weight.reshape(-1, deltas[0].columns)
    result = torch.empty(matrix.shape, dtype=torch_dtype(dtype), device=matrix.device)
    for first, last, parts in segments(deltas, len(matrix)):
        total = RoundedSum(parts, dtype, matrix.device)
        part, rounded = matrix[first:last], result[first:last]
        total.round(part, 0, rounded, watch)
    return result.reshape(weight.shape)


def store_rounded(weight: torch.Tensor, exact: torch.Tensor, dtype: DType, watch: Watch) -> torch.Tensor:
    """A float64 result, rounded once to `dtype`.

    Args:
        weight: W0, any shape and floating dtype.
        exact: the changed weight in float64, of the same shape.
        dtype: dtype of the result.
        watch: is passed each block, as by `RoundedSum`.
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
