"""Cores and torch's threads. Whoever changes the number of torch's threads by way of this module gives it back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def torch_threads(count: int | None = None) -> Iterator[None]:
    """Sets the caller's number of torch threads, if one is given, and restores it afterwards.

    Small work on many threads costs more than it gives: the others spin for a while and take the cores from whoever
    comes next.
    """
    import torch

    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
