from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import SurgeryError
from surgery.ranks import (
    Bounded,
    EnergyRule,
    FixedRank,
    QuantileRule,
    RankRule,
    RatioRule,
    ResidualRule,
    ThresholdRule,
    rank_rule,
)

SPECTRA = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=24).map(lambda values: np.array(sorted(values)[::-1]))
SHARES = st.floats(0.01, 0.99)
RULES: st.SearchStrategy[RankRule] = st.one_of(
    st.integers(1, 30).map(FixedRank),
    SHARES.map(EnergyRule),
    SHARES.map(ResidualRule),
    st.floats(0.01, 100).map(RatioRule),
    st.floats(0, 1e3).map(ThresholdRule),
    SHARES.map(QuantileRule),
)


def total_of(values: np.ndarray) -> float:
    """‖ΔW‖²."""
    return float((values * values).sum())


def first(holds: Callable[[int], bool], values: np.ndarray) -> int:
    """The smallest rank for which something holds, else all."""
    return next((rank for rank in range(1, len(values)) if holds(rank)), len(values))


def near(value: float, other: float) -> bool:
    """So near that rounding decides between two ranks."""
    return abs(value - other) <= 1e-9 * max(abs(value), abs(other))


@given(SPECTRA, SHARES)
def test_a_sum_rule_gives_the_smallest_rank_that_reaches_its_goal(values: np.ndarray, share: float) -> None:
    """Energy, residual and quantile against their definitions, with the whole spectrum known."""
    size, squares = len(values), values * values
    total = total_of(values)
    sums = {
        EnergyRule(share): (squares, share),
        ResidualRule(share): (squares, 1 - share**2),
        QuantileRule(share): (values, share),
    }
    for rule, (terms, goal) in sums.items():
        rank = rule(values, total, size)
        assert rank is not None
        reached = [float(terms[:count].sum()) / float(terms.sum()) for count in range(size + 1)]
        assert rank == size or reached[rank] >= goal or near(reached[rank], goal)
        assert reached[rank - 1] < goal or near(reached[rank - 1], goal) or rank == 1


@given(SPECTRA, st.floats(1.01, 1e4))
def test_both_forms_of_a_ratio_mean_the_same(values: np.ndarray, ratio: float) -> None:
    """kohya's 10 and LyCORIS's 0.1; and so does the threshold σ1/10."""
    expected = max(1, int((values > values[0] / ratio).sum()))
    assert RatioRule(ratio)(values, total_of(values), len(values)) == expected
    assert ThresholdRule(float(values[0]) / ratio)(values, total_of(values), len(values)) == expected


def test_ranks_are_those_of_the_peers_definitions() -> None:
    """A spectrum 10, 5, 2, 1, 1, 1: by hand."""
    values = np.array([10.0, 5.0, 2.0, 1.0, 1.0, 1.0])
    total = total_of(values)  # 132
    expected = [
        (RatioRule(10), 3),  # σ > 1: kohya's `sum(S > S[0] / 10)`
        (RatioRule(0.1), 3),
        (ThresholdRule(2.0), 2),  # strictly above
        (ThresholdRule(100.0), 1),  # never none
        (QuantileRule(0.75), 2),  # 15 of 20 reach it; LyCORIS: sums below it, 1
        (QuantileRule(0.76), 3),
        (EnergyRule(100 / 132), 1),
        (EnergyRule(0.9), 2),  # kohya's sv_fro sqrt(0.9)
        (ResidualRule(0.2), 3),  # 3 of 132 left: 0.15
        (EnergyRule(1.0), 6),
    ]
    assert [(rule, rule(values, total, 6)) for rule, _ in expected] == expected


@given(SPECTRA, RULES, st.integers(1, 8), st.integers(0, 8) | st.none())
@settings(max_examples=300)
def test_what_few_values_decide_more_values_never_change(
    values: np.ndarray, rule: RankRule, minimum: int, extra: int | None
) -> None:
    """Once decided it stays, it lies within what is known, and the whole spectrum always decides."""
    size = len(values)
    for tried in (rule, Bounded(rule, minimum, None if extra is None else minimum + extra)):
        answers = [tried(values[:known], total_of(values), size) for known in range(1, size + 1)]
        assert answers[-1] is not None
        assert 1 <= answers[-1] <= tried.most(size) <= size
        decided = [(known, rank) for known, rank in enumerate(answers, 1) if rank is not None]
        assert all(rank == answers[-1] and rank <= known for known, rank in decided)
        assert len(decided) == size + 1 - decided[0][0]


@given(SPECTRA, RULES, st.integers(1, 8), st.integers(0, 8))
def test_a_maximum_decides_as_soon_as_so_many_values_are_known(
    values: np.ndarray, rule: RankRule, minimum: int, extra: int
) -> None:
    """Whatever the rule; and all but the quantile then give what the whole spectrum gives, clamped."""
    size = len(values)
    bounded = Bounded(rule, minimum, minimum + extra)
    rank = bounded(values[: minimum + extra], total_of(values), size)
    assert rank is not None
    free = rule(values, total_of(values), size)
    assert free is not None
    if not isinstance(rule, QuantileRule):
        assert rank == min(size, max(minimum, min(free, minimum + extra)))


def test_a_quantile_is_often_settled_by_the_leading_values() -> None:
    """The energy of the tail brackets its sum: a fast spectrum needs a small part of its values."""
    values = 0.8 ** np.arange(400.0)
    rule = QuantileRule(0.9)
    assert rule(values[:60], total_of(values), 400) == rule(values, total_of(values), 400)


def test_a_total_that_rounding_has_made_too_large_is_reached_by_all_values() -> None:
    """‖ΔW‖² is summed in another order than Σσ²."""
    values = np.ones(5)
    assert EnergyRule(1.0)(values, 5.0 * (1 + 1e-7), 5) == 5


@pytest.mark.parametrize(
    ("choice", "option"),
    [
        ({"rank": 0}, "--rank"),
        ({"energy": 0.0}, "--energy"),
        ({"energy": 1.1}, "--energy"),
        ({"energy": float("nan")}, "--energy"),
        ({"residual": 1.0}, "--residual"),
        ({"residual": -0.1}, "--residual"),
        ({"sv_ratio": 0.0}, "--sv-ratio"),
        ({"sv_ratio": float("inf")}, "--sv-ratio"),
        ({"sv_threshold": -1.0}, "--sv-threshold"),
        ({"sv_quantile": 0.0}, "--sv-quantile"),
        ({"energy": 0.9, "minimum": 0}, "--min-rank"),
        ({"energy": 0.9, "minimum": 8, "maximum": 4}, "--max-rank"),
        ({}, "--min-rank"),
        ({"rank": 8, "energy": 0.9}, "--min-rank"),
    ],
)
def test_values_out_of_range_are_refused_and_the_option_is_named(choice: dict[str, float], option: str) -> None:
    """With what was expected and what was found."""
    with pytest.raises(SurgeryError) as caught:
        rank_rule(**choice)
    assert {"expected", "found", "next"} <= caught.value.details.keys()
    assert option in caught.value.details["next"]


def test_rules_are_picklable_and_say_what_they_are_in_one_line() -> None:
    """They travel inside plans and stand in notes."""
    said = {
        "rank 16": rank_rule(rank=16),
        "energy ≥ 0.9, at most 64": rank_rule(energy=0.9, maximum=64),
        "residual ≤ 0.1, at least 4 and at most 64": rank_rule(residual=0.1, minimum=4, maximum=64),
        "σ > σ1 / 10": rank_rule(sv_ratio=0.1),
        "σ > 0.01": rank_rule(sv_threshold=0.01),
        "Σσ ≥ 0.8 of all, at least 2": rank_rule(sv_quantile=0.8, minimum=2),
    }
    for text, rule in said.items():
        assert str(rule) == text
        assert pickle.loads(pickle.dumps(rule)) == rule
