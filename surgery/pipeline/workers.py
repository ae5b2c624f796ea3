"""Forked worker processes that run numbered work, each on a core of its own.

Python threads wait for each other: between two calls into a library, one of them holds the interpreter lock. Forked
processes have an interpreter each, and share everything that was loaded and opened before, at no cost. This works on
Linux only, and only if no other code runs threads in this process: in the copies, those threads would not exist, but
the locks they held would. This module does not know what the work is.
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

Work = Callable[[int], Any]  # from a number to a result, which must be picklable
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG


def can_fork() -> bool:
    """Whether forked workers are safe on this system."""
    return sys.platform == "linux"


@contextlib.contextmanager
def forked(count: int, work: Work) -> Iterator[Work]:
    """Forks `count` workers, which end with the context, or with this process.

    Yields a function that lets a worker run the work with a number, and returns its result or raises its error. Any
    thread may call it; as many calls run at once as there are workers.

    Raises:
        WorkerLost: raised by the yielded function if a worker ended during its work.
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
    """One worker, as seen by its parent."""

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
    """The loop of a worker: runs the work with each number that it is sent, until it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before prctl was called
        return
    for other in others:
        other.close()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone, and the signal on its way
        while True:
            number = connection.recv()
            try:
                reply = True, work(number)
            except Exception as error:
                reply = False, error
            connection.send(reply)
