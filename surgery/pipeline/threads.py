"""The number of cores, and of torch's threads. Changes of the latter through this module are undone afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def cores() -> int:
    """The number of cores on which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def torch_threads(count: int | None = None) -> Iterator[None]:
    """Sets the number of torch threads, if one is given, and restores the previous number afterwards.

    Small work on many threads costs more than it gains: idle threads spin for a while and take the cores from whatever
    runs next.
    """
    import torch

    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
