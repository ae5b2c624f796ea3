"""Mixtures of experts as transformers saves them: the file's names are not the model's, and peft's are the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import logits

import surgery
from formats.dialects.peft_writing import Extracted, factor_keys, lora_config, parameter_keys
from formats.errors import AdapterFormatError, UnmatchedKeys
from formats.layers import LayerKind
from surgery.errors import Unsupported
from surgery.methods.lora import pack_experts

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 32, "intermediate_size": 24,
}  # fmt: skip
ROUTED = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
MODELS: dict[str, tuple[type, dict[str, Any], str]] = {
    "mixtral": (
        transformers.MixtralConfig,
        {"num_local_experts": 12},
        "mlp",
    ),  # the file: block_sparse_moe.experts.0.w1
    "qwen3_moe": (transformers.Qwen3MoeConfig, ROUTED, "mlp"),  # the file: mlp.experts.0.gate_proj
    "granitemoe": (transformers.GraniteMoeConfig, {"num_local_experts": 3}, "block_sparse_moe"),  # …moe.input_linear
    "gpt_oss": (transformers.GptOssConfig, {"num_local_experts": 3, "head_dim": 8}, "mlp"),  # as in memory, (in, out)
}


def save_base(folder: Path, kind: str) -> torch.nn.Module:
    """A tiny mixture, saved as transformers saves it."""
    config, settings, _ = MODELS[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**{**SIZES, **settings}))
    model.save_pretrained(folder / "base")
    return load(folder / "base")


def random(*shape: int) -> torch.Tensor:
    """Factors that change a weight visibly."""
    return 0.3 * torch.randn(*shape)


def load(folder: Path) -> torch.nn.Module:
    """The model of a folder."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def write(folder: Path, tensors: dict[str, torch.Tensor], extracted: Extracted) -> None:
    """An adapter with our keys and config."""
    folder.mkdir()
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(lora_config(extracted)))


@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["down_proj"]], ids=["both", "one"])
@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_of_stacked_experts_merges_into_the_file(tmp_path: Path, kind: str, targets: list[str]) -> None:
    """Every tensor is the one that transformers writes of peft's merge, whether the file holds the experts stacked,
    one by one or under another name."""
    moe = MODELS[kind][2]
    parameters = [f"{moe}.experts.{name}" for name in targets]
    router = f"{moe}.gate.weight" if kind != "granitemoe" else f"{moe}.router.weight"
    parameters += [router] if kind in ("mixtral", "granitemoe") else []
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=parameters)
    adapted = peft.get_peft_model(save_base(tmp_path, kind), config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(random(*parameter.shape))
    adapted.save_pretrained(tmp_path / "adapter")
    surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    adapted.merge_and_unload().save_pretrained(tmp_path / "theirs")
    base, merged, expected = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged", "theirs")
    )
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert (tensor - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name
        assert torch.equal(tensor, base[name]) is torch.equal(expected[name], base[name]), name


def test_peft_loads_stacked_experts_written_with_our_keys(tmp_path: Path) -> None:
    """Keys by the model's names; beside the experts a layer called as peft's conversion for older adapters expects,
    which only a targeted parameter saves from it."""
    model = save_base(tmp_path, "qwen3_moe")
    holder = "model.layers.1.mlp.experts"
    tensors: dict[str, torch.Tensor] = {}
    parameters = {f"{holder}.gate_up_proj": 2, f"{holder}.down_proj": 3}
    for name, (key_a, key_b) in parameter_keys(holder, ["gate_up_proj", "down_proj"]).items():
        experts, out, into = model.get_parameter(f"{holder}.{name}").shape
        rank = parameters[f"{holder}.{name}"]
        tensors[key_a], tensors[key_b] = pack_experts(random(experts, rank, into), random(experts, out, rank))
    key_a, key_b = factor_keys("model.layers.0.mlp.gate", LayerKind.LINEAR)
    tensors[key_a], tensors[key_b] = random(2, 16), random(12, 2)
    parameters["model.layers.0.mlp.gate.weight"] = 2
    modules = frozenset(name for name, _ in model.named_modules() if name)
    extracted = Extracted({}, (), False, False, modules, 2, "base", parameters=parameters)
    write(tmp_path / "adapter", tensors, extracted)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    loaded = peft.get_peft_model_state_dict(adapted)
    assert {key: tensor.tolist() for key, tensor in loaded.items()} == {k: t.tolist() for k, t in tensors.items()}
    surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(adapted), atol=1e-5, rtol=0)


def test_peft_loads_single_experts_written_with_the_files_names(tmp_path: Path) -> None:
    """Each expert's layers as layers, as adapters for transformers 4 have them: peft stacks them, if they are complete
    and of one rank."""
    model = save_base(tmp_path, "mixtral")
    base = load_file(tmp_path / "base/model.safetensors")
    ranks = {name.removesuffix(".weight"): 2 for name in base if ".experts." in name or "q_proj" in name}
    tensors: dict[str, torch.Tensor] = {}
    for module, rank in ranks.items():
        out, into = base[f"{module}.weight"].shape
        key_a, key_b = factor_keys(module, LayerKind.LINEAR)
        tensors[key_a], tensors[key_b] = random(rank, into), random(out, rank)
    modules = frozenset(name.rpartition(".")[0] for name in base)
    write(tmp_path / "adapter", tensors, Extracted(ranks, (), False, False, modules, 2, "base"))
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(adapted), atol=1e-5, rtol=0)


def test_experts_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    """A file that lacks one expert holds no stack; a stack replaced in full cannot go into pieces."""
    model = save_base(tmp_path, "qwen3_moe")
    parameters = ["mlp.experts.gate_up_proj"]
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=parameters)).save_pretrained(
        tmp_path / "adapter"
    )
    base = load_file(tmp_path / "base/model.safetensors")
    lacking = {name: tensor for name, tensor in base.items() if "experts.5.up_proj" not in name}
    save_file(lacking, tmp_path / "lacking.st")
    with pytest.raises(UnmatchedKeys, match="match nothing"):
        surgery.merge(tmp_path / "lacking.st", tmp_path / "adapter", tmp_path / "merged.st")
    key = "base_model.model.model.layers.0.mlp.experts.gate_up_proj"
    save_file({key: torch.zeros(12, 16, 16)}, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(AdapterFormatError, match="as separate tensors"):
        surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_stacked_experts_at_another_rank(tmp_path: Path) -> None:
    """The adapter has the stacks and the file the experts one by one: each expert gets its own optimum, under the
    model's names, with other ranks for either stack; peft computes what the merged model does."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj"], target_parameters=targets)
    adapted = peft.get_peft_model(save_base(tmp_path, "mixtral"), config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(random(*parameter.shape))
    adapted.save_pretrained(tmp_path / "adapter")
    settings: dict[str, Any] = {"base": tmp_path / "base", "overrides": {"*.down_proj": 1}}
    report = surgery.resize(tmp_path / "adapter", tmp_path / "small", rank=2, **settings)
    assert {module.rank for module in report.modules if module.name.endswith("down_proj")} == {1}
    whole, merged = tmp_path / "merged-whole", tmp_path / "merged"
    surgery.merge(tmp_path / "base", tmp_path / "adapter", whole, dtype="float32")
    surgery.merge(tmp_path / "base", tmp_path / "small", merged)
    before, full, after = (load_file(path / "model.safetensors") for path in (tmp_path / "base", whole, merged))
    name = "model.layers.1.block_sparse_moe.experts.7.w2.weight"
    delta, rest = (full[name] - before[name]).double(), (full[name] - after[name]).double()
    optimum = torch.linalg.svdvals(delta)[1:].square().sum().sqrt()
    torch.testing.assert_close(rest.norm(), optimum, rtol=1e-4, atol=0)
    theirs = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "small").eval()
    torch.testing.assert_close(logits(theirs), logits(load(merged)), atol=1e-4, rtol=1e-4)


def test_a_parameter_that_the_file_calls_otherwise_keeps_its_rank(tmp_path: Path) -> None:
    """Its name in the model, which the config must say, is not in the adapter's keys: refused."""
    targets = ["block_sparse_moe.experts.gate_up_proj"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False)
    peft.get_peft_model(save_base(tmp_path, "granitemoe"), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(Unsupported, match="differently"):
        surgery.resize(tmp_path / "adapter", tmp_path / "small", rank=2, base=tmp_path / "base")
