"""What an operation tells when it is done: plain frozen data, for people and for `--json` alike."""

from __future__ import annotations

import contextlib
import gc
import importlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Report:
    """What every operation that writes something reports.

    Attributes:
        operation: its name on the command line.
        output: the path that was written.
        seconds: wall time of the operation, imports of this process not counted.
        peak_rss_bytes: the largest resident set so far, of the process or of one that worked for it.
        ledger: how many tensors met each fate; every tensor of every input has exactly one.
        notes: what the user should know besides.
    """

    operation: str
    output: str | None
    seconds: float
    peak_rss_bytes: int
    ledger: Mapping[str, int]
    notes: tuple[str, ...] = ()


def peak_rss() -> int:
    """The largest resident set so far, in bytes: of this process, or of one that it has waited for."""
    peak = max(resource.getrusage(whose).ru_maxrss for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak if sys.platform == "darwin" else peak * 1024


class Stopwatch:
    """Wall time since it was made; `loading` names a module whose import is to be over by then."""

    def __init__(self, loading: str | None = None) -> None:
        if loading is not None:
            _load(loading)
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since."""
        return time.perf_counter() - self._start


def _load(name: str) -> None:
    with uncollected():  # large modules make no garbage while they are imported
        importlib.import_module(name)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Does not look for garbage inside."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
