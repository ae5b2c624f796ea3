"""Modules of the kinds that peft adapts, adapters that peft makes for them, and peft's verdict on what we merge."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import surgery
from formats.dialects.peft_writing import (
    Extracted,
    lora_config,
)


class Convolutions(nn.Module):
    """One convolution of every dimension, a kernel of 1, and one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 5, (3, 2), stride=2)
        self.point = nn.Conv2d(5, 8, 1, bias=False)
        self.three = nn.Conv3d(8, 3, 2)
        self.grouped = nn.Conv1d(4, 6, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 4, 9)."""
        x = self.one(x)[..., None].expand(-1, -1, -1, 5)
        return self.three(self.point(self.two(x))[..., None].expand(-1, -1, -1, -1, 3))


class Experts(nn.Module):
    """Experts as a mixture holds them, with names in no alphabetical order, a matrix of no layer and a layer inside."""

    def __init__(self, transposed: bool, experts: int = 3, width: int = 4, inner: int = 5, bias: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = (width, 2 * inner), (inner, width)
        self.up = nn.Parameter(torch.randn(experts, *(up if transposed else up[::-1])))
        if bias:
            self.up_bias = nn.Parameter(torch.randn(experts, 2 * inner))
        self.down = nn.Parameter(torch.randn(experts, *(down if transposed else down[::-1])))
        self.also = nn.Parameter(torch.randn(width, 7))
        self.inside = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, width)."""
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        hidden = torch.einsum("bi,eio->beo", self.inside(x), up)
        hidden = hidden + getattr(self, "up_bias", 0)
        hidden = torch.tanh(hidden[..., ::2]) * hidden[..., 1::2]
        return torch.einsum("bei,eio->bo", hidden, down) @ self.also @ self.also.mT


class Mixture(nn.Module):
    """Experts between two layers."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        width = settings.get("width", 4)
        self.into = nn.Linear(width, width)
        self.experts = Experts(**settings)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, width)."""
        return self.out(self.experts(self.into(x)))


class Everything(nn.Module):
    """A layer of each kind that DoRA knows."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(7, 6)
        self.conv1d = Conv1D(9, 6)  # GPT-2's, which stores (in, out)
        self.linear = nn.Linear(9, 5)
        self.conv = nn.Conv2d(5, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, length) token ids."""
        hidden = self.linear(self.conv1d(self.wte(x)))
        return self.conv(hidden.mT[..., None].expand(-1, -1, -1, 3))


def random(*shape: int) -> torch.Tensor:
    """Factors that change a weight visibly."""
    return 0.3 * torch.randn(*shape)


def described(model: nn.Module, ranks: dict[str, int], **settings: Any) -> Extracted:
    """What the config of a hand-written adapter must say."""
    modules = frozenset(name for name, _ in model.named_modules() if name)
    return Extracted(ranks, (), False, False, modules, 2, "base", **settings)


def save_base(folder: Path, build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Saves a seeded model."""
    torch.manual_seed(0)
    model = build().to(dtype).eval()
    save_file(model.state_dict(), folder / "base.st")
    return model


def made_by_peft(
    folder: Path, build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, **settings: Any
) -> peft.PeftModel:
    """Saves a base and a LoRA that peft made for it; every factor is random."""
    model = save_base(folder, build, dtype)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **settings})).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + random(*parameter.shape).to(dtype))
            elif "lora_" in name:
                parameter.copy_(random(*parameter.shape))
    adapted.save_pretrained(folder / "adapter")
    return adapted


def assert_merges_like_peft(folder: Path, build: Callable[[], nn.Module], x: torch.Tensor, **settings: Any) -> None:
    """The merged weights are peft's within 1e-6 of the largest, and give the outputs of the adapted model."""
    adapted = made_by_peft(folder, build, **settings)
    with torch.no_grad():
        output = adapted(x)
    surgery.merge(folder / "base.st", folder / "adapter", folder / "merged.st")
    merged, base = load_file(folder / "merged.st"), load_file(folder / "base.st")
    touched = {name.replace(".base_layer", "").removeprefix("base_model.model.") for name, _ in wrappers(adapted)}
    expected = adapted.merge_and_unload().state_dict()
    for name in merged.keys() & expected.keys():  # peft leaves a layer inside adapted parameters' module unmerged
        error = (merged[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-30)
        assert error <= 1e-6, name
    changed = {name.rpartition(".")[0] for name in base if not torch.equal(base[name], merged[name])}
    assert changed == touched
    model = build()
    model.load_state_dict(merged)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), output, atol=1e-4, rtol=1e-4)


def wrappers(adapted: peft.PeftModel) -> list[tuple[str, nn.Module]]:
    """peft's own layers."""
    return [(name, module) for name, module in adapted.named_modules() if hasattr(module, "get_delta_weight")]


def assert_peft_agrees(
    folder: Path,
    build: Callable[[], nn.Module],
    tensors: dict[str, torch.Tensor],
    extracted: Extracted,
    x: torch.Tensor,
) -> None:
    """peft loads the tensors with our config, every one and no other, and its outputs are those of our merge."""
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(lora_config(extracted)))
    base = build()
    base.load_state_dict(load_file(folder / "base.st"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = peft.PeftModel.from_pretrained(base.eval(), adapter).eval()
    loaded = peft.get_peft_model_state_dict(adapted)
    assert loaded.keys() == {key for key in tensors if "lora_" in key}
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in loaded.items())
    surgery.merge(folder / "base.st", adapter, folder / "merged.st")
    model = build()
    model.load_state_dict(load_file(folder / "merged.st"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), adapted(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(x), adapted.merge_and_unload()(x), atol=1e-5, rtol=1e-5)
