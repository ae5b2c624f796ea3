"""Truncated singular value decomposition of a difference of weights.

Block Krylov iteration (Musco and Musco, arXiv 1504.05477): fine-tuning deltas have slowly decaying spectra, on which
the usual randomised SVD with a few power iterations is off by per cents. Deterministic: the start is seeded, the
signs are fixed. Knows tensors only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OVERSAMPLING = 8  # columns beyond the rank, so that the last wanted direction converges too
# Krylov blocks after the first. The worst excess over the exact SVD, which a flat spectrum gives, is 7e-4 with 4 (2e-3
# with 3), at ranks 8 to 64; on real deltas it is an order of magnitude less.
EXTRA_BLOCKS = 4
DENSE_SHARE = 0.8  # of the smaller side: beyond it a Krylov space has no advantage
NOT_ORTHOGONAL = 1e-5  # overlap of two basis vectors beyond what float32's rounding explains
CANCELLATION = 1e-3  # share of ‖ΔW‖² below which ‖ΔW‖² − Σσ², from σ in float32, is not trusted


@dataclass(frozen=True)
class TruncatedSVD:
    """The leading singular triplets of a matrix, and what they leave out.

    Attributes:
        left: (rows, rank) orthonormal columns U.
        singular_values: (rank,) float64, descending.
        right: (rank, columns) orthonormal rows Vᵀ.
        total: ‖D‖², summed in float64.
        tail: squared Frobenius norm of what is left out: the other σ² where all are known, else ‖D‖² − Σσ².
    """

    left: torch.Tensor
    singular_values: torch.Tensor
    right: torch.Tensor
    total: float
    tail: float


def squared_norm(matrix: torch.Tensor) -> float:
    """‖matrix‖²: each row in float32, which is good to 1e-8, their sum in float64; all in float64 where a row's square
    would under- or overflow. NaN or Inf anywhere makes it NaN or Inf."""
    import torch

    total = float(torch.linalg.vector_norm(matrix, dim=1).to(torch.float64).square().sum())
    if 1e-30 < total < 1e30:
        return total
    return float(torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64).square().sum())


def workspace(rows: int, columns: int, rank: int) -> int:
    """Bytes that factorise needs beside the float32 matrix it is given."""
    small = min(rows, columns)
    if _is_dense(small, rank):
        return 8 * (3 * rows * columns + 3 * small * small)
    return 2 * 4 * (rank + OVERSAMPLING) * (1 + EXTRA_BLOCKS) * (rows + columns)


def _is_dense(small: int, rank: int) -> bool:
    return (1 + EXTRA_BLOCKS) * (rank + OVERSAMPLING) >= DENSE_SHARE * small


def truncated_svd(delta: torch.Tensor, rank: int, seed: int = 0, total: float | None = None) -> TruncatedSVD:
    """The `rank` leading singular triplets.

    Dense and exact where the Krylov space would be most of the whole space anyway.

    Args:
        delta: (rows, columns) float32.
        rank: 1 ≤ rank ≤ min(rows, columns).
        seed: of the random start.
    """
    total = squared_norm(delta)
    small = min(delta.shape)
    width = rank + OVERSAMPLING
    exact = _is_dense(small, rank)
    solve = _dense if exact else functools.partial(_block_krylov, width=width, seed=seed)
    if delta.shape[0] <= delta.shape[1]:
        left, values, right = solve(delta)
    else:
        right, values, left = solve(delta.mT)
        left, right = left.mT, right.mT
    known = float(values[:rank].square().sum())
    tail = float(values[rank:].square().sum()) if exact else max(0.0, total - known)
    return _oriented(left[:, :rank], values[:rank], right[:rank], total, tail)


def _oriented(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, total: float, tail: float) -> TruncatedSVD:
    """The triplets with signs such that the largest entry of each left vector is positive."""
    import torch

    largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))[0]  # (rank,)
    sign = torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
    return TruncatedSVD(left * sign, values, right * sign[:, None], total, tail)


def _dense(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, σ, Vᵀ of a wide matrix (rows ≤ columns), by the eigenvectors of its Gram matrix in float64.

    LAPACK's SVD in float32 is off by a dozen units in the last place of the largest entry. Here U is orthogonal to
    float64's precision whatever the gaps in the spectrum, so U (Uᵀ M) gives M back.
    """
    import torch

    wide = matrix.to(torch.float64)
    left = torch.linalg.eigh(wide @ wide.mT).eigenvectors.flip(1)  # (rows, rows), descending
    scaled = left.mT @ wide  # (rows, columns), rows of length σ
    values = torch.linalg.vector_norm(scaled, dim=1)
    order = values.argsort(descending=True, stable=True)  # the Gram matrix cannot tell the smallest apart
    left, scaled, values = left[:, order], scaled[order], values[order]
    return left, values, scaled / values.clamp_min(1e-12 * float(values[0]))[:, None]


def _block_krylov(matrix: torch.Tensor, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, σ, Vᵀ of the projection onto the Krylov space of a wide matrix (rows ≤ columns)."""
    import torch

    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype)
    block = torch.linalg.qr(matrix @ start).Q  # (rows, width)
    basis, images = block, []
    for _ in range(EXTRA_BLOCKS):
        images.append(block.mT @ matrix)  # (width, columns)
        block = matrix @ images[-1].mT  # (rows, width)
        for _ in range(2):  # once is not enough in float32
            block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
        basis = torch.cat([basis, block], dim=1)  # (rows, (1 + extra) · width)
    core = torch.cat([*images, block.mT @ matrix])  # ((1 + extra) · width, columns)
    overlap = basis.mT @ basis - torch.eye(basis.shape[1], dtype=basis.dtype)
    if float(overlap.abs().max()) > NOT_ORTHOGONAL:
        # Where the matrix has a lower rank than the space has columns, the last blocks are rounding noise that no
        # projection makes orthogonal; Householder's QR of the whole does, and without it energy would count twice.
        basis = torch.linalg.qr(basis).Q
        core = basis.mT @ matrix
    left, values, right = _dense(core)
    return basis @ left.to(basis.dtype), values, right.to(basis.dtype)


@dataclass(frozen=True)
class Factors:
    """ΔW ≈ B A with the singular values split evenly, and the measured loss.

    Attributes:
        lora_A: (rank, columns).
        lora_B: (rows, rank).
        energy: share of ‖ΔW‖² that BA holds.
        residual: ‖ΔW − BA‖ / ‖ΔW‖, rounding of the factors included.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    energy: float
    residual: float


def factorise(delta: torch.Tensor, rank: int, dtype: torch.dtype, seed: int = 0, total: float | None = None) -> Factors:
    """B = U√Σ and A = √ΣVᵀ of the leading `rank` triplets, stored as `dtype`.

    ‖ΔW − B̃Ã‖² is taken as the tail ‖ΔW‖² − Σσ² plus the rounding loss ‖BA − B̃Ã‖²; their cross term vanishes to first
    order in the rounding, because what is left out is orthogonal to U and V. Where that is so small that the
    subtraction would be mostly rounding, the difference itself is formed.

    Args:
        delta: (rows, columns) float32, not all zero.
        rank: 1 ≤ rank ≤ min(rows, columns).
        dtype: of the factors.
        seed: of the random start.
        total: ‖delta‖² where it is known already.
    """
    import torch

    svd = truncated_svd(delta, rank, seed, total)
    root = svd.singular_values.sqrt()
    exact_a = root[:, None] * svd.right.to(torch.float64)  # (rank, columns)
    exact_b = svd.left.to(torch.float64) * root  # (rows, rank)
    lora_a, lora_b = exact_a.to(dtype), exact_b.to(dtype)
    loss = _squared_distance(exact_b, exact_a, lora_b.to(torch.float64), lora_a.to(torch.float64))
    left_out = (svd.tail + loss) / svd.total
    if left_out < CANCELLATION:
        left_out = squared_norm(delta - lora_b.to(delta.dtype) @ lora_a.to(delta.dtype)) / svd.total
    return Factors(lora_a.contiguous(), lora_b.contiguous(), 1.0 - left_out, left_out**0.5)


def _squared_distance(b: torch.Tensor, a: torch.Tensor, other_b: torch.Tensor, other_a: torch.Tensor) -> float:
    """‖BA − B̃Ã‖² by thin products only: [B − B̃, B̃] [A; A − Ã], a sum of two small terms without cancellation."""
    import torch

    left = torch.cat([b - other_b, other_b], dim=1)  # (rows, 2 rank)
    right = torch.cat([a, a - other_a], dim=0)  # (2 rank, columns)
    return max(0.0, float(((left.mT @ left) * (right @ right.mT)).sum()))
