"""The singular value decomposition of a product of two thin matrices, without forming the product.

With B = Q_B R_B and Aᵀ = Q_A R_A, the product BA = Q_B (R_B R_Aᵀ) Q_Aᵀ has the singular values of its small core, and
its singular vectors are the core's, multiplied by Q_B and Q_A. Everything is float64, so only float64's rounding is
lost. There is no random start and no iteration, and every singular value is known. This module knows tensors only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.linalg.truncated import ChoosesRank, Factors, TruncatedSVD, oriented, squared_distance, stored

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


def thin_svd(b: torch.Tensor, a: torch.Tensor, rank: int | ChoosesRank) -> TruncatedSVD:
    """The leading singular triplets of BA, on the CPU; `spectrum` has all values that are not zero by construction.

    Args:
        b: (rows, inner) float64, finite.
        a: (inner, columns) float64, finite.
        rank: 1 ≤ rank ≤ min(rows, columns, inner), or the rule that decides it.
    """
    import torch

    left, core_b = torch.linalg.qr(b)  # (rows, p), (p, inner)
    right, core_a = torch.linalg.qr(a.mT)  # (columns, q), (q, inner)
    u, values, v = torch.linalg.svd(core_b @ core_a.mT, full_matrices=False)  # (p, k), (k,), (k, q)
    values = values.cpu()
    total = float(values.square().sum())
    chosen = rank if isinstance(rank, int) else rank(values.numpy(), total, len(values))
    if chosen is None:
        raise ValueError("a rank rule must decide once it has seen all singular values")
    tail = float(values[chosen:].square().sum())
    left, right = (left @ u[:, :chosen]).cpu(), (v[:chosen] @ right.mT).cpu()  # (rows, chosen), (chosen, columns)
    return oriented(left, values[:chosen], right, total, tail, values.numpy())


def refactor(b: torch.Tensor, a: torch.Tensor, rank: int | ChoosesRank, dtype: torch.dtype) -> tuple[Factors, float]:
    """BA at another rank, B = U√Σ and A = √ΣVᵀ, and ‖BA‖²; where the rank is the inner dimension, B and A themselves.

    Args:
        b, a: as for `thin_svd`.
        rank: as for `thin_svd`.
        dtype: dtype of the factors.
    """
    svd = thin_svd(b, a, rank)
    if len(svd.singular_values) < a.shape[0]:
        return stored(svd, dtype), svd.total
    return _rounded(b, a, dtype, svd.total, svd.spectrum), svd.total


def as_they_are(b: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> tuple[Factors, float]:
    """B and A stored as `dtype`, with the loss by rounding and without a spectrum, and ‖BA‖²."""
    import numpy as np
    import torch

    core_b, core_a = torch.linalg.qr(b, mode="r").R, torch.linalg.qr(a.mT, mode="r").R
    total = float((core_b @ core_a.mT).square().sum())
    return _rounded(b, a, dtype, total, np.empty(0)), total


def _rounded(
    b: torch.Tensor, a: torch.Tensor, dtype: torch.dtype, total: float, spectrum: NDArray[np.float64]
) -> Factors:
    b, a = b.cpu(), a.cpu()
    lora_b, lora_a = b.to(dtype).contiguous(), a.to(dtype).contiguous()
    loss = squared_distance(b, a, lora_b.to(b.dtype), lora_a.to(a.dtype))
    left_out = loss / total if total else 0.0
    return Factors(lora_a, lora_b, a.shape[0], 1.0 - left_out, left_out**0.5, spectrum)
