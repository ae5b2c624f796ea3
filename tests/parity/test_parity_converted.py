"""What convert writes, read by the libraries it is written for: peft and loralib. LyCORIS and diffusers have files of
their own."""

from __future__ import annotations

import warnings
from pathlib import Path

import loralib
import peft
import pytest
import torch
from dialect_models import KINDS, PART, Net, made_by_peft
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import surgery


def loaded_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The weights that peft merges, loading without a warning about keys."""
    model = Net()
    model.load_state_dict(load_file(base))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        adapted = peft.PeftModel.from_pretrained(model, adapter)
    names = {name for name, _ in adapted.named_parameters() if "base_layer" not in name and "lora_" in name}
    assert len(names) == len({name for name in load_file(adapter / "adapter_model.safetensors") if "lora_" in name})
    return adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize("way", ["kohya", "lycoris", "comfyui", "diffusers", "loralib"])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding", "Conv1D", "ranks", "rsLoRA", "DoRA", "LoHa", "LoKr"])
def test_peft_loads_what_came_through_another_dialect(tmp_path: Path, kind: str, way: str) -> None:
    """Exactly the adapted modules, with their ranks and alphas, and the weights that peft merged at first."""
    expected = made_by_peft(tmp_path, kind).state_dict()
    base, between, back = tmp_path / "base.st", tmp_path / "between.safetensors", tmp_path / "back"
    told = surgery.Told(component=None if way == "loralib" else PART)
    try:
        surgery.convert(tmp_path / "peft", between, way, base=base, told=told)
    except surgery.ReportedError as error:
        assert "cannot express" in str(error)  # noqa: PT017 - docs/round-trips.md says which
        return
    said = surgery.Told(alpha=12 if kind == "rsLoRA" else 6) if way == "loralib" else surgery.Told()
    surgery.convert(between, back, "peft", base=base, told=said)
    merged = loaded_by_peft(base, back)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=2e-6, rtol=1e-6)


class Loralib(nn.Module):
    """The model's adapted layers as loralib has them."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.token_emb = loralib.Embedding(10, 12, r=4, lora_alpha=alpha)
        self.turned = loralib.Linear(12, 8, r=4, lora_alpha=alpha, fan_in_fan_out=True)
        self.blocks = nn.ModuleList([Net().blocks[0], Net().blocks[1]])
        for block in self.blocks:
            block.attn.to_q = loralib.Linear(12, 8, r=4, lora_alpha=alpha)
            block.attn.to_out[0] = loralib.Linear(8, 12, r=4, lora_alpha=alpha, bias=False)


@pytest.mark.parametrize(("kind", "alpha"), [("embedding", 6), ("Conv1D", 6), ("linear", 6), ("rsLoRA", 12)])
def test_loralib_loads_what_we_write(tmp_path: Path, kind: str, alpha: int) -> None:
    """Its layers merge to the weights that peft merges, with the alpha that the report tells."""
    expected = made_by_peft(tmp_path, kind).state_dict()
    report = surgery.convert(tmp_path / "peft", tmp_path / "l.safetensors", "loralib", base=tmp_path / "base.st")
    assert any(f"lora_alpha = {alpha}" in note for note in report.notes)
    model = Loralib(alpha)
    model.load_state_dict(load_file(tmp_path / "base.st"), strict=False)
    found = model.load_state_dict(load_file(tmp_path / "l.safetensors"), strict=False)
    assert not found.unexpected_keys
    for layer in KINDS[kind]["target_modules"]:
        weight = model.eval().state_dict()[f"{layer}.weight"]
        torch.testing.assert_close(weight, expected[f"{layer}.weight"], atol=1e-6, rtol=1e-6)


def test_fused_layers_become_one_product(tmp_path: Path) -> None:
    """loralib's MergedLinear → peft: blocks of one B, exactly; merged, the same bytes."""
    torch.manual_seed(0)
    layer = loralib.MergedLinear(8, 12, r=2, lora_alpha=3, enable_lora=[True, False, True])
    model = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": layer})})
    with torch.no_grad():
        layer.lora_B.normal_()
    from safetensors.torch import save_file

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file({name: tensor for name, tensor in state.items() if "lora_" not in name}, tmp_path / "base.st")
    save_file({name: tensor for name, tensor in state.items() if "lora_" in name}, tmp_path / "l.safetensors")
    told = surgery.Told(alpha=3, enable_lora=(True, False, True))
    surgery.convert(tmp_path / "l.safetensors", tmp_path / "peft", "peft", base=tmp_path / "base.st", told=told)
    with safe_open(tmp_path / "peft" / "adapter_model.safetensors", "pt") as opened:
        assert opened.get_slice("base_model.model.attn.qkv.lora_B.weight").get_shape() == [12, 4]
    surgery.merge(tmp_path / "base.st", tmp_path / "l.safetensors", tmp_path / "one.st", told=told)
    surgery.merge(tmp_path / "base.st", tmp_path / "peft", tmp_path / "two.st")
    one, two = load_file(tmp_path / "one.st"), load_file(tmp_path / "two.st")
    torch.testing.assert_close(one["attn.qkv.weight"], two["attn.qkv.weight"], atol=1e-7, rtol=1e-7)
