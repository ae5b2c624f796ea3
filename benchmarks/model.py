"""Generates what the benchmarks run on: a Llama-shaped base, a tuned copy of it, and a LoRA adapter for it.

Deterministic and streaming: one tensor in memory at a time, every tensor seeded by its name. All linear weights
differ between base and tuned; embeddings, norms and the head do not. The change is made like that of a fine-tuning:
a slowly decaying spectrum (rank 8 holds about a third of the energy, as in real deltas) plus noise of full rank.
Run as a program, so that the process that measures never loads torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STAMP = "shape.json"  # written last: a folder that has it is complete
RANK, ALPHA = 16, 32
WEIGHT_SCALE = 0.02  # standard deviation of the weights
DELTA_SCALE = 2e-4  # of the change's low-rank part; bfloat16 resolves about 1e-4 at the weights' scale
NOISE_SCALE = 2e-5  # of its full-rank part
DIRECTIONS, DECAY = 256, 0.4  # the change's singular values fall like (1 + i)^-DECAY
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """What a Llama is made of; the defaults are 0.4 B parameters, 790 MB."""

    layers: int = 6
    width: int = 2048
    ffn: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocabulary: int = 32_000

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name → (out, in) of every linear weight of the layers."""
        kv = self.width // self.heads * self.kv_heads
        sizes = {
            "self_attn.q_proj": (self.width, self.width),
            "self_attn.k_proj": (kv, self.width),
            "self_attn.v_proj": (kv, self.width),
            "self_attn.o_proj": (self.width, self.width),
            "mlp.gate_proj": (self.ffn, self.width),
            "mlp.up_proj": (self.ffn, self.width),
            "mlp.down_proj": (self.width, self.ffn),
        }
        return {
            f"model.layers.{layer}.{name}.weight": size for layer in range(self.layers) for name, size in sizes.items()
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor."""
        norms = {
            f"model.layers.{layer}.{name}.weight": (self.width,)
            for layer in range(self.layers)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        ends = {
            "model.embed_tokens.weight": (self.vocabulary, self.width),
            "lm_head.weight": (self.vocabulary, self.width),
            "model.norm.weight": (self.width,),
        }
        return {**self.linears(), **norms, **ends}

    def config(self) -> dict[str, object]:
        """The config.json by which transformers and mergekit know the model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


TINY = Shape(layers=2, width=256, ffn=704, heads=8, kv_heads=2, vocabulary=1000)


def is_generated(folder: Path, shape: Shape) -> bool:
    """Whether a folder already holds all of a shape."""
    stamp = folder / STAMP
    return stamp.exists() and json.loads(stamp.read_text()) == dataclasses.asdict(shape)


def generate(folder: Path, shape: Shape) -> None:
    """Writes base/, tuned/ and adapter/."""
    for name, make in (("base", _base_tensor), ("tuned", _tuned_tensor)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(shape.config(), indent=2))
        _write(folder / name / "model.safetensors", "BF16", shape.tensors(), make)
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(_adapter_config(), indent=2))
    _write(folder / "adapter" / "adapter_model.safetensors", "F32", _adapter_tensors(shape), _factor)
    (folder / STAMP).write_text(json.dumps(dataclasses.asdict(shape)))


def _write(
    path: Path,
    dtype: str,
    tensors: dict[str, tuple[int, ...]],
    make: Callable[[str, tuple[int, ...]], torch.Tensor],
) -> None:
    """A safetensors file, tensor by tensor in order of name."""
    import torch

    item = {"BF16": 2, "F32": 4}[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        begin, end = end, end + item * math.prod(tensors[name])
        header[name] = {"dtype": dtype, "shape": tensors[name], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            file.write(make(name, tensors[name]).view(torch.uint8).numpy().data)


def _seeded(name: str) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _base_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=_seeded(name)).mul_(WEIGHT_SCALE).to(torch.bfloat16)


def _tuned_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    base = _base_tensor(name, shape)
    if not name.endswith(tuple(f"{linear}.weight" for linear in LINEARS)):
        return base
    generator = _seeded(f"{name} tuned")
    directions = min(DIRECTIONS, min(shape) // 2)
    values = torch.arange(1, directions + 1).pow(-DECAY)  # (directions,)
    left = torch.randn(shape[0], directions, generator=generator)
    right = torch.randn(directions, shape[1], generator=generator)
    delta = (left * values) @ right * (DELTA_SCALE / values.norm())  # (out, in), DELTA_SCALE by element
    delta += torch.randn(shape, generator=generator).mul_(NOISE_SCALE)
    return (base.to(torch.float32) + delta).to(torch.bfloat16)


def _adapter_tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in shape.linears().items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = (RANK, columns)
        tensors[f"{module}.lora_B.weight"] = (rows, RANK)
    return tensors


def _factor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A factor in float32, as peft saves trained ones; alpha/rank · BA has DELTA_SCALE by element."""
    import torch

    scale = math.sqrt(DELTA_SCALE * RANK / ALPHA / math.sqrt(RANK))
    return torch.randn(shape, generator=_seeded(name)).mul_(scale)


def _adapter_config() -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(LINEARS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--tiny", action="store_true", help="of small layers")
    options = parser.parse_args()
    generate(options.folder, dataclasses.replace(TINY if options.tiny else Shape(), layers=options.layers))


if __name__ == "__main__":
    main()
