"""The truncated SVD against the exact one."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from surgery.linalg.truncated import DeltaMatrix, factorise, leading_values, truncated_svd

pytestmark = pytest.mark.processor


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
    factors = factorise(DeltaMatrix.of(delta), rank, torch.float32)
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
    factors = factorise(DeltaMatrix.of(delta), rank, torch.float32)
    tail = float(torch.linalg.svdvals(delta.double())[rank:].square().sum().sqrt())
    error = float((delta.double() - factors.lora_B.double() @ factors.lora_A.double()).norm())
    scale = float(delta.double().norm())
    assert tail - 1e-6 * scale <= error <= 1.001 * tail + 1e-5 * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_the_factors_is_part_of_the_residual(dtype: torch.dtype) -> None:
    """At full rank nothing but the rounding is left, and it is what the report says."""
    delta = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    factors = factorise(DeltaMatrix.of(delta), 30, dtype)
    wide = delta.double()
    true = float((wide - factors.lora_B.double() @ factors.lora_A.double()).norm() / wide.norm())
    assert true > 1e-4
    assert factors.residual == pytest.approx(true, rel=1e-2)


def test_singular_values_are_split_evenly_and_signs_are_fixed() -> None:
    """The factors' columns and rows have equal norms √σ; the largest entry of each left vector is positive."""
    delta = with_spectrum(300, 400, 0.5)
    factors = factorise(DeltaMatrix.of(delta), 8, torch.float32)
    torch.testing.assert_close(factors.lora_B.norm(dim=0), factors.lora_A.norm(dim=1))
    largest = factors.lora_B.gather(0, factors.lora_B.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()


def test_the_same_seed_gives_the_same_bits() -> None:
    """And another seed the same subspace."""
    delta = with_spectrum(300, 400, 0.5)
    one, again, other = (truncated_svd(DeltaMatrix.of(delta), 8, seed) for seed in (0, 0, 1))
    assert torch.equal(one.left, again.left)
    torch.testing.assert_close(one.singular_values, other.singular_values, rtol=1e-4, atol=0)


def test_a_matrix_of_lower_rank_than_asked_leaves_zero_columns() -> None:
    """Rank 2 asked at rank 5: exact, and finite."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(300, 2, generator=generator) @ torch.randn(2, 500, generator=generator)
    factors = factorise(DeltaMatrix.of(delta), 5, torch.float32)
    assert factors.residual < 1e-3
    assert torch.isfinite(factors.lora_A).all()
    torch.testing.assert_close(factors.lora_B @ factors.lora_A, delta, atol=1e-4, rtol=0)


def spectra() -> dict[str, torch.Tensor]:
    """Matrices of 500 × 420 whose spectra decay slowly, fast, not at all, or end."""
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(420.0)
    thin = torch.randn(500, 4, generator=generator) @ torch.randn(4, 420, generator=generator)
    base = torch.randn(500, 420, generator=generator).mul(0.02).to(torch.bfloat16).float()
    slow = with_values(500, 420, (1 + index) ** -0.4)
    return {
        "slow": slow,
        "exponential": with_values(500, 420, 0.9**index),
        "steep": with_values(500, 420, 10 ** (-index / 10)),
        "normal": torch.randn(500, 420, generator=generator),
        "head and plateau": with_values(500, 420, torch.cat([torch.tensor([100.0, 70.0]), torch.ones(418)])),
        "low rank and noise": thin + 1e-3 * torch.randn(500, 420, generator=generator),
        "as bfloat16 leaves it": (base + 0.01 * slow).to(torch.bfloat16).float() - base,
    }


def with_values(rows: int, columns: int, values: torch.Tensor) -> torch.Tensor:
    """A matrix with the given singular values."""
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=generator)).Q
    return (left * values) @ right.mT


@pytest.mark.parametrize("name", spectra())
def test_the_krylov_space_grows_until_the_excess_is_small(name: str) -> None:
    """Whatever the spectrum: at most a thousandth above the optimum, and never less than all of it."""
    delta = spectra()[name].double()
    values = torch.linalg.svdvals(delta)
    for rank in (2, 8, 24, 48):
        factors = factorise(DeltaMatrix.of(delta.float()), rank, torch.float32)
        best = float((values[rank:].square().sum() / values.square().sum()).sqrt())
        true = float((delta - factors.lora_B.double() @ factors.lora_A.double()).norm() / delta.norm())
        assert best * (1 - 1e-6) - 1e-7 <= true <= 1.001 * best + 6e-8  # of which a float32's rounding
        assert factors.residual == pytest.approx(true, rel=1e-4, abs=1e-6)


def test_energy_counts_once_where_the_rank_is_lower_than_asked() -> None:
    """Exactly rank 4, asked for 16: all of the energy and no more, and nothing in the other directions."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(600, 4, generator=generator) @ torch.randn(4, 500, generator=generator)
    factors = factorise(DeltaMatrix.of(delta), 16, torch.float32)
    assert 1 - 1e-9 <= factors.energy <= 1
    exact = torch.linalg.svdvals(delta.double())
    np.testing.assert_allclose(factors.singular_values[:4], exact[:4], rtol=1e-6)
    assert (factors.singular_values[4:] < 1e-5 * factors.singular_values[0]).all()


def test_exact_is_exact() -> None:
    """All singular values, to float64's precision of the float32 matrix."""
    delta = with_spectrum(300, 350, 0.3)
    svd = truncated_svd(DeltaMatrix.of(delta), 4, exact=True)
    np.testing.assert_allclose(svd.spectrum, torch.linalg.svdvals(delta.double()), rtol=1e-7)
    assert svd.left.shape == (300, 4)


def test_a_rule_decides_the_rank_from_what_it_needs_to_see() -> None:
    """The spectrum grows until the rule is content; it sees converged values, and the size to know when all are."""
    delta = DeltaMatrix.of(with_spectrum(1000, 900, 0.7))
    exact = truncated_svd(delta, 1, exact=True).spectrum
    seen: list[int] = []

    def most(values: NDArray[np.float64], total: float, size: int) -> int | None:
        seen.append(len(values))
        assert size == 900
        np.testing.assert_allclose(values, exact[: len(values)], rtol=2e-2)
        held = np.flatnonzero(np.cumsum(values**2) >= 0.85 * total)
        return int(held[0]) + 1 if len(held) else None

    factors = factorise(delta, most, torch.float32)
    assert factors.rank == np.flatnonzero(np.cumsum(exact**2) >= 0.85 * delta.total)[0] + 1
    assert seen[0] == 16 < factors.rank <= seen[-1] < 200
    assert factors.lora_A.shape == (factors.rank, 900)
    assert len(factors.singular_values) == seen[-1]


def test_a_rule_that_wants_everything_gets_it() -> None:
    """Then the decomposition is the dense one."""
    delta = DeltaMatrix.of(with_spectrum(300, 350, 0.0))
    assert factorise(delta, lambda values, _, size: size if len(values) == size else None, torch.float32).rank == 300


def test_leading_values_are_those_of_the_whole() -> None:
    """For a curve."""
    delta = with_spectrum(500, 700, 0.5)
    exact = torch.linalg.svdvals(delta.double())
    values = leading_values(DeltaMatrix.of(delta), 20)
    np.testing.assert_allclose(values[:20], exact[:20], rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_difference_is_taken_of_tensors_as_they_lie_in_memory(dtype: torch.dtype) -> None:
    """Transposed, sliced and reshaped; in float64 where one of them is."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(60, 40, generator=generator).to(dtype)
    tuned = (base + 1e-2 * torch.randn(60, 40, generator=generator)).to(dtype)
    wide = tuned.double() - base.double()
    cases = [
        (base, tuned, wide),
        (base.mT, tuned.mT, wide.mT),
        (base[10:30], tuned[10:30], wide[10:30]),
        (base[:, :7].mT, tuned[:, :7].mT, wide[:, :7].mT),
        (base.reshape(60, 10, 4).flatten(1), tuned.reshape(60, 10, 4).flatten(1), wide),
    ]
    for before, after, goal in cases:
        delta = DeltaMatrix.between(before, after)
        assert delta is not None
        assert delta.shape == tuple(goal.shape)
        assert delta.total == pytest.approx(float(goal.square().sum()), rel=1e-6)
        torch.testing.assert_close(delta.matrix(), goal.float(), rtol=0, atol=0)
        thin = torch.randn(goal.shape[1], 3, generator=generator)
        product = delta.product(thin, adjoint=False, precise=True)
        torch.testing.assert_close(product, goal.float() @ thin, rtol=1e-5, atol=1e-6)


def test_no_difference_is_none_and_nan_is_seen() -> None:
    """A zero's sign is no difference; NaN equals nothing, not even itself."""
    base = torch.zeros(3, 4)
    assert DeltaMatrix.between(base, -base) is None
    poisoned = base.clone()
    poisoned[1, 2] = float("nan")
    delta = DeltaMatrix.between(poisoned, poisoned)
    assert delta is not None
    assert np.isnan(delta.total)


@pytest.mark.parametrize("size", [1e-25, 1e-38, 1e25])
def test_differences_whose_squares_leave_float32_are_decomposed_all_the_same(size: float) -> None:
    """Down to a few units of the smallest number."""
    delta = with_spectrum(400, 300, 0.5).double()
    given = (delta * size).float()
    difference = DeltaMatrix.between(torch.zeros_like(given), given)
    assert difference is not None
    factors = factorise(difference, 8, torch.float32)
    values = torch.linalg.svdvals(given.double() / size)
    assert factors.residual == pytest.approx(
        float((values[8:].square().sum() / values.square().sum()).sqrt()), rel=2e-3
    )
    np.testing.assert_allclose(factors.singular_values / size, values[:8], rtol=1e-2)


def test_products_are_float32_where_onednn_may_use_no_more_than_avx2() -> None:
    """Whatever the processor has beyond it: there bfloat16 would be emulated."""
    delta = "DeltaMatrix.of(torch.ones(3, 3))"
    program = f"import torch; from surgery.linalg.difference import DeltaMatrix; assert {delta}.is_precise"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, check=True)
