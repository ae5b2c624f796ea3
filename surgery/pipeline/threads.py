"""CPU cores and torch threads. The number of torch threads is always restored after a change."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def torch_threads(count: int | None = None) -> Iterator[None]:
    """Sets the number of torch threads, if one is given, and restores the previous number afterwards.

    Many threads slow small work down: idle threads spin for a while and keep the cores from later work.
    """
    import torch

    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
