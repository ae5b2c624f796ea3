"""The report that an operation returns: plain frozen data, shown to people and printed by `--json`."""

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
    """The fields that every operation reports.

    Attributes:
        operation: its name on the command line.
        output: the path that was written.
        seconds: wall time of the operation, without the imports of this process.
        peak_rss_bytes: the largest resident set so far, of this process or of one of its workers; in bytes.
        ledger: how many tensors met each fate; every tensor of every input has exactly one.
        notes: further remarks for the user.
    """

    operation: str
    output: str | None
    seconds: float
    peak_rss_bytes: int
    ledger: Mapping[str, int]
    notes: tuple[str, ...] = ()


def peak_rss() -> int:
    """The largest resident set so far, in bytes, of this process or of a child that it has waited for."""
    peak = max(resource.getrusage(whose).ru_maxrss for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak if sys.platform == "darwin" else peak * 1024


class Stopwatch:
    """Measures wall time from its creation; it imports the module `loading` first, so that this is not counted."""

    def __init__(self, loading: str | None = None) -> None:
        if loading is not None:
            _load(loading)
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since creation."""
        return time.perf_counter() - self._start


def _load(name: str) -> None:
    with uncollected():  # importing a large module makes no garbage
        importlib.import_module(name)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Disables the cyclic garbage collector inside."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
