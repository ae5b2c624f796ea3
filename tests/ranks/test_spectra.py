from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.ranks.spectra import Spectrum, budgeted, doubling, known_rank, uniform

pytestmark = pytest.mark.processor


def spectrum(values: list[float], known: int | None = None, name: str = "w", cost: int = 10) -> Spectrum:
    """Of all these values the first are known."""
    total = float(np.square(values).sum())
    return Spectrum(name, (len(values), len(values)), len(values), cost, total, tuple(values[:known]))


@st.composite
def spectra(draw: st.DrawFn) -> list[Spectrum]:
    """A few weights of different sizes and costs, partly known."""
    made = []
    for index in range(draw(st.integers(1, 5))):
        values = sorted(draw(st.lists(st.floats(1e-2, 1e2), min_size=1, max_size=20)), reverse=True)
        known = draw(st.integers(1, len(values)))
        made.append(spectrum(values, known, f"w{index}", draw(st.integers(1, 50))))
    return made


@pytest.mark.parametrize("known", [2, 3])
def test_error_and_energy_are_those_of_the_definition(known: int) -> None:
    """3, 2, 1: the squares are 9, 4, 1; the tail follows from the total where the values end."""
    weight = spectrum([3.0, 2.0, 1.0], known)
    assert weight.left_out[: known + 1].tolist() == [14.0, 5.0, 1.0, 0.0][: known + 1]
    (point,) = uniform([weight], [2])
    assert point.energy == pytest.approx(13 / 14)
    assert point.residual == pytest.approx((1 / 14) ** 0.5) == weight.residual(2)
    assert point.nbytes == 20
    assert weight.needed(13 / 14 - 1e-9) == 2
    assert weight.needed(0.99) == (3 if known == 3 else None)


def test_a_curve_ends_where_the_values_end() -> None:
    """The shortest incomplete spectrum decides; a complete one is clamped beyond its size."""
    weights = [spectrum([1.0] * 4), spectrum([1.0] * 9, known=6, name="v")]
    assert known_rank(weights) == 6
    points = uniform(weights, [1, 2, 4, 6, 7, 8])
    assert [point.rank for point in points] == [1, 2, 4, 6]
    assert points[-1].nbytes == 10 * (4 + 6)
    assert known_rank(weights[:1]) == 4


@given(spectra())
def test_curves_only_descend_and_a_budget_is_never_larger_than_its_size(weights: list[Spectrum]) -> None:
    """The error falls with rank and with size, and the sizes are kept."""
    points = uniform(weights, doubling(known_rank(weights)))
    sizes = [point.nbytes for point in points]
    best = budgeted(weights, sizes)
    for curve in (points, best):
        assert all(after.residual <= before.residual + 1e-12 for before, after in itertools.pairwise(curve))
    assert all(point.nbytes <= size for point, size in zip(best, sizes, strict=True))


def test_a_budget_that_more_values_could_serve_better_is_marked() -> None:
    """Its point is what the known values allow, and that can be had."""
    weights = [spectrum([9.0, 8.0, 7.0, 6.0], known=2), spectrum([1.0, 0.1], name="v")]
    few, many = budgeted(weights, [20, 40])
    assert not few.limited
    assert many.limited
    assert many.nbytes == 40
    assert budgeted(weights, [19]) == ()


@pytest.mark.parametrize(("limit", "ranks"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_ranks_double_up_to_the_limit(limit: int, ranks: list[int]) -> None:
    """The limit itself is always there."""
    assert doubling(limit) == ranks
