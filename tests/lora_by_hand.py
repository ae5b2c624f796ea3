"""LoRA in peft's names, written by hand, for models as small as the miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def lora(folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    """An adapter written by hand."""
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def up(rank: int = 2, out: int = 48, into: int = 16) -> dict[str, torch.Tensor]:
    """Factors for the miniature's first linear layer."""
    generator = torch.Generator().manual_seed(5)
    return {
        "layers.0.up.lora_A.weight": torch.randn(rank, into, generator=generator),
        "layers.0.up.lora_B.weight": torch.randn(out, rank, generator=generator),
    }
