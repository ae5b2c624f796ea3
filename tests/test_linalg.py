"""The truncated SVD against the exact one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.linalg import factorise, truncated_svd


def with_spectrum(rows: int, columns: int, decay: float, seed: int = 0) -> torch.Tensor:
    """A matrix with singular values 1, 2^-decay, 3^-decay, …"""
    generator = torch.Generator().manual_seed(seed)
    small = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, small, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, small, generator=generator)).Q
    return (left * torch.arange(1.0, small + 1) ** -decay) @ right.mT


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0, 3.0], ids=["flat", "slow", "medium", "fast"])
@pytest.mark.parametrize("shape", [(300, 350), (350, 300), (260, 900)])
@pytest.mark.parametrize("rank", [4, 16])
def test_the_residual_is_within_a_thousandth_of_the_optimum(shape: tuple[int, int], decay: float, rank: int) -> None:
    """Also where the spectrum decays slowly or not at all; and the reported residual is the true one."""
    delta = with_spectrum(*shape, decay)
    factors = factorise(delta, rank, torch.float32)
    values = torch.linalg.svdvals(delta.double())
    best = float((values[rank:].square().sum() / values.square().sum()).sqrt())
    wide = delta.double()
    true = float((wide - factors.lora_B.double() @ factors.lora_A.double()).norm() / wide.norm())
    assert true <= 1.001 * best + 1e-6
    assert abs(true - factors.residual) <= 1e-4 * true + 1e-5


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), rank=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_eckart_young(rows: int, columns: int, rank: int, seed: int) -> None:
    """No rank-r approximation can be better than the tail of the spectrum, and ours attains it."""
    rank = min(rank, rows, columns)
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    factors = factorise(delta, rank, torch.float32)
    tail = float(torch.linalg.svdvals(delta.double())[rank:].square().sum().sqrt())
    error = float((delta.double() - factors.lora_B.double() @ factors.lora_A.double()).norm())
    scale = float(delta.double().norm())
    assert tail - 1e-6 * scale <= error <= 1.001 * tail + 1e-5 * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_the_factors_is_part_of_the_residual(dtype: torch.dtype) -> None:
    """At full rank nothing but the rounding is left, and it is what the report says."""
    delta = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    factors = factorise(delta, 30, dtype)
    wide = delta.double()
    true = float((wide - factors.lora_B.double() @ factors.lora_A.double()).norm() / wide.norm())
    assert true > 1e-4
    assert factors.residual == pytest.approx(true, rel=1e-2)


def test_singular_values_are_split_evenly_and_signs_are_fixed() -> None:
    """The factors' columns and rows have equal norms √σ; the largest entry of each left vector is positive."""
    delta = with_spectrum(300, 400, 0.5)
    factors = factorise(delta, 8, torch.float32)
    torch.testing.assert_close(factors.lora_B.norm(dim=0), factors.lora_A.norm(dim=1))
    largest = factors.lora_B.gather(0, factors.lora_B.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()


def test_the_same_seed_gives_the_same_bits() -> None:
    """And another seed the same subspace."""
    delta = with_spectrum(300, 400, 0.5)
    one, again, other = (truncated_svd(delta, 8, seed) for seed in (0, 0, 1))
    assert torch.equal(one.left, again.left)
    torch.testing.assert_close(one.singular_values, other.singular_values, rtol=1e-4, atol=0)


def test_a_matrix_of_lower_rank_than_asked_leaves_zero_columns() -> None:
    """Rank 2 asked at rank 5: exact, and finite."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(300, 2, generator=generator) @ torch.randn(2, 500, generator=generator)
    factors = factorise(delta, 5, torch.float32)
    assert factors.residual < 1e-3
    assert torch.isfinite(factors.lora_A).all()
    torch.testing.assert_close(factors.lora_B @ factors.lora_A, delta, atol=1e-4, rtol=0)
