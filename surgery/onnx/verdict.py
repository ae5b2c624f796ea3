"""From paired log-ratios to a verdict. Pure functions: no clock, no model, no randomness that is not seeded.

A log-ratio is log(time of B / time of A) within one block of interleaved runs. The question is always about a margin
declared beforehand: is B within it, beyond it, or can these blocks not tell? A difference that is merely "not
significant" is never called equivalence.

The mean is a 20 % trimmed one, because a neighbour on the machine spoils some blocks badly and most not at all; its
test is Yuen's (The two-sample trimmed t for unequal population variances, Biometrika 61, 1974), in both directions at
the margin: two one-sided tests (Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

ALPHA = 0.05  # of each one-sided test; so intervals hold 90 %
TRIM = 0.2
FEWEST_BLOCKS = 12
RESAMPLES = 4000

Verdict = Literal["equivalent", "slower", "faster", "inconclusive"]


@dataclass(frozen=True)
class Estimate:
    """A mean log-ratio and how well it is known.

    mean: the trimmed mean.
    low, high: its 90 % bootstrap interval.
    error: its standard error, by Yuen's winsorised variance.
    blocks: how many blocks it rests on.
    """

    mean: float
    low: float
    high: float
    error: float
    blocks: int

    def p_below(self, bound: float) -> float:
        """How likely so low a mean is, were the true one at `bound`."""
        kept = self.blocks - 2 * _trimmed(self.blocks)
        if not self.error:
            return 0.0 if self.mean < bound else 1.0
        return _student_cdf((self.mean - bound) / self.error, kept - 1)

    def p_above(self, bound: float) -> float:
        """How likely so high a mean is, were the true one at `bound`."""
        return Estimate(-self.mean, -self.high, -self.low, self.error, self.blocks).p_below(-bound)


def estimate(log_ratios: Sequence[float], *, seed: int = 0) -> Estimate:
    """The robust mean of paired log-ratios, with a bootstrap interval over blocks.

    Raises:
        ValueError: fewer than three blocks, of which no spread can be said.
    """
    values = np.sort(np.asarray(log_ratios, dtype=np.float64))  # (blocks,)
    n = len(values)
    if n < 3:
        raise ValueError(f"an estimate needs at least 3 blocks, found {n}")
    g = _trimmed(n)
    winsorised = np.clip(values, values[g], values[n - g - 1])
    kept = n - 2 * g
    error = math.sqrt(((winsorised - winsorised.mean()) ** 2).sum() / (kept * (kept - 1)))
    draws = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    resampled = np.sort(values[draws], axis=1)[:, g : n - g].mean(axis=1)  # (resamples,)
    low, high = np.quantile(resampled, [ALPHA, 1 - ALPHA])
    return Estimate(float(values[g : n - g].mean()), float(low), float(high), error, n)


def noise_floor(control: Estimate) -> float:
    """The smallest margin (as a ratio, 0.01 for 1 %) within which two sessions of one model are shown to be equal."""
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
    fewest = min(effect.blocks, control.blocks)
    floor = noise_floor(control)
    if fewest < FEWEST_BLOCKS:
        return "inconclusive", f"{fewest} blocks are too few, at least {FEWEST_BLOCKS} are needed: give it more seconds"
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


def _trimmed(n: int) -> int:
    """Blocks left out at each end."""
    return int(TRIM * n)


def _student_cdf(t: float, freedom: int) -> float:
    """Student's distribution by its normal approximation (Abramowitz & Stegun 26.7.8), good to 0.003 from 6 degrees."""
    z = t * (1 - 1 / (4 * freedom)) / math.sqrt(1 + t * t / (2 * freedom))
    return NormalDist().cdf(z)
