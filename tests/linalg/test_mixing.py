"""Sums of deltas of which each keeps only some elements, against peft's own functions and by hand."""

from __future__ import annotations

import pytest
import torch
from peft.utils import merge_utils

import surgery.linalg.mixing
from surgery.errors import SurgeryError
from surgery.linalg.mixing import check_density, elected_mean, mixed

pytestmark = pytest.mark.processor

Products = list[tuple[torch.Tensor, torch.Tensor, float]]


def products(weights: tuple[float, ...], rows: int = 30, columns: int = 20, rank: int = 4) -> Products:
    """A product for each weight."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(rows, rank, generator=generator).double(),
            torch.randn(rank, columns, generator=generator).double(),
            weight,
        )
        for weight in weights
    ]


def dense(found: Products) -> list[torch.Tensor]:
    """The deltas themselves, not weighed."""
    return [(b @ a).float() for b, a, _ in found]


@pytest.mark.parametrize("blocks", [1, 70, 1 << 20])
def test_ties_is_that_of_the_paper(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """With equal weights peft's ties on the deltas agrees; on the factors, as peft applies it, it is another."""
    monkeypatch.setattr(surgery.linalg.mixing, "_BLOCK_ELEMENTS", blocks)
    found = products((1.0, 1.0, 1.0))
    expected = merge_utils.ties(dense(found), torch.ones(3), 0.3)
    torch.testing.assert_close(mixed("ties", found, 0.3, (0, 0, 0)), expected)


def test_ties_elects_among_weighed_deltas() -> None:
    """A negative weight turns a delta round before the vote; zeros have no part in the mean."""
    deltas = torch.tensor([[[3.0, 1.0, 0.0, 2.0]], [[-2.0, 1.0, 4.0, -2.0]], [[-2.0, 0.0, 0.0, 0.0]]])
    torch.testing.assert_close(elected_mean(deltas), torch.tensor([[-2.0, 1.0, 4.0, 2.0]]))
    found = products((1.0, -1.0))
    turned = [found[0], (-found[1][0], found[1][1], 1.0)]
    torch.testing.assert_close(mixed("ties", found, 0.5, (0, 0)), mixed("ties", turned, 0.5, (0, 0)))


def test_magnitude_prune_is_pefts_on_the_deltas() -> None:
    """The largest elements of each, summed by weight."""
    found = products((0.7, -0.3))
    expected = merge_utils.magnitude_prune(dense(found), torch.tensor([0.7, -0.3]), 0.4)
    torch.testing.assert_close(mixed("magnitude-prune", found, 0.4, (0, 0)), expected)


def test_density_one_is_the_sum() -> None:
    """Nothing is dropped and nothing rescaled."""
    found = products((0.7, -0.3))
    expected = 0.7 * dense(found)[0] - 0.3 * dense(found)[1]
    for how in ("dare", "magnitude-prune"):
        torch.testing.assert_close(mixed(how, found, 1.0, (1, 2)), expected, rtol=1e-5, atol=1e-5)


def test_dare_drops_a_share_and_rescales_the_rest() -> None:
    """Each element is zero or 1/density of what it was; the share and the mean come out right; the seed decides."""
    found = products((1.0,), 200, 300)
    delta, result = dense(found)[0], mixed("dare", found, 0.25, (7,))
    kept = result != 0
    assert float(kept.float().mean()) == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(result[kept], 4 * delta[kept])
    assert torch.equal(result, mixed("dare", found, 0.25, (7,)))
    assert not torch.equal(result, mixed("dare", found, 0.25, (8,)))


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, float("nan")])
def test_no_such_density(density: float) -> None:
    """Above 0, at most 1."""
    with pytest.raises(SurgeryError, match="density is out of range"):
        check_density(density)
