"""Adapters to resize and combine, and the deltas they mean, as dense float64 matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft_oracle import Everything, random, save_base
from safetensors.torch import load_file
from torch import nn

import surgery

TARGETS = ["wte", "conv1d", "linear", "conv"]
PLAIN = ["conv1d", "linear"]


def adapter(
    folder: Path, name: str, seed: int = 1, build: Callable[[], nn.Module] = Everything, **settings: Any
) -> Path:
    """Saves folder/base.st and a LoRA made by peft for it, with random factors."""
    model = save_base(folder, build)
    given = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**given))
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_magnitude" in key:
                parameter.mul_(1 + random(*parameter.shape))
            elif "lora_" in key:
                parameter.copy_(random(*parameter.shape))
    adapted.save_pretrained(folder / name)
    return folder / name


def deltas(folder: Path, *adapters: Any) -> dict[str, torch.Tensor]:
    """ΔW of every weight that merging these changes, float64: what merge makes of a base in float64."""
    base = {name: tensor.double() for name, tensor in load_file(folder / "base.st").items()}
    from safetensors.torch import save_file

    save_file(base, folder / "wide.st")
    surgery.merge(folder / "wide.st", list(adapters), folder / "wide-merged.st", force=True)
    merged = load_file(folder / "wide-merged.st")
    return {name: merged[name] - base[name] for name in base if not torch.equal(merged[name], base[name])}


def loaded(folder: Path, path: Path, build: Callable[[], nn.Module] = Everything) -> nn.Module:
    """The base with an adapter as peft loads it."""
    model = build()
    model.load_state_dict(load_file(folder / "base.st"))
    return peft.PeftModel.from_pretrained(model, path).eval()


def matrix(delta: torch.Tensor) -> torch.Tensor:
    """A delta as a matrix; a convolution's kernel among the columns."""
    return delta.flatten(1)
