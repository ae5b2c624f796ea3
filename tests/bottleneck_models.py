"""The tiny models of tests/golden/bottleneck in transformers, with the weights that the goldens were made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import places
import torch
import transformers
from safetensors.torch import load_file

from formats.grafts import Graft, read_grafts, tensor_names
from formats.paths import open_checkpoint
from surgery.model.meta_model import known_names

GOLDEN = places.GOLDEN / "bottleneck"
MODELS = ("bert", "distilbert", "gpt2", "llama", "roberta", "vit")
CASES = [(model, each.name) for model in MODELS for each in sorted((GOLDEN / model).iterdir()) if each.is_dir()]


def built(model: str, kind: str = "AutoModel", **settings: Any) -> Any:
    """A golden model, or a class with a head around it, whose own weights are random."""
    config = json.loads((GOLDEN / model / "base.json").read_text()) | settings
    made = getattr(transformers, kind).from_config(transformers.AutoConfig.for_model(**config))
    weights = load_file(GOLDEN / model / "base.st")
    names, _ = known_names(made.base_model, weights)
    found = {names[name]: tensor for name, tensor in weights.items() if name in names}
    missing = made.base_model.load_state_dict(found, strict=False).missing_keys
    assert not missing, missing
    return made.eval()


def saved(model: str, folder: Path) -> Path:
    """The golden model as a folder that transformers loads."""
    built(model).save_pretrained(folder)
    return folder


def inputs(golden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a golden output is of."""
    return {name: tensor for name, tensor in golden.items() if name in ("input_ids", "pixel_values")}


def sites(folder: Path) -> list[tuple[Graft, dict[str, torch.Tensor]]]:
    """What must stay in the graph of a folded model, with its tensors."""
    if not (folder / "grafts.safetensors").exists():
        return []
    with open_checkpoint(folder / "grafts.safetensors") as checkpoint:
        return [
            (site, {role: checkpoint.read(name) for role, name in tensor_names(site).items()})
            for site in read_grafts(checkpoint).sites
        ]
