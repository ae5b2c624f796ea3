"""float8 models as their formats' quantisers write them, with an adapter, for the tests of merging into them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lora_by_hand import lora
from safetensors.torch import load_file, save_file

NAME = "model.up.weight"
FINE = {"quant_method": "fp8", "weight_block_size": [128, 128]}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
Tensors = dict[str, torch.Tensor]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def quantise(w: torch.Tensor, block: tuple[int, int], scale_dtype: torch.dtype, dtype: torch.dtype = E4M3) -> Tensors:
    """q and s as the formats' quantisers make them, block by block."""
    rows, columns = w.shape
    q = torch.empty(w.shape, dtype=dtype)
    top = torch.finfo(dtype).max
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]), dtype=scale_dtype)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = (w[at].abs().max() / top).to(scale_dtype)
            q[at] = (w[at] / scales[i, j].float()).clamp(-top, top).to(dtype)
    return {"q": q, "s": scales}


def spread(s: torch.Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
    """The scale of each element, float64."""
    wide = s.double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]]


# name: shape, block, scale's dtype, scale's stored shape, its name, config, weight's dtype
LAYOUTS: dict[str, tuple[Any, ...]] = {
    "fine-grained": ((256, 384), (128, 128), torch.float32, None, "weight_scale_inv", FINE, E4M3),
    "fine-grained, cut blocks": ((200, 150), (128, 128), torch.float32, None, "weight_scale_inv", FINE, E4M3),
    "blocks of another size": (
        (100, 96), (32, 64), torch.float32, None, "weight_scale_inv", FINE | {"weight_block_size": [32, 64]}, E4M3,
    ),
    "per tensor, a scalar": ((70, 40), (70, 40), torch.float32, (), "weight_scale", {}, E4M3),
    "per tensor": ((70, 40), (70, 40), torch.float32, (1,), "weight_scale", COMPRESSED, E4M3),
    "per channel": ((70, 40), (1, 40), torch.bfloat16, (70, 1), "weight_scale", COMPRESSED, E4M3),
    "per channel, a vector": (
        (70, 40), (1, 40), torch.float32, (70,), "weight_scale", {"quant_method": "fbgemm_fp8"}, E4M3,
    ),
    "e5m2, ComfyUI's name": ((70, 40), (70, 40), torch.float32, (), "scale_weight", {}, E5M2),
}  # fmt: skip


class Base:
    """A folder with one float8 linear layer of a layout, and a LoRA for it."""

    def __init__(self, tmp_path: Path, layout: str, strength: float = 0.02) -> None:
        self.shape, self.block, dtype, stored, self.scale, config, fp8 = LAYOUTS[layout]
        generator = torch.Generator().manual_seed(7)
        out, into = self.shape
        w = torch.randn(out, into, generator=generator) * 0.05
        made = quantise(w, self.block, dtype, fp8)
        self.q, self.s = made["q"], made["s"]
        self.scale = f"model.up.{self.scale}"
        self.path = tmp_path / "base"
        self.path.mkdir()
        tensors = {NAME: self.q, self.scale: self.s if stored is None else self.s.reshape(stored)}
        self.tensors = tensors | {
            "model.norm.weight": torch.ones(8, dtype=torch.bfloat16),
            "model.up.input_scale": torch.tensor([0.5]),
            "model.up.bias": torch.zeros(out, dtype=torch.bfloat16),
        }
        save_file(self.tensors, self.path / "model.safetensors", metadata={"format": "pt"})
        document = {"dtype": "bfloat16"} | ({"quantization_config": config} if config else {})
        (self.path / "config.json").write_text(json.dumps(document))
        self.a, self.b = torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator) * strength
        factors = {"model.up.lora_A.weight": self.a, "model.up.lora_B.weight": self.b}
        self.adapter = lora(tmp_path / "adapter", factors)

    @property
    def w0(self) -> torch.Tensor:
        """q · s, float64."""
        return self.q.double() * spread(self.s, self.block, self.shape)

    @property
    def exact(self) -> torch.Tensor:
        """W0 + ΔW."""
        return self.w0 + 2 * self.b.double() @ self.a.double()

    def stored(self, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """What a file holds: the weight in float64, and each element's scale."""
        tensors = load_file(folder / "model.safetensors")
        scales = spread(tensors[self.scale].reshape(self.s.shape), self.block, self.shape)
        return tensors[NAME].double() * scales, scales


def half_a_step(exact: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance between neighbouring float8 around each value."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp((exact / scales).abs().clamp_min(info.smallest_normal))
    return torch.ldexp(scales, exponent - 1) * info.eps / 2
