"""Products of thin matrices, decomposed without being formed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgery.linalg.thin_product import as_they_are, refactor, thin_svd
from surgery.ranks import EnergyRule, FixedRank

pytestmark = pytest.mark.processor


def product(rows: int, columns: int, inner: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A in float64."""
    generator = torch.Generator().manual_seed(seed)
    b, a = (torch.randn(*shape, generator=generator).double() for shape in ((rows, inner), (inner, columns)))
    return b, a


@pytest.mark.parametrize("shape", [(30, 20, 6), (20, 30, 6), (5, 40, 8), (40, 5, 8), (3, 4, 9), (1, 7, 1)])
def test_the_values_are_those_of_the_dense_product(shape: tuple[int, int, int]) -> None:
    """Also where the inner dimension exceeds a side."""
    b, a = product(*shape)
    expected = np.linalg.svd((b @ a).numpy(), compute_uv=False)[: min(shape)]
    svd = thin_svd(b, a, 1)
    np.testing.assert_allclose(svd.spectrum, expected, rtol=1e-10)
    assert svd.total == pytest.approx(float((b @ a).square().sum()), rel=1e-12)


def test_truncation_is_the_optimum() -> None:
    """The residual is that of numpy's dense SVD, and what is reported of it is what the factors leave."""
    b, a = product(30, 20, 8)
    dense = b @ a
    values = np.linalg.svd(dense.numpy(), compute_uv=False)
    factors, total = refactor(b, a, 3, torch.float64)
    left = float((dense - factors.lora_B @ factors.lora_A).norm())
    assert left == pytest.approx(float(np.sqrt((values[3:] ** 2).sum())), rel=1e-10)
    assert factors.residual == pytest.approx(left / float(dense.norm()), rel=1e-10)
    assert total == pytest.approx(float(dense.square().sum()), rel=1e-12)


def test_signs_are_fixed() -> None:
    """The same product from other factors gives the same factors."""
    b, a = product(12, 9, 4)
    turn = torch.linalg.qr(product(4, 4, 4, seed=3)[0]).Q
    (one, _), (other, _) = refactor(b, a, 2, torch.float64), refactor(-b @ turn, -turn.mT @ a, 2, torch.float64)
    torch.testing.assert_close(one.lora_A, other.lora_A)
    torch.testing.assert_close(one.lora_B, other.lora_B)


def test_the_whole_rank_keeps_the_factors() -> None:
    """Nothing is decomposed that need not be: the factors themselves come back."""
    b, a = product(12, 9, 4)
    for rule in (4, FixedRank(9), EnergyRule(1.0)):
        factors, _ = refactor(b, a, rule, torch.float64)
        assert torch.equal(factors.lora_A, a)
        assert torch.equal(factors.lora_B, b)
        assert factors.residual == 0


def test_zero_has_a_rank_too() -> None:
    """A module that was never trained (B = 0) keeps nothing but its place."""
    b, a = product(12, 9, 4)
    for rule in (2, EnergyRule(0.9)):
        factors, _ = refactor(0 * b, a, rule, torch.float32)
        assert not (factors.lora_B @ factors.lora_A).any()
        assert factors.residual == 0
        assert factors.energy == 1


def test_what_nearly_cancels_keeps_its_norm() -> None:
    """‖BA‖² of the sum of a product and almost its negative, not of the rounding between two large terms."""
    b, a = product(12, 9, 4)
    both_b, both_a = torch.cat([b, -b], dim=1), torch.cat([a, (1 + 1e-9) * a])
    expected = float((1e-9 * b @ a).square().sum())
    for rule in (None, 2):
        factors, total = (
            as_they_are(both_b, both_a, torch.float64)
            if rule is None
            else refactor(both_b, both_a, rule, torch.float64)
        )
        assert total == pytest.approx(expected, rel=1e-4)
        assert factors.rank == (8 if rule is None else rule)
