from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest

from surgery.onnx.timing import verdict
from surgery.onnx.timing.verdict import (
    ALPHA,
    FEWEST_EPOCHS,
    LOOKS,
    Estimate,
    Ruling,
    decide,
    equivalence_p,
    follow,
    noise_floor,
    student_cdf,
    student_quantile,
)

MARGIN = 0.02


def _epochs(rng: np.random.Generator, ratio: float, epochs: int, spread: float = 0.02) -> list[list[float]]:
    """Log-ratios as a shared machine gives them: sessions that differ by a per cent for as long as they live, blocks
    mostly normal, and one in ten spoilt by a neighbour."""
    blocks = rng.normal(math.log(ratio), spread, (epochs, 8)) + rng.normal(0, 0.01, (epochs, 1))
    spoilt = rng.random(blocks.shape) < 0.1
    blocks[spoilt] += rng.standard_t(2, int(spoilt.sum())) * 5 * spread
    return [list(epoch) for epoch in blocks]


def _ruled(effect: list[list[float]], control: list[list[float]], margin: float = MARGIN) -> Ruling:
    """The verdict on a run of so many epochs."""
    shares = [(i + 1) / len(effect) for i in range(len(effect))]
    return follow(zip(effect, control, shares, strict=True), margin)


@cache
def _simulated(ratio: float, epochs: int, times: int = 200, spread: float = 0.02) -> tuple[Counter[str], float]:
    """How often each verdict is drawn, and how often the interval at its look holds the truth."""
    rng = np.random.default_rng(7)
    verdicts: Counter[str] = Counter()
    held = 0
    for _ in range(times):
        ruling = _ruled(_epochs(rng, ratio, epochs, spread), _epochs(rng, 1.0, epochs, spread))
        verdicts[ruling.verdict] += 1
        low, high = ruling.effect.interval(ruling.level)
        held += low <= math.log(ratio) <= high
    return verdicts, held / times


def _steady(value: float, epochs: int = 16, wobble: float = 0.0) -> Estimate:
    return Estimate(tuple(value + wobble * (-1) ** i for i in range(epochs)))


def test_equal_models_are_found_equivalent() -> None:
    """With enough epochs, A against A is equivalent nearly always."""
    assert _simulated(1.0, 16)[0]["equivalent"] >= 190


@pytest.mark.parametrize("epochs", [6, 16])
def test_twice_the_margin_is_never_called_equivalent(epochs: int) -> None:
    """A slow-down of twice the margin passes as equivalent in no more than one of a hundred."""
    assert _simulated(1 + 2 * MARGIN, epochs)[0]["equivalent"] <= 2


def test_twice_the_margin_is_found() -> None:
    """With enough epochs it is called slower, and its inverse faster."""
    assert _simulated(1 + 2 * MARGIN, 16)[0]["slower"] >= 185
    assert _simulated(1 / (1 + 2 * MARGIN), 16)[0]["faster"] >= 185


@pytest.mark.parametrize("epochs", [6, 16])
def test_at_the_margin_either_claim_is_rare(epochs: int) -> None:
    """Exactly at the margin neither claim is true; all looks together make each no more than once in twenty."""
    verdicts = _simulated(1 + MARGIN, epochs)[0]
    assert verdicts["equivalent"] <= 15
    assert verdicts["slower"] <= 15
    assert verdicts["faster"] == 0


@pytest.mark.parametrize(("ratio", "epochs"), [(1.0, 6), (1.0, 16), (1 + MARGIN, 6), (1 + MARGIN, 16)])
def test_intervals_hold_what_they_promise(ratio: float, epochs: int) -> None:
    """Nine in ten hold the true ratio, though blocks of one epoch are alike and a clear answer ends a run."""
    assert _simulated(ratio, epochs)[1] >= 0.85


def test_a_clear_answer_ends_the_run() -> None:
    """No more epochs are asked for, and the share of ALPHA that a look has is smaller than the last one's."""
    asked = 0

    def endless() -> Iterator[tuple[list[float], list[float], float]]:
        nonlocal asked
        for i in range(400):
            asked += 1
            yield [0.2 + 0.001 * (-1) ** i], [0.001 * (-1) ** i], (i + 1) / 400

    ruling = follow(endless(), MARGIN)
    assert (ruling.verdict, ruling.looks, asked) == ("slower", 1, 50)
    assert ruling.level == pytest.approx(ALPHA * LOOKS[0] ** 2)


@pytest.mark.parametrize(
    "shares", [[i / 16 for i in range(1, 17)], [0.1, 0.2, 0.3, 0.4, 0.45, 0.6, 1.0], [0.01] * 6 + [1.0]]
)
def test_looks_share_what_one_test_may_err(shares: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The levels of all looks add up to ALPHA, also where a run ends before its time or epochs come late."""
    levels = []

    def unclear(effect: Estimate, control: Estimate, margin: float, level: float, *, seed: int) -> str:
        levels.append(level)
        return "inconclusive"

    monkeypatch.setattr(verdict, "decide", unclear)
    follow([([0.0], [0.0], share) for share in shares], MARGIN)
    assert sum(levels) == pytest.approx(ALPHA)
    assert min(levels) > 0


def test_noise_beyond_the_margin_decides_nothing() -> None:
    """Where A cannot be told from itself, neither equality nor difference is claimed."""
    assert _simulated(1.0, 16, times=50, spread=0.5)[0]["inconclusive"] >= 49
    assert decide(_steady(0.2, wobble=0.0001), _steady(0, wobble=0.1), MARGIN) == "inconclusive"
    noisy = [[0.1 * (-1) ** i] for i in range(16)]
    ruling = _ruled([[0.2]] * 16, noisy)
    assert "two sessions of the reference itself" in ruling.reason
    assert ruling.missing is not None
    assert ruling.missing > 16  # a spread of five margins takes a hundred epochs and more


def test_few_epochs_decide_nothing() -> None:
    """However small their spread, and however many blocks they hold."""
    few = [[0.0001] * 20] * (FEWEST_EPOCHS - 1)
    ruling = _ruled(few, few)
    assert (ruling.verdict, ruling.looks) == ("inconclusive", 0)
    assert f"at least {FEWEST_EPOCHS}" in ruling.reason
    assert ruling.missing == 1
    with pytest.raises(ValueError, match="2 epochs"):
        follow([([0.0], [0.0], 1.0)], MARGIN)


def test_what_it_would_take_is_said_where_it_can_be() -> None:
    """Half the spread, a quarter of the epochs; at the very margin nothing helps, and nothing is said."""
    wide = _ruled([[0.03 * (-1) ** i] for i in range(8)], [[0.0]] * 8)
    narrow = _ruled([[0.015 * (-1) ** i] for i in range(8)], [[0.0]] * 8)
    assert wide.verdict == "inconclusive"
    assert wide.missing is not None
    assert narrow.missing is None or (8 + wide.missing) / (8 + narrow.missing) == pytest.approx(4, rel=0.2)
    hopeless = [[math.log1p(MARGIN) + 0.01 * (-1) ** i] for i in range(8)]
    assert _ruled(hopeless, [[0.0]] * 8).missing is None


def test_no_difference_is_not_equivalence() -> None:
    """An interval that holds 1 and reaches across the margin says nothing."""
    wide = _steady(0.001, wobble=0.06)
    low, high = wide.interval()
    assert low < 0 < high
    assert decide(wide, _steady(0, wobble=0.001), MARGIN) == "inconclusive"


def test_identical_blocks() -> None:
    """No spread at all: the mean alone decides."""
    same, slow = _steady(0.0), _steady(0.1)
    assert decide(same, same, MARGIN) == "equivalent"
    assert decide(slow, same, MARGIN) == "slower"
    assert equivalence_p(slow, MARGIN) > 0.99


def test_estimates_are_robust_and_reproducible() -> None:
    """A spoilt block in every epoch moves nothing by much; the same seed gives the same interval."""
    clean = [list(epoch) for epoch in np.random.default_rng(1).normal(0.01, 0.01, (10, 7))]
    spoilt = [[3.0, *epoch[1:]] for epoch in clean]
    still = [[0.0]] * 10
    assert _ruled(spoilt, still).effect.mean == pytest.approx(_ruled(clean, still).effect.mean, abs=0.004)
    found = _ruled(clean, still).effect
    assert found.interval(seed=3) == found.interval(seed=3)
    assert found.interval()[0] < 0.01 < found.interval()[1]
    assert found.interval(0.001)[0] < found.interval()[0]


def test_order_and_direction_do_not_matter() -> None:
    """Swapping A and B mirrors everything."""
    forward = Estimate(tuple(np.random.default_rng(2).normal(0.03, 0.01, 12).tolist()))
    back = Estimate(tuple(-value for value in forward.epochs))
    assert forward.mean == pytest.approx(-back.mean)
    assert forward.p_above(0.02) == pytest.approx(back.p_below(-0.02))
    assert noise_floor(forward) == pytest.approx(noise_floor(back), rel=0.05)


@pytest.mark.parametrize(
    ("freedom", "t", "p"),
    [(1, 6.313752, 0.95), (2, 2.919986, 0.95), (5, 2.015048, 0.95), (5, 5.893430, 0.999), (30, 2.749996, 0.995)],
)
def test_students_distribution(freedom: int, t: float, p: float) -> None:
    """As the tables have it."""
    assert student_cdf(t, freedom) == pytest.approx(p, abs=1e-7)
    assert student_cdf(-t, freedom) == pytest.approx(1 - p, abs=1e-7)
    assert student_quantile(p, freedom) == pytest.approx(t, rel=1e-6)
