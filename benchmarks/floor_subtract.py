"""The floor of extract: takes two bfloat16 files of one layout and subtracts them in float32. Nothing is kept.

    python floor_subtract.py read|map FILE FILE

As many threads as extract has workers, one torch thread each, and blocks that stay in cache: whoever looks at the
difference of two files pays at least this. `read` copies the files into memory of its own, as a program must that
keeps a weight to work on; `map` reads the page cache in place, which is as little as anybody can do.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_BLOCK = 1 << 17  # elements; with 1 << 15 and 1 << 18 it takes longer

Get = Callable[[int, int], torch.Tensor]  # (offset, count) → bfloat16 elements of a file


def main() -> None:
    way, *paths = sys.argv[1:]
    start = time.perf_counter()
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]
    headers = [_header(descriptor) for descriptor in descriptors]
    if headers[0] != headers[1]:
        sys.exit("the two files have different layouts")
    begin, end = len(headers[0]), os.fstat(descriptors[0]).st_size
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = -(-(end - begin) // (2 * threads)) * 2  # whole elements
    bounds = [(begin + thread * share, min(end, begin + (thread + 1) * share)) for thread in range(threads)]
    opened = {"read": _reader, "map": _mapping}[way]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(lambda bound: _subtract([opened(one) for one in descriptors], *bound), bounds))
    print(json.dumps({"seconds": time.perf_counter() - start, "elements": (end - begin) // 2}))


def _header(descriptor: int) -> bytes:
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    return os.pread(descriptor, 8 + length, 0)


def _reader(descriptor: int) -> Get:
    """Into a buffer that is used again."""
    buffer = torch.empty(_BLOCK, dtype=torch.bfloat16)
    view = memoryview(buffer.view(torch.uint8).numpy())

    def get(offset: int, count: int) -> torch.Tensor:
        if os.preadv(descriptor, [view[: 2 * count]], offset) != 2 * count:
            sys.exit("a short read")
        return buffer[:count]

    return get


def _mapping(descriptor: int) -> Get:
    """In place."""
    mapped = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE)  # writable, since torch wants it so; nobody writes
    return lambda offset, count: torch.frombuffer(mapped, dtype=torch.bfloat16, count=count, offset=offset)


def _subtract(files: list[Get], begin: int, end: int) -> None:
    """Bytes begin to end of both, block by block: tuned becomes float32, and base, widened on the way, comes off."""
    base, tuned = files
    wide = torch.empty(_BLOCK, dtype=torch.float32)
    for offset in range(begin, end, 2 * _BLOCK):
        count = min(_BLOCK, (end - offset) // 2)
        wide[:count].copy_(tuned(offset, count)).sub_(base(offset, count))


if __name__ == "__main__":
    main()
