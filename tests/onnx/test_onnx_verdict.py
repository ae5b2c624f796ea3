from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from surgery.onnx.verdict import FEWEST_BLOCKS, decide, equivalence_p, estimate, noise_floor

MARGIN = 0.02


def _blocks(rng: np.random.Generator, ratio: float, count: int, spread: float = 0.02) -> list[float]:
    """Log-ratios as a shared machine gives them: mostly normal, one block in ten spoilt by a neighbour."""
    values = rng.normal(math.log(ratio), spread, count)
    spoilt = rng.random(count) < 0.1
    values[spoilt] += rng.standard_t(2, int(spoilt.sum())) * 5 * spread
    return list(values)


def _verdicts(ratio: float, count: int, times: int = 100, spread: float = 0.02) -> Counter[str]:
    rng = np.random.default_rng(7)
    verdicts: Counter[str] = Counter()
    for seed in range(times):
        effect = estimate(_blocks(rng, ratio, count, spread), seed=seed)
        control = estimate(_blocks(rng, 1.0, count, spread), seed=seed)
        verdicts[decide(effect, control, MARGIN)[0]] += 1
    return verdicts


def test_equal_models_are_found_equivalent() -> None:
    """With enough blocks, A against A is equivalent nearly always."""
    assert _verdicts(1.0, 60)["equivalent"] >= 95


@pytest.mark.parametrize("blocks", [15, 60])
def test_twice_the_margin_is_never_called_equivalent(blocks: int) -> None:
    """A slow-down of twice the margin passes as equivalent in no more than one of a hundred."""
    assert _verdicts(1 + 2 * MARGIN, blocks)["equivalent"] <= 1


def test_twice_the_margin_is_found() -> None:
    """With enough blocks it is called slower, and its inverse faster."""
    assert _verdicts(1 + 2 * MARGIN, 60)["slower"] >= 95
    assert _verdicts(1 / (1 + 2 * MARGIN), 60)["faster"] >= 95


def test_at_the_margin_either_claim_is_rare() -> None:
    """Exactly at the margin neither claim is true; each is made about once in twenty."""
    verdicts = _verdicts(1 + MARGIN, 60, times=200)
    assert verdicts["equivalent"] <= 20
    assert verdicts["slower"] <= 20
    assert verdicts["faster"] == 0


def test_noise_beyond_the_margin_decides_nothing() -> None:
    """Where A cannot be told from itself, neither equality nor difference is claimed."""
    assert _verdicts(1.0, 40, spread=0.2)["inconclusive"] >= 99
    loud = estimate([0.05 * (-1) ** i for i in range(20)])
    quiet = estimate([0.2 + 0.0001 * (-1) ** i for i in range(20)])
    verdict, reason = decide(quiet, loud, MARGIN)
    assert verdict == "inconclusive"
    assert "two sessions of A itself" in reason


def test_few_blocks_decide_nothing() -> None:
    """However small their spread."""
    few = estimate([0.0001 * i for i in range(FEWEST_BLOCKS - 1)])
    verdict, reason = decide(few, few, MARGIN)
    assert verdict == "inconclusive"
    assert "more seconds" in reason
    with pytest.raises(ValueError, match="3 blocks"):
        estimate([0.0, 0.1])


def test_no_difference_is_not_equivalence() -> None:
    """An interval that holds 1 and reaches across the margin says nothing."""
    rng = np.random.default_rng(0)
    wide = estimate(list(rng.normal(0, 0.08, 30)))
    assert wide.low < 0 < wide.high
    calm = estimate(list(rng.normal(0, 0.001, 30)))
    assert decide(wide, calm, MARGIN)[0] == "inconclusive"


def test_identical_blocks() -> None:
    """No spread at all: the mean alone decides."""
    same, slow = estimate([0.0] * 20), estimate([0.1] * 20)
    assert decide(same, same, MARGIN)[0] == "equivalent"
    assert decide(slow, same, MARGIN)[0] == "slower"
    assert equivalence_p(slow, MARGIN) > 0.99


def test_estimates_are_robust_and_reproducible() -> None:
    """One block in ten spoilt moves neither estimate nor floor by much; the same seed gives the same interval."""
    clean = list(np.random.default_rng(1).normal(0.01, 0.01, 50))
    spoilt = clean.copy()
    spoilt[:5] = [3.0] * 5
    assert estimate(spoilt).mean == pytest.approx(estimate(clean).mean, abs=0.004)
    assert estimate(clean, seed=3) == estimate(clean, seed=3)
    assert estimate(clean).low < 0.01 < estimate(clean).high


def test_order_and_direction_do_not_matter() -> None:
    """Swapping A and B mirrors everything."""
    values = list(np.random.default_rng(2).normal(0.03, 0.01, 40))
    forward, back = estimate(values), estimate([-v for v in values])
    assert forward.mean == pytest.approx(-back.mean)
    assert forward.p_above(0.02) == pytest.approx(back.p_below(-0.02))
    assert estimate(sorted(values)).mean == forward.mean
    assert noise_floor(forward) == pytest.approx(noise_floor(back), rel=0.05)
