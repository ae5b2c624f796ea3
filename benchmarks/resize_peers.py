"""The peer of resize: the lines of kohya's networks/resize_lora.py that make factors of another rank, re-stated.

    python resize_peers.py NITER RANK adapter.safetensors out.safetensors

sd-scripts are no package, and the file imports their trainer; what is timed is what costs: B·A in float32, and its
decomposition. With NITER 0 (`--svd_lowrank_niter 0`, and all versions before that option) that is torch.linalg.svd;
with 2, the default now for weights larger than 2048 × 2048, torch.svd_lowrank of twice the rank.

https://github.com/kohya-ss/sd-scripts/blob/063ef100648c016b6b4d804a6de6f5afab7ebd58/networks/resize_lora.py
"""

from __future__ import annotations

import json
import sys
import time

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    niter, rank, source, target = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    start = time.perf_counter()
    torch.manual_seed(0)
    tensors = load_file(source)
    for key, a in [(key, tensor.float()) for key, tensor in tensors.items() if ".lora_A." in key]:
        other = key.replace(".lora_A.", ".lora_B.")
        delta = tensors[other].float() @ a  # (out, in)
        if niter and min(delta.shape) > 2048:
            left, values, right = torch.svd_lowrank(delta, q=2 * rank, niter=niter)
            right = right.T
        else:
            left, values, right = torch.linalg.svd(delta)
        stored = tensors[key].dtype
        tensors[key] = right[:rank].to(stored).contiguous()
        tensors[other] = (left[:, :rank] @ torch.diag(values[:rank])).to(stored).contiguous()
    save_file(tensors, target)
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
