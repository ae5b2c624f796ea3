"""A folder with everything that the verbs work on, and a command line of each verb over it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import build, shift

import surgery


@dataclass(frozen=True)
class Verb:
    """A command that succeeds.

    Attributes:
        words: with {root} for the scene's folder.
        first: the folder that is its first input.
        output: what it writes, in the scene's folder.
    """

    words: str
    first: str
    output: str = "out"


VERBS = {
    "extract": Verb("extract --rank 2 {root}/base {root}/tuned -o {out}", "base"),
    "merge": Verb("merge {root}/base {root}/adapter -o {out}", "base"),
    "unmerge": Verb("unmerge {root}/merged {root}/adapter -o {out}", "merged"),
    "fold": Verb("fold {root}/base {root}/adapter -o {out}", "base"),
    "resize": Verb("resize --rank 1 {root}/adapter -o {out}", "adapter"),
    "combine": Verb("combine {root}/adapter {root}/other --how cat -o {out}", "adapter"),
    "convert": Verb("convert {root}/adapter --to kohya --base {root}/base -o {out}", "adapter"),
    "convert a container": Verb("convert {root}/base -o {out} --container torch", "base"),
    "convert to lora": Verb("convert {root}/adapter --to lora --rank 1 --base {root}/base -o {out}", "adapter"),
    "export-onnx": Verb("export-onnx {root}/base -o {out}", "base", "graph/model.onnx"),
}


def words_of(verb: str, root: Path, out: Path) -> list[str]:
    """A verb's command line over a scene."""
    return VERBS[verb].words.format(root=root, out=out).split()


def make_scene(root: Path) -> Path:
    """Two tiny Llamas, base and tuned; three adapters, one of them of another model; a merged model."""
    model = build("llama", bos_token_id=0, eos_token_id=0)
    model.save_pretrained(root / "base")
    shift(model).save_pretrained(root / "tuned")
    lora(root / "adapter", "model.layers.0.self_attn.q_proj", 0)
    lora(root / "other", "model.layers.1.self_attn.q_proj", 1)
    lora(root / "foreign", "transformer.blocks.7.attention", 2)
    surgery.merge(root / "base", root / "adapter", root / "merged")
    return root


def lora(folder: Path, module: str, seed: int) -> Path:
    """A peft adapter of rank 2 of one layer, 32 × 32."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    tensors = {
        f"base_model.model.{module}.lora_A.weight": torch.randn(2, 32, generator=generator),
        f"base_model.model.{module}.lora_B.weight": torch.randn(32, 2, generator=generator),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [module.rpartition(".")[2]]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
