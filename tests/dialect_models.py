"""A small model with every kind of layer that adapters of several dialects know, and adapters of it that peft made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import surgery

PART = "unet"
LINEAR = ["blocks.0.attn.to_q", "blocks.1.attn.to_q", "blocks.1.attn.to_out.0"]
CONV = ["blocks.0.conv_in", "blocks.1.conv_in", "blocks.1.point"]
EMBEDDING = ["token_emb"]
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": LINEAR},
    "conv": {"target_modules": CONV},
    "embedding": {"target_modules": EMBEDDING},
    "mixed": {"target_modules": ["blocks.0.attn.to_q", "token_emb"]},
    "Conv1D": {"target_modules": ["turned"], "fan_in_fan_out": True},
    "ranks": {
        "target_modules": [*LINEAR, *CONV],
        "rank_pattern": {"blocks.0.attn.to_q": 2, "blocks.1.conv_in": 3},
        "alpha_pattern": {"blocks.0.attn.to_q": 7, "blocks.1.point": 3},
    },
    "rsLoRA": {"target_modules": LINEAR, "use_rslora": True},
    "DoRA": {"target_modules": [*LINEAR, *CONV], "use_dora": True},
    "lora_bias": {"target_modules": ["blocks.0.attn.to_q"], "lora_bias": True},
    "biases": {"target_modules": LINEAR, "bias": "all"},
    "LoHa": {"target_modules": [*LINEAR, *CONV]},
    "LoKr": {"target_modules": [*LINEAR, *CONV]},
}


class Attention(nn.Module):
    """Two layers, one inside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(12, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 12, bias=False)])


class Block(nn.Module):
    """An attention, a convolution, one of one point."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.conv_in = nn.Conv2d(4, 6, 3)
        self.point = nn.Conv2d(6, 4, 1)
        self.norm = nn.LayerNorm(12)


class Net(nn.Module):
    """Two blocks, an embedding and a layer that stores (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.blocks = nn.ModuleList([Block(), Block()])
        self.token_emb = nn.Embedding(10, 12)
        self.turned = Conv1D(8, 12)


def made_by_peft(folder: Path, kind: str) -> nn.Module:
    """Saves base.st and the adapter peft/ of a kind, every factor random; gives the model back as peft merges it."""
    torch.manual_seed(0)
    model = Net()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "base.st")
    settings = dict(KINDS[kind])
    if kind == "LoHa":
        config: Any = peft.LoHaConfig(r=2, alpha=3, **settings)
    elif kind == "LoKr":
        config = peft.LoKrConfig(r=1, alpha=3, **settings)
    else:
        config = peft.LoraConfig(r=4, lora_alpha=6, **settings)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "peft")
    return adapted.merge_and_unload()


def changes(base: Path, adapter: Path, folder: Path, **told: Any) -> dict[str, torch.Tensor]:
    """ΔW of every tensor that merging changes."""
    out = folder / f"merged-{adapter.name.partition('.')[0]}.st"
    surgery.merge(base, adapter, out, told=surgery.Told(**told), force=True)
    before, after = load_file(base), load_file(out)
    return {name: after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}
