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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import Unsupported
from surgery.onnx.session import open_session

if TYPE_CHECKING:
    import numpy as np

    from surgery.onnx.feeds import Feeds

EPOCHS = 16  # times that sessions are made anew, if there is time
ROUNDS = 6  # an epoch, aimed at: a fast model gets more runs a block, not more blocks
FEWEST_ROUNDS = 3  # an epoch, however little time there is
WARM_UP = 4  # runs of each session before the first block
_LOADING_SHARE = 0.5  # of the time given, at most, for making sessions anew


@dataclass(frozen=True)
class Measurement:
    """What the clock said.

    log_ratios: for each epoch, log(B / A) of each block, in the order measured.
    control: log(A' / A), the same for two sessions of A.
    latency_a, latency_b: median seconds of one run.
    runs_per_block: runs of each session in a block.
    provider: the execution provider that ran.
    threads: intra-op threads asked for; None leaves the number to ONNX Runtime.
    """

    log_ratios: tuple[tuple[float, ...], ...]
    control: tuple[tuple[float, ...], ...]
    latency_a: float
    latency_b: float
    runs_per_block: int
    provider: str
    threads: int | None


def measure(
    a: Path, b: Path, feeds: Feeds, *, provider: str, seconds: float, threads: int | None, seed: int
) -> Measurement:
    """Times B against A, interleaved, for about `seconds`, loading included.

    Raises:
        ProviderUnavailable: the provider asked for is not the one that would run.
        Unsupported: a graph that ONNX Runtime does not load or run.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    start = time.perf_counter()
    epochs, runs = 2, 1  # until the first sessions have been made and timed
    done: list[_Epoch] = []
    while len(done) < epochs:
        loading = time.perf_counter()
        sessions = _sessions(a, b, feeds, provider, threads, len(done))
        if not done:
            loaded = time.perf_counter() - loading
            epochs = max(2, min(EPOCHS, int(_LOADING_SHARE * seconds / loaded)))
            once = float(np.median([_run(sessions["a"]) for _ in range(3)]))
            left = seconds / epochs - loaded
            runs = max(1, int(left / (8 * once * ROUNDS)))
        done.append(_epoch(sessions, runs, start + seconds * (len(done) + 1) / epochs, rng))
        del sessions  # before the next ones are made: three models in memory, not six
    return Measurement(
        log_ratios=tuple(tuple(epoch.log_ratios) for epoch in done),
        control=tuple(tuple(epoch.control) for epoch in done),
        latency_a=float(np.median([t for epoch in done for t in epoch.times_a])),
        latency_b=float(np.median([t for epoch in done for t in epoch.times_b])),
        runs_per_block=2 * runs,
        provider=done[0].provider,
        threads=threads,
    )


@dataclass(frozen=True)
class _Epoch:
    """The blocks of one set of sessions, and the seconds of every run of A and of B in them."""

    log_ratios: list[float]
    control: list[float]
    times_a: list[float]
    times_b: list[float]
    provider: str


def _epoch(sessions: dict[str, Bound], runs: int, deadline: float, rng: np.random.Generator) -> _Epoch:
    """Rounds of one block each, in an order by lot, until the deadline."""
    import numpy as np

    epoch = _Epoch([], [], [], [], sessions["a"].provider)
    collecting = gc.isenabled()
    gc.disable()
    try:
        while len(epoch.control) < FEWEST_ROUNDS or time.perf_counter() < deadline:
            for pair in rng.permutation(["b", "again"]):
                first, second = _block(sessions["a"], sessions[pair], runs, swap=bool(rng.integers(2)))
                ratio = math.log(float(np.median(second)) / float(np.median(first)))
                if pair == "again":
                    epoch.control.append(ratio)
                else:
                    epoch.log_ratios.append(ratio)
                    epoch.times_a.extend(first)
                    epoch.times_b.extend(second)
    finally:
        if collecting:
            gc.enable()
    return epoch


@dataclass(frozen=True)
class Bound:
    """A session with its inputs and outputs bound to buffers that stay where they are."""

    session: Any
    binding: Any
    buffers: tuple[Any, ...]
    provider: str


def _sessions(a: Path, b: Path, feeds: Feeds, provider: str, threads: int | None, epoch: int) -> dict[str, Bound]:
    """The three sessions, warm; which is made first changes from epoch to epoch."""
    todo = [("a", a), ("b", b), ("again", a)]
    turn = epoch % 3
    order = todo[turn:] + todo[:turn]
    if epoch % 2:
        order.reverse()
    sessions = {name: bind(open_session(path, provider, threads), feeds, path) for name, path in order}
    for _ in range(WARM_UP):
        for bound in sessions.values():
            _run(bound)
    return sessions


def _block(first: Bound, second: Bound, runs: int, swap: bool) -> tuple[list[float], list[float]]:
    """Seconds of each run: first second second first, or the other way round; 2 × runs of either."""
    outer, inner = (second, first) if swap else (first, second)
    early = [_run(outer) for _ in range(runs)]
    middle = [_run(inner) for _ in range(2 * runs)]
    late = [_run(outer) for _ in range(runs)]
    return (middle, early + late) if swap else (early + late, middle)


def _run(bound: Bound) -> float:
    began = time.perf_counter_ns()
    bound.session.run_with_iobinding(bound.binding)
    bound.binding.synchronize_outputs()
    return (time.perf_counter_ns() - began) * 1e-9


def bind(session: Any, feeds: Feeds, path: Path) -> Bound:
    """Inputs and outputs in buffers on the provider's device, allocated once."""
    import numpy as np
    import onnxruntime

    provider = session.get_providers()[0]
    device = "cuda" if provider == "CUDAExecutionProvider" else "cpu"
    binding = session.io_binding()
    try:
        outputs = session.run(None, feeds)  # for their shapes
    except Exception as error:  # its exceptions share no base class of their own
        raise Unsupported("ONNX Runtime does not run this graph", where=path, found=error) from error
    buffers = []
    for name, array in feeds.items():
        buffers.append(onnxruntime.OrtValue.ortvalue_from_numpy(array, device))
        binding.bind_ortvalue_input(name, buffers[-1])
    for output, array in zip(session.get_outputs(), outputs, strict=True):
        buffers.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros_like(array), device))
        binding.bind_ortvalue_output(output.name, buffers[-1])
    return Bound(session, binding, tuple(buffers), provider)
