"""Copies of this process that do numbered work, each on its own core.

Threads of one process share the interpreter lock and wait for it between library calls. A fork has its own
interpreter, and everything that was loaded and opened before, at no cost. Forks are used on Linux only, and only in a
process that runs nothing but surgery: a fork would keep the locks of a caller's threads but not the threads. Knows
nothing of the work.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from surgery.errors import WorkerLost

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

Work = Callable[[int], Any]  # maps a number to its result, which must be picklable
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG


def can_fork() -> bool:
    """Whether forks are safe to work in on this system."""
    return sys.platform == "linux"


@contextlib.contextmanager
def forked(count: int, work: Work) -> Iterator[Work]:
    """Makes `count` copies of this process, which end with the context or with this process.

    Yields a function that lets a copy do the work of a number, and returns its result or raises its error. Any thread
    may call it; as many calls run at once as there are copies.

    Raises:
        WorkerLost: raised by that function if a copy ended during its work.
    """
    import multiprocessing

    context = multiprocessing.get_context("fork")
    idle: queue.SimpleQueue[_Copy] = queue.SimpleQueue()
    copies: list[_Copy] = []

    def call(number: int) -> Any:
        copy = idle.get()
        try:
            return copy.call(number)
        finally:
            idle.put(copy)

    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            others = [ours, *(copy.connection for copy in copies)]
            process = context.Process(target=_serve, args=(theirs, others, work, os.getpid()), daemon=True)
            with warnings.catch_warnings():  # Python warns about threads; ours hold no lock that a worker takes
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            copies.append(_Copy(process, ours))
            idle.put(copies[-1])
        yield call
    finally:
        for copy in copies:
            copy.process.kill()
            copy.process.join()
            copy.connection.close()


class _Copy:
    """One copy, as seen by its parent."""

    def __init__(self, process: ForkProcess, connection: Connection) -> None:
        self.process = process
        self.connection = connection

    def call(self, number: int) -> Any:
        try:
            self.connection.send(number)
            sound, result = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            raise WorkerLost(
                "a worker process ended during its work",
                found=f"exit code {self.process.exitcode}",
                then="if memory ran out, allow fewer workers: --jobs 1",
            ) from error
        if not sound:
            raise result
        return result


def _serve(connection: Connection, others: list[Connection], work: Work, parent: int) -> None:
    """Runs in a copy: does the work of each number that it receives, until it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call above
        return
    for other in others:
        other.close()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone, and the kill signal follows
        while True:
            number = connection.recv()
            try:
                reply = True, work(number)
            except Exception as error:
                reply = False, error
            connection.send(reply)
