"""A peer's own decomposition of given matrices, in the peer's own environment.

    python peer_factors.py TOOL deltas.safetensors factors.safetensors RANK…

Reads ΔW (out, in) by name; writes `RANK|A|name` (rank, in) and `RANK|B|name` (out, rank), or `RANK|full|name` where the
tool prefers the matrix itself. mergekit and LyCORIS are called as they are installed. kohya's sd-scripts are no
package: their few lines are re-stated here, see `kohya`.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file

Factors = tuple[torch.Tensor, torch.Tensor]  # A (rank, in), B (out, rank)


def mergekit(delta: torch.Tensor, rank: int) -> Factors:
    """mergekit-extract-lora's task, with that command's defaults."""
    from mergekit.scripts.extract_lora import TaskVectorDecompositionTask

    task = TaskVectorDecompositionTask.model_construct(max_rank=rank)
    return task.execute(delta)


def lycoris(delta: torch.Tensor, rank: int) -> Factors | torch.Tensor:
    """LyCORIS's extract_linear with a fixed rank, without what it adds to the file besides."""
    from lycoris.utils import extract_linear

    found, how = extract_linear(delta, "fixed", rank)
    return found if how == "full" else found[:2]


def kohya(delta: torch.Tensor, rank: int) -> Factors:
    """sd-scripts, networks/extract_lora_from_models.py, `svd`, with its default clamp_quantile: B takes the singular
    values, then the entries of both are cut off at the 0.99 quantile of all of them.

    https://github.com/kohya-ss/sd-scripts/blob/06e8980044a209ebdcce8c78cdd0a7519ef2a965/networks/extract_lora_from_models.py
    """
    rank = min(rank, *delta.shape)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)  # theirs is full; the leading columns are these
    b, a = left[:, :rank] * values[:rank], right[:rank]
    bound = float(torch.quantile(torch.cat([b.flatten(), a.flatten()]), 0.99))
    return a.clamp(-bound, bound), b.clamp(-bound, bound)


TOOLS = {"mergekit": mergekit, "lycoris": lycoris, "kohya": kohya}


def main() -> None:
    tool, source, target, *ranks = sys.argv[1:]
    found = {}
    for name, delta in load_file(source).items():
        for rank in map(int, ranks):
            made = TOOLS[tool](delta, rank)
            parts = {"full": made} if isinstance(made, torch.Tensor) else dict(zip("AB", made, strict=True))
            found |= {
                f"{rank}|{part}|{name}": tensor.detach().clone(memory_format=torch.contiguous_format)
                for part, tensor in parts.items()
            }
    save_file(found, target)


if __name__ == "__main__":
    main()
