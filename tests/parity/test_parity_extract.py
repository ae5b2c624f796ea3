"""Every kind of weight and every form of an adapter that extract writes: peft loads it without a word, and computes
what the merged model computes."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft_oracle import Convolutions
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery.errors import ReportedError
from surgery.ranks import EnergyRule

pytestmark = [pytest.mark.processor, pytest.mark.filterwarnings("ignore")]


class Words(nn.Module):
    """An embedding, GPT-2's way of storing a layer, and layers with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 16)
        self.mix = transformers.pytorch_utils.Conv1D(24, 16)
        self.up = nn.Linear(24, 18)
        self.down = nn.Linear(18, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: (batch, length)."""
        return self.norm(self.down(torch.tanh(self.up(self.mix(self.embed_tokens(ids))))))


class Layers(nn.Module):
    """Linear layers alone, each with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 18)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 16)."""
        return self.down(torch.tanh(self.up(x)))


class Stacks(nn.Module):
    """Experts in stacks, a matrix and biases of no layer, registered in no alphabetical order."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = (12, 20), (10, 14)
        self.up = nn.Parameter(0.2 * torch.randn(3, *(up if transposed else up[::-1])))
        self.up_bias = nn.Parameter(torch.randn(3, 20))
        self.down = nn.Parameter(0.2 * torch.randn(3, *(down if transposed else down[::-1])))
        self.also = nn.Parameter(0.2 * torch.randn(14, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 12)."""
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        hidden = torch.einsum("bi,eio->beo", x, up) + self.up_bias
        return torch.einsum("bei,eio->bo", torch.tanh(hidden[..., ::2]) * hidden[..., 1::2], down) @ self.also


class Mixture(nn.Module):
    """Experts before a layer."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.experts = Stacks(transposed)
        self.out = nn.Linear(16, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 12)."""
        return self.out(self.experts(x))


def ids() -> torch.Tensor:
    """Two sequences of tokens."""
    return torch.arange(14).reshape(2, 7)


def assert_peft_agrees(
    folder: Path, base: nn.Module, inputs: torch.Tensor, *, scale: float = 0.05, **how: Any
) -> tuple[surgery.ExtractReport, dict[str, Any]]:
    """Tunes everything a little, extracts, merges, and compares outputs with peft's; returns the report and config."""
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    save_file({name: t.contiguous() for name, t in base.state_dict().items()}, folder / "base.st")
    save_file({name: t.contiguous() for name, t in tuned.state_dict().items()}, folder / "tuned.st")
    report = surgery.extract(folder / "base.st", folder / "tuned.st", folder / "adapter", **how)
    surgery.merge(folder / "base.st", folder / "adapter", folder / "merged.st")
    merged = copy.deepcopy(base)
    merged.load_state_dict(load_file(folder / "merged.st"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to True")
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")  # it does not look at parameters
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(inputs), merged(inputs), atol=2e-5, rtol=0)
        assert not torch.allclose(adapted(inputs), base(inputs), atol=1e-3)
        error = {name: (merged.state_dict()[name] - t).norm() for name, t in tuned.state_dict().items()}
    assert all(error[name] < 1e-6 for name in error if name not in {module.name for module in report.modules})
    for module in report.modules:  # the error that the report says is the error of the merge
        assert float(error[module.name]) == pytest.approx(module.residual * module.delta_norm, rel=2e-3, abs=1e-5)
    return report, json.loads((folder / "adapter" / "adapter_config.json").read_text())


FORMS: list[dict[str, Any]] = [
    {"rank": 2},
    {"rank": EnergyRule(0.6)},
    {"rank": 2, "overrides": {"*.weight": 2, "*o*": 1}},
    {"rank": 2, "method": "dora"},
]


@pytest.mark.parametrize("how", FORMS, ids=["rank", "energy", "overrides", "dora"])
def test_linear_transposed_and_embedding(tmp_path: Path, how: dict[str, Any]) -> None:
    """With their biases and norms in full."""
    report, config = assert_peft_agrees(tmp_path, Words(), ids(), **how)
    assert {module.kind for module in report.modules} == {"linear", "transposed", "embedding"}
    assert report.ledger["full"] == 5
    assert config["use_dora"] == (how.get("method") == "dora")


@pytest.mark.parametrize("how", FORMS, ids=["rank", "energy", "overrides", "dora"])
def test_convolutions(tmp_path: Path, how: dict[str, Any]) -> None:
    """In one, two and three dimensions; the one in groups, which no BA fits, goes in full by the user's word."""
    report, _ = assert_peft_agrees(tmp_path, Convolutions(), torch.randn(2, 4, 9), kinds={"grouped.*": "full"}, **how)
    assert {module.name for module in report.modules} == {f"{name}.weight" for name in ("one", "two", "point", "three")}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("how", FORMS[:3], ids=["rank", "energy", "overrides"])
def test_stacks_of_experts(tmp_path: Path, transposed: bool, how: dict[str, Any]) -> None:
    """Each expert at its own optimum, in both orientations, and a matrix of no layer."""
    base = Mixture(transposed)
    stack = "experts-transposed" if transposed else "experts"  # in the order in which the module registers them
    kinds = {"experts.up": stack, "experts.down": stack, "experts.also": "parameter"}
    report, config = assert_peft_agrees(tmp_path, base, torch.randn(5, 12), kinds=kinds, **how)
    assert set(config["target_parameters"]) == {"experts.up", "experts.down", "experts.also"}
    assert {module.kind for module in report.modules} == {"parameter", "linear"}


def test_an_unchanged_stack_of_experts_leaves_its_wrapper_out(tmp_path: Path) -> None:
    """peft's keys depend on how many of a module's parameters are adapted: known only once they are compared."""
    base = Mixture(transposed=False)
    state = {name: t.clone() for name, t in base.state_dict().items()}
    save_file(state, tmp_path / "base.st")
    for changed in ("experts.up", "experts.down"):
        save_file(state | {changed: state[changed] + torch.randn_like(state[changed])}, tmp_path / "tuned.st")
        kinds = {"experts.up": "experts", "experts.down": "experts", "experts.also": "full", "*.weight": "full"}
        surgery.extract(tmp_path / "base.st", tmp_path / "tuned.st", tmp_path / changed, rank=2, kinds=kinds)
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / changed).eval()
        surgery.merge(tmp_path / "base.st", tmp_path / changed, tmp_path / f"{changed}.st")
        merged = copy.deepcopy(base)
        merged.load_state_dict(load_file(tmp_path / f"{changed}.st"))
        x = torch.randn(5, 12)
        torch.testing.assert_close(adapted(x), merged(x), atol=2e-5, rtol=0)


def test_biases_with_the_factors(tmp_path: Path) -> None:
    """`bias="lora"` writes Δb beside B, as peft's lora_bias has it; a layer without a bias forbids it."""
    report, config = assert_peft_agrees(tmp_path, Layers(), torch.randn(3, 16), rank=2, bias="lora")
    assert config["lora_bias"]
    assert config["bias"] == "none"
    assert report.ledger["full"] == 0
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.up.lora_B.bias" in keys
    with pytest.raises(ReportedError, match="needs a bias in every adapted layer"):
        assert_peft_agrees(tmp_path, Words(), ids(), rank=2, bias="lora")


def test_dora_is_never_worse_than_lora(tmp_path: Path) -> None:
    """Weight by weight, on a change that mostly scales rows, where LoRA needs rank and DoRA none, and on any other."""
    base = Layers()
    state = {name: t.clone() for name, t in base.state_dict().items()}
    save_file(state, tmp_path / "base.st")
    scaled = {n: t * (1 + torch.rand(len(t))[:, None]) if t.dim() == 2 else t for n, t in state.items()}
    anyhow = {n: t + 0.1 * torch.randn_like(t) for n, t in state.items()}
    for name, tensors in (("scaled", scaled), ("anyhow", anyhow)):
        save_file(tensors, tmp_path / f"{name}.st")
        residuals = {}
        for method in ("lora", "dora"):
            report = surgery.extract(
                tmp_path / "base.st", tmp_path / f"{name}.st", tmp_path / f"{name}-{method}", rank=3, method=method
            )
            residuals[method] = {module.name: module.residual for module in report.modules}
        assert all(
            residuals["dora"][weight] <= residuals["lora"][weight] for weight in state if weight in residuals["lora"]
        )
        assert name != "scaled" or all(residual < 1e-3 for residual in residuals["dora"].values())


def test_a_grown_vocabulary(tmp_path: Path) -> None:
    """Shared and new rows in full; peft loads it once the base is resized, our merge grows the base by itself."""
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        tie_word_embeddings=False,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(base)
    tuned.resize_token_embeddings(64)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "tuned")
    report = surgery.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=4)
    assert any("grew from 60 to 64" in note for note in report.notes)
    surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(merged[name], tuned.state_dict()[name])
    base.resize_token_embeddings(64)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokens = torch.arange(50, 64)[None]
    torch.testing.assert_close(adapted(tokens).logits, ours(tokens).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["GptOss", "Qwen3Moe", "Mixtral", "Glm4Moe"])
def test_mixtures_of_experts_of_transformers(tmp_path: Path, name: str) -> None:
    """Fused experts, or one by one in the file and fused in memory: orientation, order, names and routers are learned
    from the model on the meta device. Layers beside experts that are called like them are not lost."""
    sizes = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    if name == "Glm4Moe":
        sizes |= {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_hidden_layers": 2}
    model_class = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(0)
    base = model_class(getattr(transformers, f"{name}Config")(**sizes)).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in [*base.parameters()]:
            parameter.add_(0.05 * torch.randn_like(parameter))
        for old, new in zip(base.parameters(), tuned.parameters(), strict=True):
            new.copy_(old + 0.05 * torch.randn_like(old))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = surgery.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=4)
    surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = model_class.from_pretrained(tmp_path / "merged").eval()
    adapted = peft.PeftModel.from_pretrained(
        model_class.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, atol=2e-5, rtol=0)
        assert not torch.allclose(merged(tokens).logits, base(tokens).logits, atol=1e-3)
    if report.notes and any("become parts of others" in note for note in report.notes):
        with pytest.raises(ReportedError, match="peft has no DoRA"):
            surgery.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "dora", rank=4, method="dora")
    assert any("experts" in module.name for module in report.modules)


def test_a_model_that_transformers_renames(tmp_path: Path) -> None:
    """A vision transformer's file has other names than the model; its patches are a convolution, its positions a
    parameter."""
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    base = transformers.ViTForImageClassification(config).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = surgery.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=4)
    assert {module.kind for module in report.modules} == {"linear", "conv"}
    surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.ViTForImageClassification.from_pretrained(tmp_path / "merged").eval()
    base = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(adapted(pixels).logits, merged(pixels).logits, atol=2e-5, rtol=0)
