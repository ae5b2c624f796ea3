"""convert --to adapterhub: what one config for all layers can say, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from places import GOLDEN
from safetensors.torch import load_file, save_file

import surgery
from formats.errors import AdapterFormatError

BASE = GOLDEN / "adapterhub" / "written" / "bert.st"
GPT2 = BASE.with_name("gpt2.st")
QUERY, DENSE = "encoder.layer.1.attention.self.query", "encoder.layer.1.attention.output.dense"
KEY = "encoder.layer.1.attention.self.key"
Tensors = dict[str, torch.Tensor]


def peft_adapter(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """An adapter in peft's form, of these tensors by module and role."""
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    folder.mkdir()
    save_file(named, folder / "adapter_model.safetensors")
    modules = sorted({name.partition(".lora_")[0].partition(".ia3_")[0].partition(".hada_")[0] for name in tensors})
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": modules, **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


def pair(module: str, rank: int = 2) -> Tensors:
    """LoRA of a layer 8 by 8."""
    generator = torch.Generator().manual_seed(len(module))
    return {
        f"{module}.lora_A.weight": torch.randn(rank, 8, generator=generator),
        f"{module}.lora_B.weight": torch.randn(8, rank, generator=generator),
    }


def loha(module: str) -> Tensors:
    """LoHa of a layer 8 by 8."""
    return {
        f"{module}.hada_w{n}_{side}": torch.ones(shape)
        for n in "12"
        for side, shape in {"a": (8, 2), "b": (2, 8)}.items()
    }


def delta(base: Path, adapter: Path, folder: Path, **told: Any) -> Tensors:
    """What merging it changes."""
    surgery.merge(base, adapter, folder / "m.st", told=surgery.Told(**told), force=True)
    before, after = load_file(base), load_file(folder / "m.st")
    return {name: after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}


def same(found: Tensors, expected: Tensors) -> None:
    """The same changes within float32."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)


def test_factors_keep_their_bytes_where_one_config_says_all(tmp_path: Path) -> None:
    """And layers that the adapter leaves alone are left out by number."""
    adapter = peft_adapter(tmp_path / "peft", pair(QUERY))
    report = surgery.convert(adapter, tmp_path / "hub", "adapterhub", base=BASE)
    assert (report.copied, report.computed) == (2, 0)
    assert any("use_safetensors=True" in note for note in report.notes)
    config = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())["config"]
    assert config["leave_out"] == [0, 2]
    assert config["attn_matrices"] == ["q"]
    assert (config["r"], config["alpha"]) == (2, 3)
    tensors = load_file(tmp_path / "hub" / "adapter.safetensors")
    assert torch.equal(tensors[f"{QUERY}.loras.adapter.lora_A"], pair(QUERY)[f"{QUERY}.lora_A.weight"])


def test_what_the_config_reaches_besides_does_nothing(tmp_path: Path) -> None:
    """A smaller rank is filled up, another alpha goes into B, the key of the other layer gets zeros."""
    first = QUERY.replace("1", "0")
    tensors = pair(first, 3) | pair(KEY)
    settings = {"rank_pattern": {first: 3}, "alpha_pattern": {KEY: 5}}
    adapter = peft_adapter(tmp_path / "peft", tensors, **settings)
    report = surgery.convert(adapter, tmp_path / "hub", "adapterhub", base=BASE)
    said = " ".join(report.notes)
    assert "1 layers have a smaller rank: padded with zeros to rank 3" in said
    assert "1 layers have another alpha" in said
    assert "2 more layers are adapted by the config" in said
    written = load_file(tmp_path / "hub" / "adapter.safetensors")
    assert {tuple(tensor.shape) for tensor in written.values()} == {(3, 8), (8, 3)}
    assert not written[f"{first.replace('query', 'key')}.loras.adapter.lora_A"].any()
    same(delta(BASE, tmp_path / "hub", tmp_path), delta(BASE, adapter, tmp_path))


@pytest.mark.parametrize("to", ["peft", "kohya", "lycoris", "comfyui", "diffusers", "loralib"])
def test_it_goes_through_every_other_dialect(tmp_path: Path, to: str) -> None:
    """And comes back with the same ΔW."""
    tensors = pair(QUERY) | pair(KEY)
    adapter = peft_adapter(tmp_path / "peft", tensors)
    told = surgery.Told(component=None if to in ("peft", "loralib") else "text_encoder")
    surgery.convert(adapter, tmp_path / "hub", "adapterhub", base=BASE)
    other = tmp_path / "other.safetensors"
    surgery.convert(tmp_path / "hub", other, to, base=BASE, told=told)
    told = surgery.Told(alpha=3) if to == "loralib" else told
    surgery.convert(other, tmp_path / "again", "adapterhub", base=BASE, told=told)
    same(delta(BASE, tmp_path / "again", tmp_path), delta(BASE, adapter, tmp_path))


def test_slices_of_fused_layers_are_made_the_same_everywhere(tmp_path: Path) -> None:
    """The query alone in one layer, query and value in the other: the first gets a value of zeros."""
    first, second = (f"transformer.h.{number}.attn.c_attn" for number in (0, 1))
    tensors = {f"{first}.lora_A": torch.randn(4, 8), f"{first}.lora_B": torch.randn(16, 2)}
    save_file(tensors, tmp_path / "two.safetensors")
    told = {"alpha": 3, "enable_lora": (True, False, True)}
    surgery.convert(tmp_path / "two.safetensors", tmp_path / "hub", "adapterhub", base=GPT2, told=surgery.Told(**told))
    same(delta(GPT2, tmp_path / "hub", tmp_path), delta(GPT2, tmp_path / "two.safetensors", tmp_path, **told))
    whole = {f"{second}.lora_A.weight": torch.randn(2, 8), f"{second}.lora_B.weight": torch.randn(24, 2)}
    adapter = peft_adapter(tmp_path / "peft", whole, fan_in_fan_out=True)
    surgery.convert(adapter, tmp_path / "whole", "adapterhub", base=GPT2)
    assert load_file(tmp_path / "whole" / "adapter.safetensors")[f"{second}.loras.adapter.lora_A"].shape == (6, 8)
    same(delta(GPT2, tmp_path / "whole", tmp_path), delta(GPT2, adapter, tmp_path))


def test_layers_out_of_reach_are_refused_or_dropped(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """By name, with the flag; a bias and a tensor in full as in every dialect."""
    adapter = peft_adapter(tmp_path / "peft", pair(QUERY) | pair(DENSE))
    result = cli("convert", adapter, "--to", "adapterhub", "--base", BASE, "-o", tmp_path / "hub")
    assert result.exit_code == 1
    assert DENSE in result.stderr
    assert "--drop layer" in result.stderr
    assert not (tmp_path / "hub").exists()
    result = cli("convert", adapter, "--to", "adapterhub", "--base", BASE, "-o", tmp_path / "hub", "--drop", "layer")
    assert result.exit_code == 0
    assert "2 tensors were dropped" in result.stdout
    assert delta(BASE, tmp_path / "hub", tmp_path).keys() == {f"{QUERY}.weight"}
    alone = peft_adapter(tmp_path / "alone", pair(DENSE))
    with pytest.raises(AdapterFormatError, match="can express no part"):
        surgery.convert(alone, tmp_path / "none", "adapterhub", base=BASE, drop=["layer"])


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({f"{QUERY}.ia3_l": torch.ones(1, 8)}, {"peft_type": "IA3", "feedforward_modules": [QUERY]}, "inputs"),
        (
            pair(QUERY) | {f"{QUERY}.lora_magnitude_vector": torch.ones(8)},
            {"use_dora": True},
            "cannot express DoRA",
        ),
        (pair(QUERY) | {f"{QUERY}.lora_B.bias": torch.ones(8)}, {"lora_bias": True}, "the change of a bias"),
        (loha(QUERY), {"peft_type": "LOHA", "alpha": 3}, "cannot express loha"),
    ],
    ids=["scaled inputs", "DoRA", "lora_bias", "LoHa"],
)
def test_what_it_has_no_place_for_is_refused(
    tmp_path: Path, tensors: Tensors, config: dict[str, Any], message: str
) -> None:
    """With the reason."""
    adapter = peft_adapter(tmp_path / "peft", tensors, **config)
    with pytest.raises(AdapterFormatError, match=message):
        surgery.convert(adapter, tmp_path / "hub", "adapterhub", base=BASE)
    assert not (tmp_path / "hub").exists()


def test_the_base_is_asked_for(tmp_path: Path) -> None:
    """It tells which layers the config has to leave out."""
    adapter = peft_adapter(tmp_path / "peft", pair(QUERY))
    with pytest.raises(AdapterFormatError, match="--base"):
        surgery.convert(adapter, tmp_path / "hub", "adapterhub")
