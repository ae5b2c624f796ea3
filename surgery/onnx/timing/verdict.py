"""From paired log-ratios to a verdict. Pure functions: no clock, no model, no randomness that is not seeded.

A log-ratio is log(time of the graph / time of the reference) within one block of interleaved runs; an epoch is a set of
blocks measured on one set of sessions. The question is always about a margin declared beforehand: is the graph within
it, beyond it, or can these blocks not tell? A difference that is merely "not significant" is never called equivalence.

Two sessions of one model differ by a per cent or so for as long as they live, so more blocks on the same sessions do
not make the mean more certain; more sessions do. An epoch therefore counts once, with its median block (a neighbour
on the machine spoils some blocks badly and most not at all), and what is tested is the mean of the epochs: by
Student's t in both directions at the margin, the two one-sided tests of Schuirmann (J. Pharmacokinet. Biopharm. 15,
1987).

The tests are made at looks, while epochs come in, and the first clear answer ends the run. Each claim's error over
all looks stays below ALPHA, since the looks share it: by a share t of the time, ALPHA·t² is spent (a spending function
as of Lan & DeMets, Biometrika 70, 1983, over calendar time as in their Statist. Med. 8, 1989; its shape is Kim &
DeMets's, Biometrika 74, 1987, with ρ = 2), and a look's tests have the level that was not spent before. That levels
may be added up holds for any dependence between looks (Bonferroni's inequality), so nothing about it needs to be known;
what the dependence would have saved is about a tenth of the time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from surgery.onnx.timing.record import Verdict

ALPHA = 0.05  # of each claim, over all looks; so intervals hold at least 90 %
LOOKS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # shares of the time
FEWEST_EPOCHS = 6
RESAMPLES = 4000
_POWER = 0.8  # of what is said about how much longer it would take
_HOPELESS = 100  # times as many epochs: then nothing is said


@dataclass(frozen=True)
class Estimate:
    """A mean log-ratio and how well it is known.

    epochs: the median block of each; at least two, or no spread can be said.
    """

    epochs: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.epochs) < 2:
            raise ValueError(f"an estimate needs at least 2 epochs, found {len(self.epochs)}")

    @property
    def mean(self) -> float:
        """Of the epochs."""
        return math.fsum(self.epochs) / len(self.epochs)

    @property
    def spread(self) -> float:
        """Standard deviation of the epochs."""
        mean = self.mean
        return math.sqrt(math.fsum((each - mean) ** 2 for each in self.epochs) / (len(self.epochs) - 1))

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.spread / math.sqrt(len(self.epochs))

    def p_below(self, bound: float) -> float:
        """How likely so low a mean is, were the true one at `bound`."""
        error = self.error
        if not error:
            return 0.0 if self.mean < bound else 1.0
        return student_cdf((self.mean - bound) / error, len(self.epochs) - 1)

    def p_above(self, bound: float) -> float:
        """How likely so high a mean is, were the true one at `bound`."""
        return Estimate(tuple(-each for each in self.epochs)).p_below(-bound)

    def interval(self, level: float = ALPHA, *, seed: int = 0) -> tuple[float, float]:
        """Bootstrap interval of the mean; on either side `level` is left out.

        Resampled means give its shape by their 5 % quantiles. Those alone are too near to each other where epochs are
        few: by √((n − 1) / n), because a sample is narrower than what it came from, and by what sets Student's quantile
        apart from the normal one. Both are put back, and Student's quantile is that of `level`.
        """
        values = np.array(self.epochs)
        n = len(values)
        reached = np.quantile(values[_draws(n, seed)].mean(axis=1) - values.mean(), [ALPHA, 1 - ALPHA])
        widening = (
            math.sqrt(n / (n - 1)) * student_quantile(1 - level, n - 1) / statistics.NormalDist().inv_cdf(1 - ALPHA)
        )
        low, high = reached * widening
        return self.mean + float(low), self.mean + float(high)


@dataclass(frozen=True)
class Ruling:
    """A verdict and what it rests on.

    verdict: see `decide`.
    reason: of it, in a sentence.
    effect, control: of the graph against the reference, and of the reference against itself.
    looks: how often it was tried.
    level: of each test at the last look.
    missing: if inconclusive, how many more epochs would probably tell; None if that cannot be said.
    """

    verdict: Verdict
    reason: str
    effect: Estimate
    control: Estimate
    looks: int
    level: float
    missing: int | None


def follow(epochs: Iterable[tuple[Sequence[float], Sequence[float], float]], margin: float, *, seed: int = 0) -> Ruling:
    """Takes epochs as they come until the answer is clear or there are no more.

    Args:
        epochs: for each, the log-ratios of its blocks, those of the control, and the share of the time that is gone;
            the last one's share is 1.
        margin: what was declared: 0.01 means within 1 % of the reference.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than two epochs, of which no spread can be said.
    """
    taken: list[float] = []
    controls: list[float] = []
    verdict: Verdict = "inconclusive"
    spent, looks, level, due = 0.0, 0, ALPHA, LOOKS[0]
    for blocks, control, share in epochs:
        taken.append(statistics.median(blocks))
        controls.append(statistics.median(control))
        if share < due or len(taken) < FEWEST_EPOCHS:
            continue
        due = min((look for look in LOOKS if look > share), default=math.inf)
        level, spent = ALPHA * share**2 - spent, ALPHA * share**2
        looks += 1
        verdict = decide(Estimate(tuple(taken)), Estimate(tuple(controls)), margin, level, seed=seed)
        if verdict != "inconclusive":
            break
    effect, noise = Estimate(tuple(taken)), Estimate(tuple(controls))
    reason = _reason(verdict, noise, margin, seed)
    missing = None if verdict != "inconclusive" else _missing(effect, noise, margin)
    return Ruling(verdict, reason, effect, noise, looks, level, missing)


def noise_floor(control: Estimate, *, seed: int = 0) -> float:
    """The smallest margin (as a ratio, 0.01 for 1 %) within which sessions of one model are shown to be equal."""
    return math.expm1(max(map(abs, control.interval(seed=seed))))


def equivalence_p(effect: Estimate, margin: float) -> float:
    """The p-value of the two one-sided tests: small where the ratio lies within 1 ± margin."""
    bound = math.log1p(margin)
    return max(effect.p_below(bound), effect.p_above(-bound))


def decide(effect: Estimate, control: Estimate, margin: float, level: float = ALPHA, *, seed: int = 0) -> Verdict:
    """The verdict at one look.

    equivalent: the ratio is shown to lie within the margin, by test and by interval.
    slower, faster: it is shown to lie beyond it.
    inconclusive: neither; or the control says that this machine cannot tell such a margin now.
    """
    bound = math.log1p(margin)
    tests: dict[Verdict, float] = {
        "equivalent": equivalence_p(effect, margin),
        "slower": effect.p_above(bound),
        "faster": effect.p_below(-bound),
    }
    claimed = min(tests, key=lambda verdict: tests[verdict])
    if tests[claimed] >= level or noise_floor(control, seed=seed) > margin:
        return "inconclusive"
    low, high = effect.interval(level, seed=seed)
    shown = {"equivalent": -bound < low and high < bound, "slower": low > bound, "faster": high < -bound}
    return claimed if shown[claimed] else "inconclusive"


def _reason(verdict: Verdict, control: Estimate, margin: float, seed: int) -> str:
    """The last look's verdict, in a sentence's part."""
    if verdict == "equivalent":
        return f"the ratio lies within {margin:.1%} of 1"
    if verdict != "inconclusive":
        return (
            f"it takes {'longer' if verdict == 'slower' else 'less time'} than the reference by more than {margin:.1%}"
        )
    if len(control.epochs) < FEWEST_EPOCHS:
        return f"there was time for {len(control.epochs)} sets of sessions, at least {FEWEST_EPOCHS} are needed"
    floor = noise_floor(control, seed=seed)
    if floor > margin:
        return f"two sessions of the reference itself differ by up to {floor:.1%}, more than the margin of {margin:.1%}"
    return "the interval reaches across the margin"


def _missing(effect: Estimate, control: Estimate, margin: float) -> int | None:
    """How many more epochs would tell with a probability of _POWER, if ratio and spread are what they seem.

    That is n = ((t + z)·s / d)² for a mean that is d away from what it must be told from: the control from the margin,
    with a true mean of 0, and the effect from the nearer margin.
    """
    have = len(effect.epochs)
    bound = math.log1p(margin)
    last = ALPHA * (1 - LOOKS[-2] ** 2)
    reach = student_quantile(1 - last, have - 1) + statistics.NormalDist().inv_cdf(_POWER)
    room = abs(abs(effect.mean) - bound)
    if not room:
        return None
    wanted = max((reach * control.spread / bound) ** 2, (reach * effect.spread / room) ** 2)
    if wanted > _HOPELESS * have:
        return None
    return max(math.ceil(wanted), FEWEST_EPOCHS, have + 1) - have


@lru_cache(maxsize=4)
def _draws(n: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Which epochs each resample takes: (RESAMPLES, n)."""
    return np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))


def student_cdf(t: float, freedom: int) -> float:
    """Student's distribution for whole degrees of freedom, exactly (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2
    term, total = 1.0, 0.0
    for k in range(1 + odd, freedom, 2):  # the terms cos^(k-1-odd), each from the one before it
        total += term
        term *= square * k / (k + 1)
    between = 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total) if odd else math.sin(angle) * total
    return 0.5 * (1 + between)


def student_quantile(p: float, freedom: int) -> float:
    """Where `student_cdf` reaches p, for p of 0.5 or more, by bisection."""
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < p:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < p else (low, middle)
    return high
