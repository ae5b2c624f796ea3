"""Adapters of random weights of a BERT's shape, in the files of the libraries that train them: `adapters` and PEFT.

AdapterHub's configs are those of the golden files, which the library itself wrote, at other sizes. The library (1.3.0)
loads each of these and saves the same tensors again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_GOLDEN = Path(__file__).parent.parent / "tests/golden/bottleneck/bert"
_NAME = "style"
_SCALE = 0.02  # of weights, such as BERT's own are born with
BOTH, MLP = ("attention.output", "output"), ("output",)


@dataclass(frozen=True)
class Shape:
    """Of a BERT: layers and width."""

    layers: int
    width: int

    @classmethod
    def of(cls, model: Path) -> Shape:
        """From config.json."""
        config = json.loads((model / "config.json").read_text())
        return cls(config["num_hidden_layers"], config["hidden_size"])


@dataclass(frozen=True)
class Maker:
    """Writes adapters for one shape, always the same ones."""

    shape: Shape
    generator: torch.Generator

    @classmethod
    def of(cls, model: Path) -> Maker:
        """For a model's folder."""
        return cls(Shape.of(model), torch.Generator().manual_seed(1))

    def bottlenecks(self, folder: Path, golden: str, places: tuple[str, ...], inner: int, **own: Any) -> Path:
        """Down (inner, width) and up (width, inner) at these places of every layer; `own` are settings."""
        return self._write(folder, golden, self._dense(places, inner), reduction_factor=self.shape.width / inner, **own)

    def compacter(self, folder: Path, inner: int) -> Path:
        """Compacter's hypercomplex products behind attention and MLP, with one rule for all."""
        number, width = 4, self.shape.width  # of factors, as the paper has it
        tensors = {f"bert.shared_parameters.{_NAME}.phm_rule": self._random(number, number, number, scale=0.5)}
        for path in self._paths(BOTH):
            for role, (wide, narrow) in (("adapter_down.0", (width, inner)), ("adapter_up", (inner, width))):
                tensors[f"bert.{path}.{role}.W_left"] = self._random(number, wide // number, 1, scale=0.1)
                tensors[f"bert.{path}.{role}.W_right"] = self._random(number, 1, narrow // number, scale=0.1)
                tensors[f"bert.{path}.{role}.b"] = self._random(narrow)
        return self._write(folder, "compacter", tensors, reduction_factor=width / inner, phm_dim=number)

    def prefix(self, folder: Path, length: int, hidden: int) -> Path:
        """Keys and values that a network makes, as the library trains them by default."""
        tensors = self._prefix(length, hidden)
        return self._write(folder, "prefix_tuning", tensors, prefix_length=length, bottleneck_size=hidden)

    def prompt(self, folder: Path, length: int) -> Path:
        """Embeddings before the input's."""
        name = f"prompt_tuning.prompt_tunings.{_NAME}.prompt_embedding.weight"
        tensors = {name: self._random(length, self.shape.width, scale=0.5)}
        return self._write(folder, "prompt_tuning", tensors, prompt_length=length)

    def mam(self, folder: Path, length: int, hidden: int, inner: int) -> Path:
        """Mix-and-match: a prefix, and a scaled parallel bottleneck at the MLP (He et al., arXiv 2110.04366)."""
        tensors = self._prefix(length, hidden) | self._dense(MLP, inner)
        config = json.loads((_GOLDEN / "mam" / "adapter_config.json").read_text())
        prefix, parallel = config["config"]["configs"]
        prefix |= {"prefix_length": length, "bottleneck_size": hidden}
        parallel |= {"reduction_factor": self.shape.width / inner}
        return self._save(folder, config, tensors)

    def lora(self, folder: Path, model: Path, rank: int) -> Path:
        """PEFT's, on queries and values."""
        import peft
        import transformers

        torch.manual_seed(1)
        base = transformers.AutoModel.from_pretrained(model)
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"])
        adapted = peft.get_peft_model(base, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_B." in name:  # which are born as zeros
                    parameter.copy_(self._random(*parameter.shape))
        adapted.save_pretrained(folder)
        return folder

    def _dense(self, places: tuple[str, ...], inner: int) -> dict[str, Tensor]:
        tensors = {}
        for path in self._paths(places):
            for role, shape in (
                ("adapter_down.0", (inner, self.shape.width)),
                ("adapter_up", (self.shape.width, inner)),
            ):
                tensors[f"{path}.{role}.weight"] = self._random(*shape)
                tensors[f"{path}.{role}.bias"] = self._random(shape[0])
        return tensors

    def _prefix(self, length: int, hidden: int) -> dict[str, Tensor]:
        width = self.shape.width
        columns = self.shape.layers * 2 * width
        own = {
            "wte.weight": self._random(length, width, scale=1.0),
            "control_trans.0.weight": self._random(hidden, width),
            "control_trans.0.bias": self._random(hidden),
            "control_trans.2.weight": self._random(columns, hidden),
            "control_trans.2.bias": self._random(columns),
        }
        holders = [f"encoder.layer.{number}.attention.self.prefix_tuning.pool" for number in range(self.shape.layers)]
        return {
            f"{holder}.prefix_tunings.{_NAME}.self_prefix.{role}": tensor
            for holder in ("prefix_tuning", *holders)  # the model holds it, and every layer: one tensor, many names
            for role, tensor in own.items()
        }

    def _paths(self, places: tuple[str, ...]) -> list[str]:
        layers = range(self.shape.layers)
        return [f"encoder.layer.{number}.{place}.adapters.{_NAME}" for number in layers for place in places]

    def _random(self, *shape: int, scale: float = _SCALE) -> Tensor:
        return scale * torch.randn(shape, generator=self.generator)

    def _write(self, folder: Path, golden: str, tensors: Mapping[str, Tensor], **own: Any) -> Path:
        config = json.loads((_GOLDEN / golden / "adapter_config.json").read_text())
        config["config"] |= own
        return self._save(folder, config, tensors)

    def _save(self, folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Path:
        folder.mkdir(parents=True)
        if any(".pool." in name for name in tensors):  # which the library does not save as safetensors
            torch.save(dict(tensors), folder / "pytorch_adapter.bin")
        else:
            save_file(dict(tensors), folder / "adapter.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config | {"hidden_size": self.shape.width}))
        return folder
