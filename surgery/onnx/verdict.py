"""From paired log-ratios to a verdict. Pure functions: no clock, no model, no randomness that is not seeded.

A log-ratio is log(time of B / time of A) within one block of interleaved runs; an epoch is a set of blocks measured on
one pair of sessions. The question is always about a margin declared beforehand: is B within it, beyond it, or can
these blocks not tell? A difference that is merely "not significant" is never called equivalence.

Two sessions of one model differ by a per cent or so for as long as they live, so more blocks on the same sessions do
not make the mean more certain; more sessions do. An epoch therefore counts once, with its median block (a neighbour
on the machine spoils some blocks badly and most not at all), and what is tested is the mean of the epochs: by
Student's t in both directions at the margin, the two one-sided tests of Schuirmann (J. Pharmacokinet. Biopharm. 15,
1987).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

ALPHA = 0.05  # of each one-sided test; so intervals hold 90 %
FEWEST_EPOCHS = 6
RESAMPLES = 4000

Verdict = Literal["equivalent", "slower", "faster", "inconclusive"]


@dataclass(frozen=True)
class Estimate:
    """A mean log-ratio and how well it is known.

    mean: over epochs, of their median blocks.
    low, high: its 90 % bootstrap interval.
    error: its standard error.
    epochs: how many it rests on.
    """

    mean: float
    low: float
    high: float
    error: float
    epochs: int

    def p_below(self, bound: float) -> float:
        """How likely so low a mean is, were the true one at `bound`."""
        if not self.error:
            return 0.0 if self.mean < bound else 1.0
        return _student_cdf((self.mean - bound) / self.error, self.epochs - 1)

    def p_above(self, bound: float) -> float:
        """How likely so high a mean is, were the true one at `bound`."""
        return Estimate(-self.mean, -self.high, -self.low, self.error, self.epochs).p_below(-bound)


def estimate(epochs: Sequence[Sequence[float]], *, seed: int = 0) -> Estimate:
    """The mean log-ratio over epochs, with a bootstrap interval over them.

    The bootstrap alone makes intervals too narrow where epochs are few: by √((n − 1) / n), because a sample is narrower
    than what it came from, and by what sets Student's quantile apart from the normal one. Both are put back.

    Args:
        epochs: for each epoch, the log-ratios of its blocks, at least one.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than two epochs, of which no spread can be said.
    """
    n = len(epochs)
    if n < 2:
        raise ValueError(f"an estimate needs at least 2 epochs, found {n}")
    medians = np.array([np.median(blocks) for blocks in epochs])  # (epochs,)
    mean = float(medians.mean())
    draws = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    low, high = np.quantile(medians[draws].mean(axis=1) - mean, [ALPHA, 1 - ALPHA]) * _widening(n)
    return Estimate(mean, mean + float(low), mean + float(high), float(medians.std(ddof=1)) / math.sqrt(n), n)


def noise_floor(control: Estimate) -> float:
    """The smallest margin (as a ratio, 0.01 for 1 %) within which sessions of one model are shown to be equal."""
    return math.expm1(max(abs(control.low), abs(control.high)))


def equivalence_p(effect: Estimate, margin: float) -> float:
    """The p-value of the two one-sided tests: small where the ratio lies within 1 ± margin."""
    bound = math.log1p(margin)
    return max(effect.p_below(bound), effect.p_above(-bound))


def decide(effect: Estimate, control: Estimate, margin: float) -> tuple[Verdict, str]:
    """The verdict on B against A, and its reason in a sentence.

    equivalent: the ratio is shown to lie within the margin, by test and by interval.
    slower, faster: it is shown to lie beyond it.
    inconclusive: neither; or the control says that this machine cannot tell such a margin now.
    """
    bound = math.log1p(margin)
    fewest = min(effect.epochs, control.epochs)
    floor = noise_floor(control)
    if fewest < FEWEST_EPOCHS:
        return "inconclusive", (
            f"there was time for {fewest} sets of sessions, at least {FEWEST_EPOCHS} are needed: give it more seconds"
        )
    if floor > margin:
        return "inconclusive", (
            f"two sessions of A itself differ by up to {floor:.1%}, more than the margin of {margin:.1%}: "
            "quieten the machine, or give it more seconds"
        )
    if equivalence_p(effect, margin) < ALPHA and -bound < effect.low and effect.high < bound:
        return "equivalent", f"the ratio lies within {margin:.1%} of 1"
    if effect.p_above(bound) < ALPHA and effect.low > bound:
        return "slower", f"B takes longer than A by more than {margin:.1%}"
    if effect.p_below(-bound) < ALPHA and effect.high < -bound:
        return "faster", f"B takes less time than A by more than {margin:.1%}"
    return "inconclusive", "the interval reaches across the margin: give it more seconds, or declare another margin"


def _widening(n: int) -> float:
    """What a percentile bootstrap of n means lacks; the quantile's ratio by Abramowitz & Stegun 26.7.5, first term."""
    z = NormalDist().inv_cdf(1 - ALPHA)
    return math.sqrt(n / (n - 1)) * (1 + (z * z + 1) / (4 * (n - 1)))


def _student_cdf(t: float, freedom: int) -> float:
    """Student's distribution by its normal approximation (Abramowitz & Stegun 26.7.8), good to 0.005 from 5 degrees."""
    z = t * (1 - 1 / (4 * freedom)) / math.sqrt(1 + t * t / (2 * freedom))
    return NormalDist().cdf(z)
