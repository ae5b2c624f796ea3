"""Factorises the ΔW of any method. Uses the structure of ΔW if it has one; only otherwise is ΔW formed as a matrix.

Some structures are thin products, see `thin_product`: a product of two factors, and the elementwise product of two such
products (its factors are Khatri–Rao products of rank r², Kolda and Bader, doi:10.1137/07070111X, section 2.6). The
singular values of a Kronecker product are the products of its factors' singular values, and so are its vectors (Van
Loan, doi:10.1016/S0377-0427(00)00393-9, section 2). With a structure, all singular values are known in float64. This
module knows tensors only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.exact import rounding
from surgery.exact.rounding import ExactProduct, Hadamard, blocks
from surgery.linalg.difference import DeltaMatrix
from surgery.linalg.thin_product import refactor, thin_svd
from surgery.linalg.truncated import ChoosesRank, Factors, TruncatedSVD, factorise, leading_values, oriented, stored

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_SMALL = 512  # smaller side of ΔW up to which any product is decomposed by its factors
_THIN = 4  # beyond _SMALL: smallest ratio of the smaller side to the inner dimension for which that is cheap
_FLOAT32 = 1e-14  # share of ‖ΔW‖² that rounding ΔW to float32 may cost


@dataclass(frozen=True)
class Thin:
    """The product B A, with B (out, inner) and A (inner, in) in float64."""

    b: torch.Tensor
    a: torch.Tensor

    @property
    def size(self) -> int:
        """The number of singular values that can be other than zero."""
        return int(min(*self.b.shape, self.a.shape[1]))


@dataclass(frozen=True)
class KroneckerPair:
    """first ⊗ second, in float64."""

    first: torch.Tensor
    second: torch.Tensor

    @property
    def size(self) -> int:
        """The number of singular values that can be other than zero."""
        return int(min(self.first.shape) * min(self.second.shape))


Form = Thin | KroneckerPair | DeltaMatrix


def form_of(delta: rounding.Delta, rows: int, device: torch.device, *, turned: bool) -> Form:
    """The structure of ΔW (out, in). If it has none, or the inner dimension is too large, ΔW is formed in float32.

    Args:
        delta: the change of the weight as the base stores it.
        rows: number of rows of the weight as stored.
        device: where to compute.
        turned: whether the base stores (in, out).
    """
    import torch

    most = most_inner(min(rows, delta.columns))
    if isinstance(delta, ExactProduct) and delta.right.shape[0] <= most:
        return _thin(delta.left * delta.scale, delta.right, device, turned)
    if isinstance(delta, Hadamard) and delta.first.right.shape[0] * delta.second.right.shape[0] <= most:
        first, second = delta.first, delta.second
        left = (first.left[:, :, None] * second.left[:, None, :]).flatten(1)  # (rows, inner²)
        right = (first.right[:, None, :] * second.right[None, :, :]).flatten(0, 1)  # (inner², columns)
        return _thin(left * (first.scale * second.scale), right, device, turned)
    if isinstance(delta, rounding.Kronecker):
        pair = (delta.first.to(device), delta.second.to(device))
        return KroneckerPair(*(each.mT for each in pair)) if turned else KroneckerPair(*pair)
    formed = torch.empty(rows, delta.columns, dtype=torch.float32)
    for begin, end in blocks(formed):
        formed[begin:end] = delta.rows(begin, end)
    formed = formed.to(device)
    found = DeltaMatrix.of(formed.mT if turned else formed)
    return found if found.total else nothing(found.shape)


def most_inner(small: int) -> int:
    """The largest inner dimension for which a product is decomposed by its factors. `small` is ΔW's smaller side."""
    return small if small <= _SMALL else small // _THIN


def nothing(sides: tuple[int, int]) -> Thin:
    """ΔW = 0, (out, in)."""
    import torch

    out, into = sides
    return Thin(torch.zeros(out, 1, dtype=torch.float64), torch.zeros(1, into, dtype=torch.float64))


def _thin(left: torch.Tensor, right: torch.Tensor, device: torch.device, turned: bool) -> Thin:
    left, right = left.to(device), right.to(device)
    return Thin(right.mT, left.mT) if turned else Thin(left, right)


def factored(form: Form, rank: int | ChoosesRank, dtype: torch.dtype, seed: int = 0) -> tuple[Factors, float, bool]:
    """The best factors of a rank stored as `dtype`, ‖ΔW‖², and whether the rank is known to hold all of ΔW, so that
    nothing is lost but rounding to float32.

    Args:
        form: ΔW, finite.
        rank: 1 ≤ rank ≤ min(out, in), clamped to the rank that ΔW can have; or the rule that decides it.
        dtype: dtype of the factors.
        seed: seed of the random start, used if ΔW was formed.
    """
    if isinstance(form, Thin):
        factors, total = refactor(form.b, form.a, _clamped(rank, form.size), dtype)
    elif isinstance(form, KroneckerPair):
        svd = kronecker_svd(form, _clamped(rank, form.size))
        factors, total = stored(svd, dtype), svd.total
    else:
        factors, total = factorise(form, rank, dtype, seed), form.total
    values = factors.singular_values
    left_out = float((values[factors.rank :] ** 2).sum())
    return factors, total, len(values) == _size(form) and left_out <= _FLOAT32 * total


def spectrum(form: Form, count: int, seed: int = 0) -> tuple[NDArray[np.float64], float, bool]:
    """At least `count` leading singular values, or all that can be other than zero; ‖ΔW‖²; whether they are all."""
    if isinstance(form, DeltaMatrix):
        values, total = leading_values(form, count, seed), form.total
    else:
        svd = thin_svd(form.b, form.a, 1) if isinstance(form, Thin) else kronecker_svd(form, 1)
        values, total = svd.spectrum, svd.total
    return values, total, len(values) == _size(form)


def kronecker_svd(form: KroneckerPair, rank: int | ChoosesRank) -> TruncatedSVD:
    """The leading singular triplets of first ⊗ second, on the CPU; `spectrum` has all values that are not zero by
    construction.

    Args:
        form: both factors, float64, finite.
        rank: 1 ≤ rank ≤ `form.size`, or the rule that decides it.
    """
    import torch

    (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(each, full_matrices=False) for each in (form.first, form.second))
    products = (s1[:, None] * s2).flatten()  # (k1 k2,)
    order = products.argsort(descending=True, stable=True)
    values = products[order].cpu()
    total = float(values.square().sum())
    chosen = rank if isinstance(rank, int) else rank(values.numpy(), total, len(values))
    if chosen is None:
        raise ValueError("a rank rule must decide once it has seen all singular values")
    ours, theirs = order[:chosen] // len(s2), order[:chosen] % len(s2)
    left = (u1[:, None, ours] * u2[None, :, theirs]).flatten(0, 1)  # (a b, chosen)
    right = (v1[ours][:, :, None] * v2[theirs][:, None, :]).flatten(1)  # (chosen, c d)
    tail = float(values[chosen:].square().sum())
    return oriented(left.cpu(), values[:chosen], right.cpu(), total, tail, values.numpy())


def _size(form: Form) -> int:
    return min(form.shape) if isinstance(form, DeltaMatrix) else form.size


def _clamped(rank: int | ChoosesRank, size: int) -> int | ChoosesRank:
    return min(rank, size) if isinstance(rank, int) else rank
