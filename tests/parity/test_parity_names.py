"""Models whose layers have other names in memory than in their file: peft's adapters have the former."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import surgery
from formats.errors import UnmatchedKeys

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def vit() -> transformers.PreTrainedModel:
    """The file: vit.encoder.layer.0.attention.attention.query; in memory: vit.layers.0.attention.q_proj."""
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=8, patch_size=4))


def llava() -> transformers.PreTrainedModel:
    """The file: language_model.model.layers.0; in memory: model.language_model.layers.0."""
    text = transformers.LlamaConfig(**SIZES, vocab_size=50)
    vision = transformers.CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))


@pytest.mark.parametrize("build", [vit, llava], ids=["vit", "llava"])
def test_an_adapter_with_the_models_names_merges_into_the_file(tmp_path: Path, build: object) -> None:
    """Linear layers and, for both, the convolution that makes patches; also taken off again."""
    torch.manual_seed(0)
    model = build()  # type: ignore[operator]
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    targets = r".*(q_proj|v_proj|patch_embedding|projection|down_proj)"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    report = surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    adapted.merge_and_unload().save_pretrained(tmp_path / "theirs")
    merged, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("merged", "theirs"))
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert (tensor - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max().clamp_min(1e-30), name
    assert report.ledger["merged"] >= 3
    back = surgery.unmerge(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back")
    assert back.ledger["unmerged"] == report.ledger["merged"]


def clip_text() -> transformers.PreTrainedModel:
    """A text encoder of a pipeline, whose adapters come in kohya's names."""
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZES, vocab_size=50, max_position_embeddings=9))


@pytest.mark.parametrize("to", ["peft", "lora"])
@pytest.mark.parametrize("way", ["kohya", "comfyui"])
@pytest.mark.parametrize("build", [vit, llava, clip_text], ids=["vit", "llava", "clip"])
def test_what_is_written_for_peft_has_the_models_names(tmp_path: Path, build: object, way: str, to: str) -> None:
    """Through another dialect, which has the file's, and back: peft loads every factor, with the same outputs."""
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    kind = type(build())  # type: ignore[operator]
    targets = r".*(q_proj|v_proj|patch_embedding|projection|down_proj|fc1)"
    adapted = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), peft.LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    base, between, out = tmp_path / "base", tmp_path / "between.st", tmp_path / "out"
    surgery.convert(tmp_path / "adapter", between, way, base=base)
    if to == "peft":
        surgery.convert(between, out, to, base=base)
    else:
        surgery.to_lora(between, out, rank=2, base=base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        again = peft.PeftModel.from_pretrained(kind.from_pretrained(base), out)
    ours, theirs = again.merge_and_unload().state_dict(), adapted.merge_and_unload().state_dict()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-5)
    assert sum("lora_A" in key for key in load_file(out / "adapter_model.safetensors")) >= 3


def test_a_lora_of_another_method_keeps_the_adapters_names(tmp_path: Path) -> None:
    """LoHa on what transformers renames: peft loads the LoRA as it loaded the LoHa."""
    torch.manual_seed(0)
    vit().save_pretrained(tmp_path / "base")
    kind = transformers.ViTForImageClassification
    config = peft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    adapted = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    report = surgery.to_lora(tmp_path / "adapter", tmp_path / "lora", rank=4, base=tmp_path / "base")
    assert report.exact == len(report.modules) == 2
    again = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        found, expected = again(pixel_values=pixels).logits, adapted.eval()(pixel_values=pixels).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_file_alone_does_not_tell_the_models_names(tmp_path: Path) -> None:
    """Without the config.json beside it nothing can be built, and the mismatch is reported as it is."""
    model = vit()
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base" / "config.json").unlink()
    for base in (tmp_path / "base", tmp_path / "base" / "model.safetensors"):
        with pytest.raises(UnmatchedKeys, match="match nothing"):
            surgery.merge(base, tmp_path / "adapter", tmp_path / "merged")
