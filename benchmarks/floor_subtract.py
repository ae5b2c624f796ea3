"""The floor of extract: reads two bfloat16 files of one layout and subtracts them in float32. Nothing is kept.

As many threads as extract has workers, one torch thread each, and blocks that stay in cache: whoever looks at the
difference of two files pays at least this.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

_BLOCK = 1 << 18  # elements


def main() -> None:
    start = time.perf_counter()
    descriptors = [os.open(path, os.O_RDONLY) for path in sys.argv[1:3]]
    headers = [_header(descriptor) for descriptor in descriptors]
    if headers[0] != headers[1]:
        sys.exit("the two files have different layouts")
    begin, end = len(headers[0]), os.fstat(descriptors[0]).st_size
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = -(-(end - begin) // (2 * threads)) * 2  # whole elements
    bounds = [(begin + thread * share, min(end, begin + (thread + 1) * share)) for thread in range(threads)]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(lambda bound: _subtract(descriptors, *bound), bounds))
    print(json.dumps({"seconds": time.perf_counter() - start, "elements": (end - begin) // 2}))


def _header(descriptor: int) -> bytes:
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    return os.pread(descriptor, 8 + length, 0)


def _subtract(descriptors: list[int], begin: int, end: int) -> None:
    """Bytes begin to end of both, block by block, into buffers that are used again."""
    stored = [torch.empty(_BLOCK, dtype=torch.bfloat16) for _ in descriptors]
    wide = [torch.empty(_BLOCK, dtype=torch.float32) for _ in descriptors]
    for offset in range(begin, end, 2 * _BLOCK):
        count = min(_BLOCK, (end - offset) // 2)
        for descriptor, narrow, block in zip(descriptors, stored, wide, strict=True):
            got = os.preadv(descriptor, [narrow[:count].view(torch.uint8).numpy()], offset)
            if got != 2 * count:
                sys.exit("a short read")
            block[:count].copy_(narrow[:count])
        wide[1][:count].sub_(wide[0][:count])


if __name__ == "__main__":
    main()
