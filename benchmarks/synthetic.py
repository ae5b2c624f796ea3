"""Pairs of weights whose difference has a spectrum of our choice: what a fine-tuning may look like, and worse.

Generated, deterministic, float32: two linear weights, a wide and a tall one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {"layers.0.down.weight": (1024, 1536), "layers.0.up.weight": (1536, 1024)}  # (out, in)
SPECTRA: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "slow": ("σ ∝ (1 + i)^-0.4", lambda i: (1 + i) ** -0.4),
    "fast": ("σ ∝ 0.9^i", lambda i: 0.9**i),
    "flat": ("σ ∝ 1", lambda i: torch.ones_like(i)),
    # harder than flat: directions of no use at all are still to be told apart
    "noise": ("Gaussian", lambda i: torch.linalg.svdvals(_noise(len(i), 3 * len(i) // 2))),
}


def _noise(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def write_pair(folder: Path, spectrum: str) -> tuple[str, str]:
    """base.st and tuned.st; the change has a hundredth of the base's norm, as a fine-tuning's has."""
    generator = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for name, (rows, columns) in SHAPES.items():
        small = min(rows, columns)
        left = torch.linalg.qr(torch.randn(rows, small, generator=generator, dtype=torch.float64)).Q
        right = torch.linalg.qr(torch.randn(columns, small, generator=generator, dtype=torch.float64)).Q
        values = SPECTRA[spectrum][1](torch.arange(small, dtype=torch.float64))
        weight = 0.02 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        delta = (left * values) @ right.mT
        base[name] = weight.float()
        tuned[name] = (weight + delta * (0.01 * weight.norm() / delta.norm())).float()
    save_file(base, folder / "base.st")
    save_file(tuned, folder / "tuned.st")
    return str(folder / "base.st"), str(folder / "tuned.st")
