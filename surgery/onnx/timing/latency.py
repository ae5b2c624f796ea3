"""How long two ONNX graphs take, measured so that their ratio can be believed.

All sessions live in one process with the same options and preallocated buffers. A block runs A B B A (or B A A B, by
lot), which cancels any steady drift, and gives one log-ratio of medians. Each round holds one block of A against B
and one of A against a second session of A: what that control shows is noise. Sessions are made anew for every epoch,
in changing order: the place that a session gets in memory is worth a per cent for as long as it lives. Threads do not
spin while they wait: the idle session's would take the cores from the running one (on two cores, a spread of 20 %
between blocks instead of 2 %). Says nothing about what the numbers mean; that is `verdict`.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.onnx.run.machine import device_memory
from surgery.onnx.run.session import Bound, Setting, assigned, bind, provider_options, session_settings
from surgery.onnx.timing.record import Epoch
from surgery.onnx.timing.verdict import FEWEST_EPOCHS

if TYPE_CHECKING:
    import numpy as np

    from surgery.onnx.run.feeds import Feeds

EPOCHS = 16  # times that sessions are made anew, at least, if there is time
LONGEST = 4.0  # seconds of an epoch, unless loading takes as long: more epochs tell more than longer ones
ROUNDS = 6  # an epoch, aimed at: a fast model gets more runs a block, not more blocks
FEWEST_ROUNDS = 3  # an epoch, however little time there is
_GRACE = 2  # times the time given, for the fewest epochs that allow a verdict, on a machine that has become busy
_NEARLY = 0.999  # the largest share of an epoch that is not the last
_LOADING_SHARE = 0.5  # of an epoch, at most, for making sessions anew, if six epochs leave that
_SETTLED = 0.99  # a pair of runs that is not below so much of the fastest yet: warm
_FEWEST_WARM = 4  # runs of each session before it can be warm


@dataclass(frozen=True)
class Rehearsal:
    """What one session of a graph showed before anything was measured.

    load: seconds of making and warming it.
    once: seconds of one run, warm.
    settings: of the session, whatever the provider.
    options: of the provider, as the session has them.
    nodes: how many each provider got.
    device_bytes: of the device's memory that it takes, on the CPU of the process's; None if unknown.
    """

    load: float
    once: float
    settings: Mapping[str, str]
    options: Mapping[str, str]
    nodes: Mapping[str, int]
    device_bytes: int | None


@dataclass(frozen=True)
class Taken:
    """One epoch as the clock gave it.

    epoch: its blocks.
    times_a, times_b: seconds of every run of A and of B in blocks of A against B.
    runs_per_block: of either.
    share: of the time that is gone; 1 for the last.
    """

    epoch: Epoch
    times_a: tuple[float, ...]
    times_b: tuple[float, ...]
    runs_per_block: int
    share: float


def rehearse(path: Path, feeds: Feeds, setting: Setting) -> Rehearsal:
    """Makes one session, runs it until it is warm, and lets it go.

    Raises:
        ProviderUnavailable, Unsupported: see `bind`.
    """
    before = device_memory(setting.device)
    began = time.perf_counter()
    bound = bind(path, feeds, setting)
    once = _warm(bound)
    load = time.perf_counter() - began
    after = device_memory(setting.device)
    taken = None if before is None or after is None else max(0, after - before)
    options = provider_options(bound.session, setting.provider)
    return Rehearsal(load, once, session_settings(bound.session), options, assigned(bound.session), taken)


def least_seconds(a: Rehearsal, b: Rehearsal) -> float:
    """What the fewest epochs that allow a verdict take, each with its fewest rounds of one run a quarter block."""
    return FEWEST_EPOCHS * (_loading(a, b) + FEWEST_ROUNDS * _round(a, b))


def _loading(a: Rehearsal, b: Rehearsal) -> float:
    return 2 * a.load + b.load


def _round(a: Rehearsal, b: Rehearsal) -> float:
    """Seconds of two blocks with one run in each quarter: six of A or A' and two of B."""
    return 6 * a.once + 2 * b.once


def measure(
    a: tuple[Path, Rehearsal],
    b: tuple[Path, Rehearsal],
    feeds: Feeds,
    setting: Setting,
    *,
    seconds: float,
    seed: int,
    start: float,
) -> Iterator[Taken]:
    """Times B against A, interleaved, for `seconds`, loading included; whoever has enough stops asking.

    Where that is too short for a verdict, since all takes longer than in the rehearsal, it goes on for as long again.
    At least two epochs are given, however little time there is.

    Args:
        a, b: the graphs, each with its rehearsal.
        feeds: the same for all sessions.
        start: the `time.perf_counter()` that blocks' times are told from.

    Raises:
        ProviderUnavailable, Unsupported: see `bind`.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    loading, round_ = _loading(a[1], b[1]), _round(a[1], b[1])
    aimed = max(loading / _LOADING_SHARE, min(LONGEST, seconds / EPOCHS))
    length = min(aimed, seconds / (FEWEST_EPOCHS + 1))  # one more than needed, since some take longer than aimed
    runs = max(1, int((length - loading) / (round_ * ROUNDS)))
    began = time.perf_counter()
    share, done = 0.0, 0
    while share < 1:
        deadline = time.perf_counter() + length
        sessions = _sessions(a[0], b[0], feeds, setting, done)
        epoch, times_a, times_b = _epoch(sessions, runs, deadline, start, rng)
        del sessions  # before the next ones are made: three models in memory, not six
        done += 1
        gone = time.perf_counter() - began
        allowed = seconds if done >= FEWEST_EPOCHS else _GRACE * seconds
        share = 1.0 if done > 1 and gone + gone / done / 2 > allowed else min(gone / seconds, _NEARLY)
        yield Taken(epoch, times_a, times_b, 2 * runs, share)


def _epoch(
    sessions: dict[str, Bound], runs: int, deadline: float, start: float, rng: np.random.Generator
) -> tuple[Epoch, tuple[float, ...], tuple[float, ...]]:
    """Rounds of one block each, in an order by lot, until the deadline; and the seconds of every run of A and of B."""
    import numpy as np

    blocks: dict[str, list[tuple[float, float, float]]] = {"b": [], "again": []}  # when, seconds of A, log-ratio
    times_a: list[float] = []
    times_b: list[float] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        while len(blocks["b"]) < FEWEST_ROUNDS or time.perf_counter() < deadline:
            for pair in rng.permutation(["b", "again"]):
                at = time.perf_counter() - start
                first, second = _block(sessions["a"], sessions[pair], runs, swap=bool(rng.integers(2)))
                median = float(np.median(first))
                blocks[pair].append((at, median, math.log(float(np.median(second)) / median)))
                if pair == "b":
                    times_a.extend(first)
                    times_b.extend(second)
    finally:
        if collecting:
            gc.enable()
    begun, medians, log_ratios = zip(*blocks["b"], strict=True)
    control_begun, _, control = zip(*blocks["again"], strict=True)
    epoch = Epoch(log_ratios=log_ratios, control=control, at=begun, control_at=control_begun, seconds=medians)
    return epoch, tuple(times_a), tuple(times_b)


def _sessions(a: Path, b: Path, feeds: Feeds, setting: Setting, epoch: int) -> dict[str, Bound]:
    """The three sessions, warm; which is made first changes from epoch to epoch."""
    todo = [("a", a), ("b", b), ("again", a)]
    turn = epoch % 3
    order = todo[turn:] + todo[:turn]
    if epoch % 2:
        order.reverse()
    sessions = {name: bind(path, feeds, setting) for name, path in order}
    for bound in sessions.values():
        _warm(bound)
    return sessions


def _warm(bound: Bound) -> float:
    """Runs until that makes it no faster: two more runs, neither 1 % below the fastest yet. Seconds of the fastest.

    Each further pair costs a gain of 1 %, so it ends. What makes runs slower again (heat, a neighbour) is no warm-up.
    """
    fastest = min(_run(bound) for _ in range(_FEWEST_WARM - 2))
    while True:
        pair = min(_run(bound), _run(bound))
        if pair > _SETTLED * fastest:
            return min(pair, fastest)
        fastest = pair


def _block(first: Bound, second: Bound, runs: int, swap: bool) -> tuple[list[float], list[float]]:
    """Seconds of each run: first second second first, or the other way round; 2 × runs of either."""
    outer, inner = (second, first) if swap else (first, second)
    early = [_run(outer) for _ in range(runs)]
    middle = [_run(inner) for _ in range(2 * runs)]
    late = [_run(outer) for _ in range(runs)]
    return (middle, early + late) if swap else (early + late, middle)


def _run(bound: Bound) -> float:
    began = time.perf_counter_ns()
    bound.run()
    return (time.perf_counter_ns() - began) * 1e-9
