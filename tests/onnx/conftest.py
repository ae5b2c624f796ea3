"""Tiny models of three architectures, exported once a session: an export takes seconds, whatever the size."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from surgery.operations.export.export_onnx import ExportReport, export_onnx

os.environ["HF_HUB_OFFLINE"] = "1"


@dataclass(frozen=True)
class Exported:
    """A folder, what it was exported to, and the report."""

    model: Path
    onnx: Path
    report: ExportReport


def _make_model(folder: Path, kind: str, seed: int = 0, dtype: str = "float32", **config: object) -> Path:
    """Saves a random model of some architecture as a Hugging Face folder."""
    import torch
    import transformers

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    gpt2 = {"vocab_size": 100, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**{**sizes, **config}))
    elif kind == "bert-classifier":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**{**sizes, **config}))
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**gpt2, **tokens, **config}))
    else:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**{**sizes, "num_hidden_layers": 1, "num_key_value_heads": 2, **tokens, **config})
        )
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms would begin as zeros and ones in every model
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@pytest.fixture
def make_model() -> Callable[..., Path]:
    """Saves a tiny random model: folder, kind, then seed, dtype and entries of its config."""
    return _make_model


@pytest.fixture
def edit_config() -> Callable[..., Path]:
    """Sets entries of a folder's config.json; None removes one."""

    def edit(folder: Path, **changes: object) -> Path:
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        return folder

    return edit


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Exported, Exported]]:
    """Two models of one architecture with different weights, exported each into its own folder; made when asked for."""
    made: dict[str, tuple[Exported, Exported]] = {}

    def export(kind: str) -> tuple[Exported, Exported]:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            pair = []
            for seed, name in enumerate(("base", "merged")):
                model = _make_model(root / f"{name}-model", kind, seed)
                out = root / name / "model.onnx"
                pair.append(Exported(model, out, export_onnx(model, out)))
            made[kind] = (pair[0], pair[1])
        return made[kind]

    return export


@pytest.fixture
def loads_silently(capfd: pytest.CaptureFixture[str]) -> Callable[[str | Path], Any]:
    """Loads a graph by ONNX Runtime with its warnings on; that it has any to give is an error."""
    import onnxruntime

    def load(path: str | Path) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 2  # warnings and worse
        capfd.readouterr()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        said = capfd.readouterr()
        assert said.out + said.err == ""
        return session

    return load


@pytest.fixture
def bert(twins: Callable[[str], tuple[Exported, Exported]]) -> Exported:
    """A BERT and its export; to be looked at, not to be changed."""
    return twins("bert")[0]
