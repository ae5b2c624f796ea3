from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import SurgeryError
from surgery.ranks.budget import Claim, allocate, captured

SPECTRA = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=24).map(lambda values: np.array(sorted(values)[::-1]))
CLAIMS = st.lists(
    st.tuples(SPECTRA, st.integers(1, 9), st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=6
).map(
    lambda drawn: [
        Claim(f"w{index}", values**2, len(values), cost, minimum, minimum + more)
        for index, (values, cost, minimum, more) in enumerate(drawn)
    ]
)


def size_of(claims: list[Claim], ranks: dict[str, int]) -> int:
    """Bytes of factors of these ranks."""
    return sum(claim.bytes_per_rank * ranks[claim.name] for claim in claims)


def least_of(claims: list[Claim]) -> int:
    """Bytes of the minimum ranks."""
    return size_of(claims, {claim.name: claim.least for claim in claims})


def at_most(claims: list[Claim], budget: int) -> float:
    """What no choice of ranks within the budget can exceed: columns in order of their yield, and a part of the next."""
    columns = sorted(
        (
            (float(energy) / claim.bytes_per_rank, claim.bytes_per_rank)
            for claim in claims
            for energy in claim.energies[claim.least : claim.most]
        ),
        reverse=True,
    )
    room = budget - least_of(claims)
    total = captured(claims, {claim.name: claim.least for claim in claims})
    for gain, cost in columns:
        total += gain * min(cost, room)
        room -= min(cost, room)
    return total


def one_column(claims: list[Claim]) -> float:
    """The most that a single column above the minimum holds."""
    return max((float(energy) for claim in claims for energy in claim.energies[claim.least : claim.most]), default=0.0)


@given(CLAIMS, st.integers(0, 400))
@settings(max_examples=300)
def test_a_budget_is_kept_and_used_up(claims: list[Claim], extra: int) -> None:
    """Within the bounds of each weight, and until no further column fits."""
    budget = 77 + least_of(claims) + extra
    given_out = allocate(claims, budget, fixed=77)
    assert given_out.nbytes == 77 + size_of(claims, given_out.ranks) <= budget
    assert not given_out.saturated
    for claim in claims:
        rank = given_out.ranks[claim.name]
        assert claim.least <= rank <= claim.most
        assert rank == claim.most or claim.bytes_per_rank > budget - given_out.nbytes


@given(CLAIMS.filter(lambda claims: len(claims) <= 3), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_no_other_ranks_within_the_budget_capture_more(claims: list[Claim], extra: int) -> None:
    """Brute force; up to one column, since columns cannot be split."""
    budget = least_of(claims) + extra
    given_out = allocate(claims, budget)
    ours = captured(claims, given_out.ranks)
    choices = itertools.product(*(range(claim.least, claim.most + 1) for claim in claims))
    named = (dict(zip((claim.name for claim in claims), choice, strict=True)) for choice in choices)
    best = max(captured(claims, ranks) for ranks in named if size_of(claims, ranks) <= budget)
    assert best <= at_most(claims, budget) * (1 + 1e-9)
    assert at_most(claims, budget) <= (ours + one_column(claims)) * (1 + 1e-9)


@given(CLAIMS, st.integers(1, 24))
def test_a_budget_beats_the_uniform_rank_of_its_size(claims: list[Claim], rank: int) -> None:
    """Any uniform rank, clamped to each weight's bounds."""
    uniform = {claim.name: min(max(rank, claim.least), claim.most) for claim in claims}
    budget = size_of(claims, uniform)
    given_out = allocate(claims, budget)
    ours, theirs = captured(claims, given_out.ranks), captured(claims, uniform)
    assert theirs <= ours * (1 + 1e-9)


@given(CLAIMS, st.integers(0, 200), st.integers(0, 50))
def test_a_larger_budget_captures_no_less(claims: list[Claim], extra: int, more: int) -> None:
    """Up to one column: what a smaller budget fills its end with may be better than what a larger one does."""
    budget = least_of(claims) + extra
    small, large = (captured(claims, allocate(claims, size).ranks) for size in (budget, budget + more))
    assert large + one_column(claims) >= small * (1 - 1e-12)


@given(CLAIMS, st.integers(0, 200), st.randoms())
def test_the_order_of_the_weights_does_not_matter(claims: list[Claim], extra: int, random: object) -> None:
    """Ties are broken by name."""
    budget = least_of(claims) + extra
    shuffled = list(claims)
    random.shuffle(shuffled)
    assert allocate(claims, budget).ranks == allocate(shuffled, budget).ranks


def test_weights_of_which_too_little_is_known_are_named() -> None:
    """One that takes all its known values and could take more; not one at its maximum or with all values known."""
    claims = [
        Claim("short", np.array([9.0, 8.0]), 10, 1),
        Claim("whole", np.array([9.0, 8.0]), 2, 1),
        Claim("capped", np.array([9.0, 8.0]), 10, 1, maximum=2),
        Claim("modest", np.array([1.0, 0.1, 0.01]), 10, 1),
    ]
    given_out = allocate(claims, 8)
    assert given_out.ranks == {"short": 2, "whole": 2, "capped": 2, "modest": 2}
    assert given_out.saturated == ("short",)


def test_a_budget_below_the_least_ranks_is_refused_with_the_least_budget() -> None:
    """The bytes that no rank changes are counted, and that budget is then enough."""
    claims = [Claim("a", np.ones(4), 4, 1000, minimum=2), Claim("b", np.ones(1), 1, 500, minimum=2)]
    with pytest.raises(SurgeryError, match="too small") as caught:
        allocate(claims, 12_499, fixed=10_000)
    assert caught.value.details["expected"].startswith("at least 12,500 bytes")
    assert allocate(claims, 12_500, fixed=10_000).ranks == {"a": 2, "b": 1}


def test_four_million_columns_take_about_a_second() -> None:
    """A thousand weights of 4096 values each, any part of them affordable; twice the goal, for slow machines."""
    random = np.random.default_rng(0)
    energies = np.sort(random.random((1000, 4096)), axis=1)[:, ::-1]
    claims = [Claim(f"layer {index}", row, 4096, 8192 + index) for index, row in enumerate(energies)]
    begin = time.process_time()
    allocate(claims, 10**10)
    assert time.process_time() - begin < 2.0
