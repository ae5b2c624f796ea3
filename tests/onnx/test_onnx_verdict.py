from __future__ import annotations

import math
from collections import Counter
from functools import cache

import numpy as np
import pytest

from surgery.onnx.verdict import FEWEST_EPOCHS, Estimate, decide, equivalence_p, estimate, noise_floor

MARGIN = 0.02


def _epochs(rng: np.random.Generator, ratio: float, epochs: int, spread: float = 0.02) -> list[list[float]]:
    """Log-ratios as a shared machine gives them: sessions that differ by a per cent for as long as they live, blocks
    mostly normal, and one in ten spoilt by a neighbour."""
    blocks = rng.normal(math.log(ratio), spread, (epochs, 8)) + rng.normal(0, 0.01, (epochs, 1))
    spoilt = rng.random(blocks.shape) < 0.1
    blocks[spoilt] += rng.standard_t(2, int(spoilt.sum())) * 5 * spread
    return [list(epoch) for epoch in blocks]


@cache
def _simulated(ratio: float, epochs: int, times: int = 200, spread: float = 0.02) -> tuple[Counter[str], float]:
    """How often each verdict is drawn, and how often the interval holds the truth."""
    rng = np.random.default_rng(7)
    verdicts: Counter[str] = Counter()
    held = 0
    for seed in range(times):
        effect = estimate(_epochs(rng, ratio, epochs, spread), seed=seed)
        control = estimate(_epochs(rng, 1.0, epochs, spread), seed=seed)
        verdicts[decide(effect, control, MARGIN)[0]] += 1
        held += effect.low <= math.log(ratio) <= effect.high
    return verdicts, held / times


def _steady(value: float, epochs: int = 16, wobble: float = 0.0) -> Estimate:
    return estimate([[value + wobble * (-1) ** i] * 3 for i in range(epochs)])


def test_equal_models_are_found_equivalent() -> None:
    """With enough epochs, A against A is equivalent nearly always."""
    assert _simulated(1.0, 16)[0]["equivalent"] >= 190


@pytest.mark.parametrize("epochs", [6, 16])
def test_twice_the_margin_is_never_called_equivalent(epochs: int) -> None:
    """A slow-down of twice the margin passes as equivalent in no more than one of a hundred."""
    assert _simulated(1 + 2 * MARGIN, epochs)[0]["equivalent"] <= 2


def test_twice_the_margin_is_found() -> None:
    """With enough epochs it is called slower, and its inverse faster."""
    assert _simulated(1 + 2 * MARGIN, 16)[0]["slower"] >= 190
    assert _simulated(1 / (1 + 2 * MARGIN), 16)[0]["faster"] >= 190


@pytest.mark.parametrize("epochs", [6, 16])
def test_at_the_margin_either_claim_is_rare(epochs: int) -> None:
    """Exactly at the margin neither claim is true; each is made no more than about once in twenty."""
    verdicts = _simulated(1 + MARGIN, epochs)[0]
    assert verdicts["equivalent"] <= 18
    assert verdicts["slower"] <= 18
    assert verdicts["faster"] == 0


@pytest.mark.parametrize(("ratio", "epochs"), [(1.0, 6), (1.0, 16), (1 + MARGIN, 6), (1 + MARGIN, 16)])
def test_intervals_hold_what_they_promise(ratio: float, epochs: int) -> None:
    """Nine in ten hold the true ratio, though blocks of one epoch are alike."""
    assert 0.84 <= _simulated(ratio, epochs)[1] <= 0.97


def test_noise_beyond_the_margin_decides_nothing() -> None:
    """Where A cannot be told from itself, neither equality nor difference is claimed."""
    assert _simulated(1.0, 16, times=50, spread=0.5)[0]["inconclusive"] >= 49
    verdict, reason = decide(_steady(0.2, wobble=0.0001), _steady(0, wobble=0.1), MARGIN)
    assert verdict == "inconclusive"
    assert "two sessions of A itself" in reason


def test_few_epochs_decide_nothing() -> None:
    """However small their spread, and however many blocks they hold."""
    few = _steady(0.0001, FEWEST_EPOCHS - 1)
    verdict, reason = decide(few, few, MARGIN)
    assert verdict == "inconclusive"
    assert "more seconds" in reason
    with pytest.raises(ValueError, match="2 epochs"):
        estimate([[0.0, 0.1, 0.2]])


def test_no_difference_is_not_equivalence() -> None:
    """An interval that holds 1 and reaches across the margin says nothing."""
    wide = _steady(0.001, wobble=0.06)
    assert wide.low < 0 < wide.high
    assert decide(wide, _steady(0, wobble=0.001), MARGIN)[0] == "inconclusive"


def test_identical_blocks() -> None:
    """No spread at all: the mean alone decides."""
    same, slow = _steady(0.0), _steady(0.1)
    assert decide(same, same, MARGIN)[0] == "equivalent"
    assert decide(slow, same, MARGIN)[0] == "slower"
    assert equivalence_p(slow, MARGIN) > 0.99


def test_estimates_are_robust_and_reproducible() -> None:
    """A spoilt block in every epoch moves nothing by much; the same seed gives the same interval."""
    clean = [list(epoch) for epoch in np.random.default_rng(1).normal(0.01, 0.01, (10, 7))]
    spoilt = [[3.0, *epoch[1:]] for epoch in clean]
    assert estimate(spoilt).mean == pytest.approx(estimate(clean).mean, abs=0.004)
    assert estimate(clean, seed=3) == estimate(clean, seed=3)
    assert estimate(clean).low < 0.01 < estimate(clean).high


def test_order_and_direction_do_not_matter() -> None:
    """Swapping A and B mirrors everything."""
    values = [list(epoch) for epoch in np.random.default_rng(2).normal(0.03, 0.01, (12, 5))]
    forward, back = estimate(values), estimate([[-v for v in epoch] for epoch in values])
    assert forward.mean == pytest.approx(-back.mean)
    assert forward.p_above(0.02) == pytest.approx(back.p_below(-0.02))
    assert estimate([sorted(epoch) for epoch in values]).mean == forward.mean
    assert noise_floor(forward) == pytest.approx(noise_floor(back), rel=0.05)
