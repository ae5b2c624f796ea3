from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from opened import opened_architecture
from safetensors.torch import save_file

from formats import DType, TensorSpec, open_checkpoint
from formats.errors import CorruptFile
from surgery.errors import MissingTensors, UnknownArchitecture, Unsupported
from surgery.onnx.trace.architecture import build_module, checkpoint_specs, stored_ties
from surgery.onnx.trace.kinds import longest

Make = Callable[..., Path]


def _specs_of(folder: Path) -> dict[str, TensorSpec]:
    with open_checkpoint(folder) as checkpoint:
        return dict(checkpoint.specs)


def _renamed(specs: dict[str, TensorSpec], change: Callable[[str], str]) -> dict[str, TensorSpec]:
    return {change(name): replace(spec, name=change(name)) for name, spec in specs.items()}


@pytest.mark.parametrize(
    ("kind", "name", "inputs"),
    [
        ("bert", "BertModel", ("input_ids", "attention_mask", "token_type_ids")),
        ("gpt2", "GPT2LMHeadModel", ("input_ids", "attention_mask")),
        ("llama", "LlamaForCausalLM", ("input_ids", "attention_mask")),
    ],
)
def test_config_names_the_class_and_the_class_names_the_inputs(
    tmp_path: Path, make_model: Make, kind: str, name: str, inputs: tuple[str, ...]
) -> None:
    """No list of architectures: whatever config.json names and transformers has. Inputs that change nothing are out."""
    architecture = opened_architecture(make_model(tmp_path / "m", kind))
    assert architecture.model_class.__name__ == name
    (program,) = architecture.kind.programs
    assert tuple(each.name for each in program.inputs) == inputs
    assert longest(architecture.config) == 64


def test_no_config(tmp_path: Path) -> None:
    """A folder without config.json is refused by saying what is missing."""
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnknownArchitecture, match=r"no config\.json"):
        opened_architecture(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"architectures": []}', '{"architectures": [7]}'])
def test_config_without_a_class(tmp_path: Path, content: str) -> None:
    """config.json that is no JSON object, or names no class, is refused and located."""
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    broken = content in ("{", "[]")
    with pytest.raises(CorruptFile if broken else UnknownArchitecture) as caught:
        opened_architecture(tmp_path)
    assert caught.value.details["where"] == str(tmp_path / "config.json")
    if not broken:
        assert "tokens, images" in caught.value.details["expected"]
        assert "--factory" in caught.value.details["next"]


@pytest.mark.parametrize("name", ["BertModle", "Trainer", "torch", "__name__"])
def test_unknown_class(tmp_path: Path, make_model: Make, edit_config: Make, name: str) -> None:
    """A name that is no model class of transformers is refused; the nearest is offered."""
    folder = edit_config(make_model(tmp_path / "m", "bert"), architectures=[name])
    with pytest.raises(UnknownArchitecture) as caught:
        opened_architecture(folder)
    assert name in caught.value.details["found"]
    assert "tokens, images" in caught.value.details["expected"]
    assert "--factory" in caught.value.details["next"]
    if name == "BertModle":
        assert "BertModel" in caught.value.details["found"]


def test_without_transformers(tmp_path: Path, make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers is an extra; where it is not installed, the error says how to install it."""
    folder = make_model(tmp_path / "m", "bert")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(Unsupported) as caught:
        opened_architecture(folder)
    assert "model-surgery[hf]" in caught.value.details["next"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"architectures": ["Wav2Vec2Model"], "model_type": "wav2vec2"}, "input_values"),
    ],
)
def test_models_whose_inputs_are_not_known(
    tmp_path: Path, make_model: Make, edit_config: Make, changes: dict[str, object], reason: str
) -> None:
    """Quantised checkpoints and models fed with something of unknown shape are refused, with a way out."""
    folder = edit_config(make_model(tmp_path / "m", "bert"), **changes)
    with pytest.raises(Unsupported, match=reason) as caught:
        opened_architecture(folder)
    assert "--factory" in caught.value.details["next"]


def test_a_cache_of_a_model_that_has_none(tmp_path: Path, make_model: Make) -> None:
    """An encoder keeps no keys and values, and says so."""
    with pytest.raises(Unsupported, match="keeps no keys and values"):
        opened_architecture(make_model(tmp_path / "m", "bert"), cached=True)


def test_building_writes_no_parameter(tmp_path: Path, make_model: Make) -> None:
    """The module has the config's shapes and the tie of the embeddings, and is in inference mode."""
    module = build_module(opened_architecture(make_model(tmp_path / "m", "gpt2")), DType.F16)
    assert module.lm_head.weight is module.transformer.wte.weight
    assert {str(p.dtype) for p in module.parameters()} == {"torch.float16"}
    assert not module.training


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("spelling", ["as saved", "with prefix", "without prefix"])
def test_names_with_and_without_the_prefix(tmp_path: Path, make_model: Make, kind: str, spelling: str) -> None:
    """Every tensor of the module finds its tensor in the file, under whichever of the usual names."""
    folder = make_model(tmp_path / "m", kind)
    module = build_module(opened_architecture(folder), DType.F32)
    prefix = f"{module.base_model_prefix}."
    change: dict[str, Callable[[str], str]] = {
        "as saved": lambda name: name,
        "with prefix": lambda name: name if name.startswith((prefix, "lm_head")) else prefix + name,
        "without prefix": lambda name: name.removeprefix(prefix),
    }
    specs = _renamed(_specs_of(folder), change[spelling])
    found = checkpoint_specs(module, specs, folder)
    assert found.keys() == module.state_dict().keys()
    assert {spec.name for spec in found.values()} == specs.keys()


@pytest.mark.parametrize("kept", ["lm_head.weight", "transformer.wte.weight"])
def test_a_tie_stored_under_either_name(tmp_path: Path, make_model: Make, kept: str) -> None:
    """Tied weights stand in the file once, under one of their names; both names of the module lead there."""
    folder = make_model(tmp_path / "m", "gpt2")
    module = build_module(opened_architecture(folder), DType.F32)
    specs = _renamed(
        _specs_of(folder), lambda name: kept if name in ("lm_head.weight", "transformer.wte.weight") else name
    )
    found = checkpoint_specs(module, specs, folder)
    assert found["lm_head.weight"].name == found["transformer.wte.weight"].name == kept
    assert stored_ties(module, specs) == ()


def test_a_tie_stored_twice_is_reported(tmp_path: Path, make_model: Make) -> None:
    """Both names in the file: whoever has the bytes must compare them."""
    folder = make_model(tmp_path / "m", "gpt2")
    module = build_module(opened_architecture(folder), DType.F32)
    specs = _specs_of(folder)
    specs["lm_head.weight"] = replace(specs["transformer.wte.weight"], name="lm_head.weight")
    assert stored_ties(module, specs) == (("transformer.wte.weight", "lm_head.weight"),)


def test_the_layer_norms_of_2018(tmp_path: Path, make_model: Make) -> None:
    """gamma and beta are weight and bias."""
    folder = make_model(tmp_path / "m", "bert")
    module = build_module(opened_architecture(folder), DType.F32)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def age(name: str) -> str:
        for modern, legacy in old.items():
            name = name.replace(modern, legacy)
        return name

    found = checkpoint_specs(module, _renamed(_specs_of(folder), age), folder)
    assert found["embeddings.LayerNorm.weight"].name == "embeddings.LayerNorm.gamma"


def test_missing_tensors_are_named(tmp_path: Path, make_model: Make) -> None:
    """Every missing tensor is named, with the nearest that is there."""
    folder = make_model(tmp_path / "m", "bert")
    module = build_module(opened_architecture(folder), DType.F32)
    specs = _specs_of(folder)
    for name in ("pooler.dense.weight", "encoder.layer.1.output.dense.bias"):
        del specs[name]
    with pytest.raises(MissingTensors) as caught:
        checkpoint_specs(module, specs, folder)
    assert caught.value.details["expected"] == "encoder.layer.1.output.dense.bias, pooler.dense.weight"
    assert "encoder.layer.0.output.dense.bias" in caught.value.details["found"]


def test_a_head_that_is_not_there(tmp_path: Path, make_model: Make) -> None:
    """A classifier that config.json promises, and a head that it does not tie to the embedding."""
    for kind, head in (("bert-classifier", "classifier.weight"), ("llama", "lm_head.weight")):
        folder = make_model(tmp_path / kind, kind)
        specs = _specs_of(folder)
        del specs[head]
        with pytest.raises(MissingTensors) as caught:
            checkpoint_specs(build_module(opened_architecture(folder), DType.F32), specs, folder)
        assert caught.value.details["expected"] == head
        assert "architectures" in caught.value.details["next"]


def test_shapes_that_contradict_the_config(tmp_path: Path, make_model: Make, edit_config: Make) -> None:
    """A config of other sizes than the weights is refused at the first tensor that shows it."""
    folder = edit_config(make_model(tmp_path / "m", "bert"), vocab_size=101)
    module = build_module(opened_architecture(folder), DType.F32)
    with pytest.raises(Unsupported, match=r"embeddings\.word_embeddings\.weight") as caught:
        checkpoint_specs(module, _specs_of(folder), folder)
    assert caught.value.details["expected"] == "(101, 32)"
    assert caught.value.details["found"] == "(100, 32)"
