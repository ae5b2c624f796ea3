"""peft itself, installed, is the judge: it loads what we extract, and merges what we merge."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import tiny_models as models
import torch
from safetensors.torch import load_file

import surgery


@pytest.mark.parametrize("kind", models.CLASSES)
@pytest.mark.parametrize("rank", [4, 12])
def test_peft_loads_what_extract_writes_and_agrees_with_merge(tmp_path: Path, kind: str, rank: int) -> None:
    """No warning from peft, and its logits are those of the merged folder, for adapters of matrices, embeddings,
    norms, biases and heads; peft's own merge agrees too."""
    models.build(kind).save_pretrained(tmp_path / "base")
    models.shift(models.build(kind)).save_pretrained(tmp_path / "tuned")
    surgery.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=rank)
    surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to True")  # GPT-2's head is a Linear among Conv1Ds
        adapted = peft.PeftModel.from_pretrained(models.load(kind, tmp_path / "base"), tmp_path / "adapter").eval()
    ours = models.logits(models.load(kind, tmp_path / "merged"))
    torch.testing.assert_close(models.logits(adapted), ours, atol=1e-5, rtol=0)
    torch.testing.assert_close(models.logits(adapted.merge_and_unload()), ours, atol=1e-5, rtol=0)
    if rank == 64:
        tuned = models.logits(models.load(kind, tmp_path / "tuned"))
        torch.testing.assert_close(ours, tuned, atol=1e-5, rtol=0)


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"0.*": 3}, "alpha_pattern": {"1.*": 5}},
}
TARGETS = {
    "bert": ["query", "value", "dense", "word_embeddings"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
}


@pytest.mark.parametrize("kind", models.CLASSES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore")
def test_merge_equals_peft_merge_and_unload(tmp_path: Path, kind: str, variant: str) -> None:
    """An adapter made by peft merges to peft's own weights within 1e-6 relative in float32."""
    adapter = made_by_peft(tmp_path, kind, **VARIANTS[variant])
    surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    expected = adapter.merge_and_unload().state_dict()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    changed = 0
    for name, tensor in merged.items():
        assert relative(tensor, expected[name]) <= 1e-6, name
        changed += not torch.equal(tensor, base[name])
    assert changed >= 4


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
@pytest.mark.filterwarnings("ignore")
def test_merge_in_half_precision_is_within_one_unit_of_peft(tmp_path: Path, dtype: torch.dtype, ulp: float) -> None:
    """In 16 bits peft rounds ΔW, then the sum, and we round once: apart by at most a unit in the last place of the
    largest of W0, ΔW and W."""
    adapter = made_by_peft(tmp_path, "llama", dtype=dtype)
    surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    deltas = {
        f"{name.removeprefix('base_model.model.')}.weight": module.get_delta_weight("default").double()
        for name, module in adapter.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    expected = adapter.merge_and_unload().state_dict()
    base = load_file(tmp_path / "base" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert len(deltas) == 7
    for name, delta in deltas.items():
        ours, theirs, w0 = merged[name].double(), expected[name].double(), base[name].double()
        unit = 2 * ulp * torch.stack([ours.abs(), w0.abs(), delta.abs()]).amax(dim=0)
        assert ((ours - theirs).abs() <= unit).all(), name
        assert not torch.equal(merged[name], base[name])


@pytest.mark.filterwarnings("ignore")
def test_merge_takes_full_tensors_and_biases(tmp_path: Path) -> None:
    """modules_to_save replaces, lora_bias adds, bias=all replaces: as peft merges them."""
    targets = ["query", "value"]
    adapter = made_by_peft(tmp_path, "bert", lora_bias=True, modules_to_save=["classifier"], target_modules=targets)
    surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    expected = adapter.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert relative(tensor, expected[name]) <= 1e-6, name


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_the_full_model_merges_into_a_base_without_its_prefix(tmp_path: Path) -> None:
    """Adapters name `bert.encoder…` where the base file says `encoder…`: one common difference is bridged."""
    made_by_peft(tmp_path, "bert")
    models.build("bert").bert.save_pretrained(tmp_path / "bare")
    bare = surgery.merge(tmp_path / "bare", tmp_path / "adapter", tmp_path / "merged-bare")
    surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    whole = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "merged-bare" / "model.safetensors").items():
        assert torch.equal(tensor, whole[f"bert.{name}"])
    assert bare.ledger["merged"] > 0


@pytest.mark.filterwarnings("ignore")
def test_tied_factors_are_merged_once(tmp_path: Path) -> None:
    """peft stores a tied embedding's factors twice and merges them twice; the model it trained has them once."""
    model = models.build("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_embedding" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    assert "base_model.model.lm_head.lora_A.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    ours = models.logits(models.load("llama", tmp_path / "merged"))
    torch.testing.assert_close(models.logits(adapted), ours, atol=1e-5, rtol=0)


def made_by_peft(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **settings: object) -> peft.PeftModel:
    """Saves a base and a LoRA that peft made for it; every factor is random."""
    model = models.build(kind, dtype)
    model.save_pretrained(folder / "base")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": TARGETS[kind], **settings})
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder / "adapter")
    return adapted.eval()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference against the largest value."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30))
