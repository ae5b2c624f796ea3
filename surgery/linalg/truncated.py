"""Truncated singular value decomposition of a difference of weights, and LoRA factors from it.

Large matrices use a Krylov space, small ones a dense decomposition. The signs are normalised. This module knows tensors
only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from surgery.linalg import krylov
from surgery.linalg.difference import DeltaMatrix
from surgery.linalg.krylov import ChoosesRank

if TYPE_CHECKING:
    import torch

__all__ = [
    "ChoosesRank",
    "DeltaMatrix",
    "Factors",
    "TruncatedSVD",
    "factorise",
    "leading_values",
    "oriented",
    "squared_distance",
    "stored",
    "truncated_svd",
    "workspace",
]

_CANCELLATION = 1e-3  # share of ‖ΔW‖² below which ‖ΔW‖² − Σσ², from σ in float32, is not trusted


@dataclass(frozen=True)
class TruncatedSVD:
    """The leading singular triplets of a matrix, and the size of what they leave out.

    Attributes:
        left: (rows, rank) orthonormal columns U.
        singular_values: (rank,) float64, descending.
        right: (rank, columns) orthonormal rows Vᵀ.
        total: ‖ΔW‖², summed in float64.
        tail: squared Frobenius norm of what is left out: the sum of the other σ² if all are known, else ‖ΔW‖² − Σσ².
        spectrum: (k,) all converged leading singular values, k ≥ rank.
    """

    left: torch.Tensor
    singular_values: torch.Tensor
    right: torch.Tensor
    total: float
    tail: float
    spectrum: NDArray[np.float64]


def workspace(rows: int, columns: int, rank: int | None) -> int:
    """Bytes that DeltaMatrix and factorise need beside the stored tensors; without a rank, whatever a rule may ask for.

    The dense decomposition of a matrix whose Krylov space did not converge is not counted.
    """
    small = min(rows, columns)
    copy = 4 * rows * columns  # of DeltaMatrix; half of it where bfloat16 serves, which only torch could tell
    dense = 8 * (3 * rows * columns + 3 * small * small)
    if rank is None or krylov.is_dense(small, rank):
        return copy + dense
    # The basis and the images of a space of usual size, twice, because they are copied when they grow.
    return copy + 2 * 4 * krylov.width_of(rank) * krylov.USUAL_BLOCKS * (rows + columns)


def truncated_svd(delta: DeltaMatrix, rank: int | ChoosesRank, seed: int = 0, *, exact: bool = False) -> TruncatedSVD:
    """The leading singular triplets, computed where ΔW is, on the CPU in the end.

    The relative excess of the residual over the exact decomposition's is at most about `krylov.TOLERANCE`. If the
    Krylov space would be nearly the whole space, the decomposition is dense and exact.

    Args:
        delta: (rows, columns), finite.
        rank: 1 ≤ rank ≤ min(rows, columns), or the rule that decides it.
        seed: seed of the random start.
        exact: always decompose densely, whatever it costs.
    """
    found = None if exact else krylov.leading(delta, rank, seed)
    whole = found is None
    left, values, right = _dense(delta) if found is None else (found.left, found.values, found.right.mT)
    spectrum: NDArray[np.float64] = values.numpy()
    chosen = rank if isinstance(rank, int) else rank(spectrum, delta.total, min(delta.shape))
    if chosen is None:
        raise ValueError("a rank rule must decide once it has seen all singular values")
    tail = float(values[chosen:].square().sum()) if whole else delta.total - float(values[:chosen].square().sum())
    left, right = left[:, :chosen].cpu(), right[:chosen].cpu()
    return oriented(left, values[:chosen], right, delta.total, max(0.0, tail), spectrum)


def leading_values(delta: DeltaMatrix, count: int, seed: int = 0, *, exact: bool = False) -> NDArray[np.float64]:
    """At least the `count` leading singular values, descending; as good as those of truncated_svd."""
    return truncated_svd(delta, min(count, *delta.shape), seed, exact=exact).spectrum


def oriented(
    left: torch.Tensor,
    values: torch.Tensor,
    right: torch.Tensor,
    total: float,
    tail: float,
    spectrum: NDArray[np.float64],
) -> TruncatedSVD:
    """The triplets with signs such that the largest entry of each left vector is positive."""
    import torch

    largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))[0]  # (rank,)
    sign = torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
    return TruncatedSVD(left * sign, values, right * sign[:, None], total, tail, spectrum)


def _dense(delta: DeltaMatrix) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, σ (on the CPU), Vᵀ, by the eigenvectors of the smaller Gram matrix in float64.

    LAPACK's float32 SVD is off by a dozen units in the last place of the largest entry. Here U is orthogonal to
    float64's precision, whatever the gaps in the spectrum, so U (Uᵀ M) restores M.
    """
    import torch

    matrix = delta.matrix().to(torch.float64)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT  # (small, large)
    left = torch.linalg.eigh(wide @ wide.mT).eigenvectors.flip(1)  # (small, small), descending
    scaled = left.mT @ wide  # (small, large), rows of length σ
    values = torch.linalg.vector_norm(scaled, dim=1)
    order = values.argsort(descending=True, stable=True)  # the Gram matrix cannot order the smallest values
    left, scaled, values = left[:, order], scaled[order], values[order]
    right = scaled / values.clamp_min(1e-12 * float(values[0]))[:, None]
    return (left, values.cpu(), right) if wide is matrix else (right.mT, values.cpu(), left.mT)


@dataclass(frozen=True)
class Factors:
    """ΔW ≈ B A with the singular values split evenly, and the measured loss.

    Attributes:
        lora_A: (rank, columns).
        lora_B: (rows, rank).
        rank: rank of both factors.
        energy: share of ‖ΔW‖² that BA captures.
        residual: ‖ΔW − BA‖ / ‖ΔW‖, including the rounding of the factors.
        singular_values: all converged leading singular values, at least as many as the rank.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    rank: int
    energy: float
    residual: float
    singular_values: NDArray[np.float64]


def factorise(
    delta: DeltaMatrix,
    rank: int | ChoosesRank,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    exact: bool = False,
) -> Factors:
    """B = U√Σ and A = √ΣVᵀ of the leading triplets, stored as `dtype`, on the CPU.

    ‖ΔW − B̃Ã‖² is computed as the tail ‖ΔW‖² − Σσ² plus the rounding loss ‖BA − B̃Ã‖². Their cross term vanishes to
    first order in the rounding, because what is left out is orthogonal to U and V. If the result is so small that the
    subtraction would be mostly rounding error, the difference itself is formed.

    Args:
        delta: (rows, columns), finite.
        rank: 1 ≤ rank ≤ min(rows, columns), or the rule that decides it.
        dtype: dtype of the factors.
        seed: seed of the random start.
        exact: always decompose densely, whatever it costs.
    """
    import torch

    factors = stored(truncated_svd(delta, rank, seed, exact=exact), dtype)
    if factors.residual**2 >= _CANCELLATION:
        return factors
    thin = (factor.to(delta.device, torch.float32) for factor in (factors.lora_B, factors.lora_A))
    left_out = delta.squared_distance(*thin) / delta.total
    return replace(factors, energy=1.0 - left_out, residual=left_out**0.5)


def stored(svd: TruncatedSVD, dtype: torch.dtype) -> Factors:
    """B = U√Σ and A = √ΣVᵀ as `dtype`, on the CPU. The loss is the tail plus the rounding loss."""
    root = svd.singular_values.sqrt().to(svd.left.dtype)
    exact_a, exact_b = root[:, None] * svd.right, svd.left * root  # (rank, columns), (rows, rank)
    lora_a, lora_b = exact_a.to(dtype).contiguous(), exact_b.to(dtype).contiguous()
    loss = squared_distance(exact_b, exact_a, lora_b.to(exact_b.dtype), lora_a.to(exact_a.dtype))
    left_out = (svd.tail + loss) / svd.total if svd.total else 0.0
    return Factors(lora_a, lora_b, len(root), 1.0 - left_out, left_out**0.5, svd.spectrum)


def squared_distance(b: torch.Tensor, a: torch.Tensor, other_b: torch.Tensor, other_a: torch.Tensor) -> float:
    """‖BA − B̃Ã‖² from thin products only: [B − B̃, B̃] [A; A − Ã], a sum of two small terms without cancellation."""
    import torch

    left = torch.cat([b - other_b, other_b], dim=1)  # (rows, 2 rank)
    right = torch.cat([a, a - other_a], dim=0)  # (2 rank, columns)
    return max(0.0, float(((left.mT @ left) * (right @ right.mT)).sum()))
