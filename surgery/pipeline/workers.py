"""Copies of this process that run work by number, each on a core of its own.

Threads wait for each other's Python: between two calls into a library, one of them holds the interpreter. Copies made
by fork have an interpreter each, and everything that was loaded and opened before, at no cost. Linux only, and only
where this process is ours alone: a caller's threads would not be there in the copies, but their locks would. Knows
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

Work = Callable[[int], Any]  # a number to what comes of it, which must be picklable
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG


def can_fork() -> bool:
    """Whether this system has copies of a process that are safe to work in."""
    return sys.platform == "linux"


@contextlib.contextmanager
def forked(count: int, work: Work) -> Iterator[Work]:
    """Makes `count` copies of this process, which end with the context, or with this process.

    Yields a function that has a copy do the work of a number, and returns, or raises, what came of it. Any thread may
    call it; as many calls run at once as there are copies.

    Raises:
        WorkerLost: from that function, where a copy ended in the midst of its work.
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
            with warnings.catch_warnings():  # Python warns of threads; ours hold no lock that a copy takes
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
    """One copy, as its parent sees it."""

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
                "a worker process ended in the midst of its work",
                found=f"exit code {self.process.exitcode}",
                then="if memory ran out, allow fewer of them: --jobs 1",
            ) from error
        if not sound:
            raise result
        return result


def _serve(connection: Connection, others: list[Connection], work: Work, parent: int) -> None:
    """What a copy does: the work of each number that it is sent, until it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
    if os.getppid() != parent:  # it went before it could be asked for
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
