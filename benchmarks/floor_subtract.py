"""The floor of extract: takes two bfloat16 files of one layout and subtracts them in float32. Nothing is kept.

    python floor_subtract.py whole|read|map FILE FILE

As many threads as extract has workers, one torch thread each. `whole` has each weight's difference in memory at once,
in buffers that are used again: whoever works on the difference of a weight pays this. `read` copies the files block by
block into memory that stays in cache, and `map` reads the page cache in place: whoever looks at the difference once
pays at least that.
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
_WEIGHT = 1 << 24  # elements: the most of an embedding that `whole` has at once, more than any other weight

Span = tuple[int, int]  # offset in bytes, count of bfloat16 elements
Get = Callable[[int, int], torch.Tensor]  # a span → its elements


def main() -> None:
    way, *paths = sys.argv[1:]
    start = time.perf_counter()
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]
    headers = [_header(descriptor) for descriptor in descriptors]
    if headers[0] != headers[1]:
        sys.exit("the two files have different layouts")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    spans = _spans(headers[0], _WEIGHT if way == "whole" else _BLOCK)
    largest = max(count for _, count in spans)
    opened = _mapping if way == "map" else _reader
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        shares = [spans[thread::threads] for thread in range(threads)]
        list(pool.map(lambda share: _subtract([opened(one, largest) for one in descriptors], share, largest), shares))
    print(json.dumps({"seconds": time.perf_counter() - start, "elements": sum(count for _, count in spans)}))


def _header(descriptor: int) -> bytes:
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    return os.pread(descriptor, 8 + length, 0)


def _spans(header: bytes, most: int) -> list[Span]:
    """Every tensor in pieces of at most so many elements, the largest pieces first."""
    tensors = [entry for name, entry in json.loads(header[8:]).items() if name != "__metadata__"]
    spans = []
    for begin, end in (tensor["data_offsets"] for tensor in tensors):
        for offset in range(begin, end, 2 * most):
            spans.append((len(header) + offset, min(most, (end - offset) // 2)))
    return sorted(spans, key=lambda span: -span[1])


def _reader(descriptor: int, largest: int) -> Get:
    """Into a buffer that is used again."""
    buffer = torch.empty(largest, dtype=torch.bfloat16)
    view = memoryview(buffer.view(torch.uint8).numpy())

    def get(offset: int, count: int) -> torch.Tensor:
        if os.preadv(descriptor, [view[: 2 * count]], offset) != 2 * count:
            sys.exit("a short read")
        return buffer[:count]

    return get


def _mapping(descriptor: int, _: int) -> Get:
    """In place."""
    mapped = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE)  # writable, since torch wants it so; nobody writes
    return lambda offset, count: torch.frombuffer(mapped, dtype=torch.bfloat16, count=count, offset=offset)


def _subtract(files: list[Get], spans: list[Span], largest: int) -> None:
    """Span by span: tuned becomes float32, and base, widened on the way, comes off."""
    base, tuned = files
    wide = torch.empty(largest, dtype=torch.float32)
    for offset, count in spans:
        wide[:count].copy_(tuned(offset, count)).sub_(base(offset, count))


if __name__ == "__main__":
    main()
