"""Rounds the sum of a weight and products to 16 bits, using float32 where its result is provably correct.

The error of a float32 sum can be bounded. Rounding is monotone: if sum − bound and sum + bound round to the same value,
so does the exact sum, in whatever order the float32 sum was taken. With 16 bits this holds for nearly all elements; the
positions of the others are returned, to be computed exactly. So no bit depends on float32, and a merge takes a quarter
less time than with float64 sums. This module knows no file and no method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from formats.spec import DType
from formats.tensors import torch_dtype
from surgery.exact.survival import Watch

if TYPE_CHECKING:
    import torch

Positions = np.ndarray[Any, np.dtype[np.int64]]  # indices into the flattened block, ascending
_NARROW = (DType.BF16, DType.F16)
_MOST_TERMS = 128  # of all products together; with more, the bound leaves too many elements undecided
_MOST_OPEN = 1 / 8  # share of a block's elements; if more are undecided, float64 for the whole block is cheaper
_UNIT = 2.0**-24  # the relative error of one float32 operation
_SLACK = 1.25  # covers the rounding of the bound itself, and second-order terms
_LARGEST = 1e30  # the largest bound that is trusted: an intermediate overflow could go unnoticed beyond it
_LANES = 4  # 16-bit values in 64 bits
_TINY = 2.0**-125  # below this, float32 loses precision or flushes to zero
_SMALLEST = 2.0**-100  # the least bound: it covers what underflows in intermediate results


class CertainProduct(Protocol):
    """scale · left @ right, whose factors float32 holds exactly."""

    @property
    def left(self) -> torch.Tensor:
        """(rows, terms) float64."""

    @property
    def right(self) -> torch.Tensor:
        """(terms, columns) float64."""

    @property
    def scale(self) -> float:
        """The factor of the whole product."""


@dataclass(frozen=True)
class _Narrowed:
    """A product in float32. `reach` (rows, 1) is an upper bound of the sums of |left| · |right| in each row. `lost` is
    the most that factors too small for float32 can add to a sum."""

    left: torch.Tensor  # with the scale in it
    right: torch.Tensor
    reach: torch.Tensor
    lost: float

    @classmethod
    def of(cls, product: CertainProduct) -> _Narrowed:
        import torch

        left = product.left * product.scale
        reach = left.norm(dim=1, keepdim=True) * product.right.norm(dim=0).max()  # Cauchy and Schwarz
        lost = left.shape[1] * _TINY * float(left.abs().max() + product.right.abs().max())
        return cls(left.to(torch.float32), product.right.to(torch.float32), reach.to(torch.float32), lost)


class CertainSum:
    """matrix + Σ products, by blocks of rows. It has buffers, so each thread needs one of its own."""

    def __init__(self, products: Sequence[CertainProduct], dtype: DType) -> None:
        self._products = [_Narrowed.of(product) for product in products]
        self._lost = sum(product.lost for product in self._products) + _SMALLEST
        self._terms = sum(product.left.shape[1] for product in products)
        self._dtype = torch_dtype(dtype)
        self._buffers: list[torch.Tensor] = []

    @staticmethod
    def serves(products: Sequence[CertainProduct], dtype: DType) -> bool:
        """Whether float32 can tell much of these sums, computed where the products are."""
        if not all(product.left.numel() and product.right.numel() for product in products):
            return False
        plain = all(_has_plain_float32(product.left.device) for product in products)
        return plain and dtype in _NARROW and sum(product.left.shape[1] for product in products) <= _MOST_TERMS

    def round(self, rows: torch.Tensor, begin: int, out: torch.Tensor) -> Positions | None:
        """Rounds one block.

        Args:
            rows: (n, columns), any floating dtype: the matrix from row `begin` on.
            begin: index of the first row in the matrix.
            out: (n, columns) of the result's dtype, contiguous, written to.

        Returns:
            Positions of the elements that the caller must compute; None if that is the whole block.
        """
        import torch

        if rows.dtype == torch.float64:
            return None
        block = slice(begin, begin + len(rows))
        weight, change, total, _, _ = self._scratch(rows)
        first, *others = self._products
        torch.mm(first.left[block], first.right, out=change)
        for product in others:
            change.addmm_(product.left[block], product.right)
        torch.add(weight.copy_(rows), change, out=total)
        return self._decide(block, out)

    def show(self, out: torch.Tensor, watch: Watch) -> None:
        """Passes the latest block's change, and the part of it that `out` stores, to a watch."""
        import torch

        weight, change, total, stored, _ = self._scratch(out)
        watch.take(torch.sub(stored.copy_(out), weight, out=total), change)

    def back(self, rows: torch.Tensor, begin: int, out: torch.Tensor, forth: CertainSum) -> Positions | None:
        """Rounds a block with the products subtracted, reusing the change that the opposite sum has just computed.

        Args:
            rows, begin, out: as for `round`.
            forth: the sum of the same products with the opposite sign, which has just rounded this block.
        """
        import torch

        self._buffers = forth._buffers
        _, change, total, stored, _ = self._scratch(rows)
        torch.sub(stored.copy_(rows), change, out=total)
        return self._decide(slice(begin, begin + len(rows)), out)

    def _decide(self, block: slice, out: torch.Tensor) -> Positions | None:
        """Rounds the sums in the scratch buffers, which belong to these rows."""
        _, _, total, bound, above = self._scratch(out)
        self._bound(total, self._reach(block), bound)
        if not _largest(bound) < _LARGEST:
            return None
        out.copy_(total.sub_(bound))
        open_ = _differing(out, above.copy_(total.add_(bound, alpha=2)))
        return open_ if len(open_) <= _MOST_OPEN * out.numel() else None

    def _reach(self, rows: slice) -> torch.Tensor:
        """Upper bounds of the sums of |left| · |right| in these rows.  # (n, 1) float32"""
        first, *others = (product.reach[rows] for product in self._products)
        for reach in others:
            first = first + reach
        return first

    def _bound(self, total: torch.Tensor, reach: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """An upper bound of the error of the float32 sums. It covers each term's product and addition, the scale, and
        the additions of the bound itself."""
        import torch

        fixed = reach.mul(_SLACK * _UNIT * (self._terms + 8)).add_(self._lost)
        return torch.add(fixed, torch.abs(total, out=out), alpha=_SLACK * _UNIT * 4, out=out)

    def _scratch(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Four float32 buffers and one of the dtype, of the block's size."""
        import torch

        if not self._buffers:  # the first block is the largest
            dtypes = (*(torch.float32,) * 4, self._dtype)
            self._buffers = [torch.empty(rows.shape, dtype=dtype, device=rows.device) for dtype in dtypes]
        return [buffer[: len(rows)] for buffer in self._buffers]


def _has_plain_float32(device: torch.device) -> bool:
    """Whether float32 products are computed in float32; torch can be set to use TF32 or bfloat16 instead."""
    import torch

    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("none", "ieee")


def _largest(values: torch.Tensor) -> float:
    """The largest of contiguous values; NaN if there is a NaN."""
    return float(values.numpy().max() if values.device.type == "cpu" else values.max())  # numpy is four times as fast


def _differing(left: torch.Tensor, right: torch.Tensor) -> Positions:
    """Where two contiguous 16-bit tensors differ in their bits."""
    import torch

    ours, theirs = (tensor.view(torch.int16).view(-1).cpu().numpy() for tensor in (left, right))
    if len(ours) % _LANES:
        return np.flatnonzero(ours != theirs)
    # Few differ, so compare four values at a time first.
    wide = np.flatnonzero(ours.view(np.int64) != theirs.view(np.int64))
    near = (wide[:, None] * _LANES + np.arange(_LANES)).reshape(-1)
    found: Positions = near[ours[near] != theirs[near]]
    return found
