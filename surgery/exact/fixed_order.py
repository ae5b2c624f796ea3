"""Small float64 linear algebra whose bits depend only on its inputs.

It serves methods that multiply W0. In products, each factor is split into two fixed-point numbers as in `rounding`, so
that every partial sum is exact and the order cannot matter; about 2⁻⁴² of the maximum of a row or column is lost.
Inverses use elimination by elementwise operations, which have no order. This module knows no method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from surgery.exact.rounding import EXACT_TERMS, RowsOf, fixed_point, fixed_point_bits

if TYPE_CHECKING:
    import torch


def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, with torch's batching.

    Args:
        left: (…, rows, terms), any floating dtype.
        right: (…, terms, columns), any floating dtype.

    Returns:
        (…, rows, columns) float64.
    """
    return multiplier(right)(left)


def multiplier(right: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function left ↦ matmul(left, right), for a right factor (…, terms, columns) that is used several times."""
    bits = fixed_point_bits(right.shape[-2])
    ours = _halves(right, -2, bits)
    return lambda left: _product(_halves(left, -1, bits), ours)


def fine_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> RowsOf:
    """scale · left @ right as a delta, for long sums, in which `exact_product` would keep too few bits.

    Args:
        left: (rows, terms), any floating dtype.
        right: (terms, columns), any floating dtype.
        scale: float64 factor of the whole product.
    """
    bits = fixed_point_bits(left.shape[-1])
    (high, low), ours = _halves(left, -1, bits), _halves(right, -2, bits)
    return RowsOf(right.shape[-1], lambda begin, end: _product((high[begin:end], low[begin:end]), ours).mul_(scale))


def _product(left: tuple[torch.Tensor, torch.Tensor], right: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The product of two factors given as high and low halves, without the product of the low halves."""
    total: torch.Tensor | None = None
    for first in range(0, left[0].shape[-1], EXACT_TERMS):
        chunk = slice(first, first + EXACT_TERMS)
        high, low = (half[..., chunk] for half in left)
        right_high, right_low = (half[..., chunk, :] for half in right)
        part = (high @ right_low + low @ right_high) + high @ right_high
        total = part if total is None else total + part
    assert total is not None
    return total


def _halves(factor: torch.Tensor, dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The factor in fixed point, and the remainder in fixed point."""
    import torch

    factor = factor.to(torch.float64)
    high = fixed_point(factor, dim, bits)
    return high, fixed_point(factor - high, dim, bits)


def norms(vectors: torch.Tensor) -> torch.Tensor:
    """‖row‖ of each row of (…, terms).  # (…,) float64"""
    import torch

    squares = vectors.to(torch.float64).square()
    return matmul(squares, squares.new_ones(squares.shape[-1], 1))[..., 0].sqrt()


def definite_inverse(matrices: torch.Tensor) -> torch.Tensor:
    """The inverses of matrices (…, n, n) with a positive definite symmetric part, for which elimination needs no
    pivots (Golub and Van Loan, Matrix Computations, 4.3.2).  # (…, n, n) float64"""
    import torch

    size = matrices.shape[-1]
    eye = torch.eye(size, dtype=torch.float64).expand(matrices.shape)
    rows = torch.cat([matrices.to(torch.float64), eye], -1)  # (…, n, 2 n)
    for step in range(size):
        pivot = rows[..., step : step + 1, :] / rows[..., step : step + 1, step : step + 1]  # (…, 1, 2 n)
        rows = rows - rows[..., :, step : step + 1] * pivot
        rows[..., step : step + 1, :] = pivot
    return rows[..., size:]


def inverse(matrices: torch.Tensor) -> torch.Tensor:
    """The inverses of well-conditioned matrices (…, n, n), such as rotations: (MᵀM)⁻¹ Mᵀ.  # float64"""
    turned = matrices.mT
    return matmul(definite_inverse(matmul(turned, matrices)), turned)
