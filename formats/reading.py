"""Reads a file's bytes at an offset, whatever they mean."""

from __future__ import annotations

import os

from formats.errors import CorruptFile
from formats.tensors import Bytes

_CHUNK = 1 << 30  # the kernel moves at most 2 GiB a call


def fill(descriptor: int, offset: int, buffer: Bytes, where: object) -> None:
    """Fills a buffer with the file's bytes from `offset` on, from any thread.

    Raises:
        CorruptFile: the file ends before the buffer is full. `where` names the file or tensor in the error.
    """
    done = 0
    while done < buffer.nbytes:
        got = os.preadv(descriptor, [buffer.data[done : done + _CHUNK]], offset + done)
        if not got:
            raise CorruptFile("the file became shorter while it was read", where=where, then="copy the file again")
        done += got
