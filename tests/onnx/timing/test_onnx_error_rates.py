from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
import pytest
from places import ROOT


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("error_rates")


def test_noise_is_what_it_says(rates: ModuleType) -> None:
    """No difference on average; sessions differ as told; a drift of a half cancels within blocks."""
    noise = rates.Noise("sessions", sessions=0.02, quarter=0.0, drift=0.5)
    effect, control = rates.blocks(noise, 8, 500, np.random.default_rng(0))
    assert effect.shape == control.shape == (500, 8, rates.ROUNDS)
    for ratios in (effect, control):
        assert abs(ratios.mean()) < 0.001
        assert ratios[..., 0].std() == pytest.approx(0.02, rel=0.1)
        assert np.ptp(ratios, axis=-1).max() < 1e-9
    shared = np.corrcoef(effect[..., 0].ravel(), control[..., 0].ravel())[0, 1]
    assert shared == pytest.approx(0.5, abs=0.05)  # A is in both


def test_a_row_counts_what_is_false(rates: ModuleType) -> None:
    """At the margin both claims are false; beyond it only equivalence is, within it only a difference."""
    (quiet, *_) = rates.NOISES
    at, beyond, within = (rates.row(quiet, 0.01, 32, ratio, 60) for ratio in (1.01, 1.02, 1.0))
    assert at.false == max(at.equivalent, at.slower) <= 0.15
    assert (beyond.false, beyond.slower > 0.9) == (beyond.equivalent, True)
    assert (within.false, within.equivalent > 0.8) == (within.slower, True)
    assert at.mean_seconds > within.mean_seconds
