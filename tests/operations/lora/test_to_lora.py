"""to_lora, convert --to lora: what it refuses, carries along, and how ranks are chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import Result
from dialect_models import Net, made_by_peft
from peft_oracle import Mixture, save_base
from recasting import adapter as lora
from recasting import deltas
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from formats.errors import AdapterFormatError
from surgery.errors import NothingToDo, Unsupported


class Scored(nn.Module):
    """Two layers and a norm, biases on all."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.score = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 8)."""
        return self.score(self.norm(self.down(torch.tanh(self.up(x)))))


def made(folder: Path, config: Any) -> peft.PeftModel:
    """Saves base.st and an adapter, everything trained in it random."""
    adapted = peft.get_peft_model(save_base(folder, Scored), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "adapter")
    return adapted


def loaded(folder: Path, path: Path) -> nn.Module:
    """The base with an adapter as peft loads it."""
    model = Scored()
    model.load_state_dict(load_file(folder / "base.st"))
    return peft.PeftModel.from_pretrained(model, path).eval()


def test_what_is_carried_in_full_goes_along(tmp_path: Path) -> None:
    """A saved head, to the bit; (IA)³'s biases as merge makes them; the task stays in the config."""
    config = peft.IA3Config(
        target_modules=["up", "down"],
        feedforward_modules=["down"],
        modules_to_save=["score"],
        task_type="FEATURE_EXTRACTION",
    )
    adapted = made(tmp_path, config)
    report = surgery.to_lora(tmp_path / "adapter", tmp_path / "lora", rank=8, base=tmp_path / "base.st")
    assert report.ledger["low_rank"] == 2
    assert report.ledger["copied"] == 2
    assert any("up.bias" in note and "in full" in note for note in report.notes)
    said = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (said["modules_to_save"], said["task_type"], said["bias"]) == (["score"], "FEATURE_EXTRACTION", "all")
    before = load_file(tmp_path / "adapter/adapter_model.safetensors")
    after = load_file(tmp_path / "lora/adapter_model.safetensors")
    for key, tensor in before.items():
        if "score" in key:
            assert torch.equal(after[key], tensor)
    x = torch.randn(3, 8)
    with torch.no_grad():
        found = loaded(tmp_path, tmp_path / "lora").base_model(x)
        torch.testing.assert_close(found, adapted.base_model(x), atol=1e-5, rtol=1e-5)
    dropped = surgery.to_lora(
        tmp_path / "adapter", tmp_path / "less", rank=8, base=tmp_path / "base.st", drop=["full", "bias"]
    )
    assert not any("score" in key or "bias" in key for key in load_file(tmp_path / "less/adapter_model.safetensors"))
    assert dropped.ledger["refused"] == 2


def test_the_base_is_asked_for_where_it_is_needed(tmp_path: Path) -> None:
    """LoHa's file does not tell what it adapts; a DoRA's ΔW depends on the base."""
    made(tmp_path, peft.LoHaConfig(target_modules=["up"]))
    with pytest.raises(AdapterFormatError, match="--base"):
        surgery.to_lora(tmp_path / "adapter", tmp_path / "lora", rank=2)
    made(tmp_path, peft.LoraConfig(target_modules=["up"], use_dora=True))
    with pytest.raises(AdapterFormatError, match="depends on the base"):
        surgery.to_lora(tmp_path / "adapter", tmp_path / "lora", rank=2)
    report = surgery.to_lora(tmp_path / "adapter", tmp_path / "lora", rank=8, base=tmp_path / "base.st")
    assert report.modules[0].method == "dora"


def test_a_lora_needs_no_base(tmp_path: Path) -> None:
    """Its scaling goes into the factors, as with resize: the same ΔW."""
    before = lora(tmp_path, "a", use_rslora=True)
    report = surgery.to_lora(before, tmp_path / "b", rank=4)
    assert all(module.exact for module in report.modules)
    old, new = deltas(tmp_path, before), deltas(tmp_path, tmp_path / "b")
    assert old.keys() == new.keys()
    for name, delta in old.items():
        torch.testing.assert_close(new[name], delta, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["conv", "LoHa", "LoKr", "DoRA"])
@pytest.mark.parametrize("dialect", ["lycoris", "comfyui"])
def test_other_dialects_get_the_names_of_the_base(tmp_path: Path, kind: str, dialect: str) -> None:
    """Out of kohya's underscores, and peft's outputs are those of the adapter they came from."""
    merged = made_by_peft(tmp_path, kind)
    base, told = tmp_path / "base.st", surgery.Told(component="unet")
    surgery.convert(tmp_path / "peft", tmp_path / "other.st", dialect, base=base, told=told)
    report = surgery.to_lora(tmp_path / "other.st", tmp_path / "lora", rank=64, base=base, dtype="float32")
    assert report.source == ("kohya" if (kind, dialect) == ("conv", "lycoris") else dialect)
    model = Net()
    model.load_state_dict(load_file(base))
    found = peft.PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)


def test_a_base_of_float8_is_enough_for_what_only_adds(tmp_path: Path) -> None:
    """Its headers tell names and shapes; what depends on the weights themselves is refused."""
    made(tmp_path, peft.LoHaConfig(r=2, target_modules=["up"]))
    plain = surgery.to_lora(tmp_path / "adapter", tmp_path / "a.st", rank=4, base=tmp_path / "base.st")
    tensors = load_file(tmp_path / "base.st")
    tensors["up.weight"] = tensors["up.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "float8.st")
    surgery.to_lora(tmp_path / "adapter", tmp_path / "b.st", rank=4, base=tmp_path / "float8.st")
    assert (tmp_path / "a.st").stat().st_size == plain.nbytes
    first, second = load_file(tmp_path / "a.st"), load_file(tmp_path / "b.st")
    assert first.keys() == second.keys()
    assert all(torch.equal(second[key], tensor) for key, tensor in first.items())
    made(tmp_path, peft.LoraConfig(target_modules=["up"], use_dora=True))
    with pytest.raises(surgery.SurgeryError, match="nothing can be added to"):
        surgery.to_lora(tmp_path / "adapter", tmp_path / "c.st", rank=4, base=tmp_path / "float8.st")


def test_a_budget_is_kept(tmp_path: Path) -> None:
    """In a file and in a folder; a weight never gets more rank than its ΔW has."""
    made(tmp_path, peft.LoHaConfig(r=2, target_modules=["up", "down"]))
    base = tmp_path / "base.st"
    uniform = surgery.to_lora(tmp_path / "adapter", tmp_path / "u.st", rank=2, base=base)
    for out in ("b.st", "b"):
        budget = surgery.Budget(uniform.nbytes + 200)
        report = surgery.to_lora(tmp_path / "adapter", tmp_path / out, rank=budget, base=base)
        assert report.nbytes <= uniform.nbytes + 200
    roomy = surgery.to_lora(tmp_path / "adapter", tmp_path / "c", rank=surgery.Budget(10**6), base=base)
    assert [module.rank for module in roomy.modules] == [4, 4]
    assert roomy.exact == 2


def test_rules_and_overrides(tmp_path: Path) -> None:
    """As of extract and resize; threads do not show."""
    made(tmp_path, peft.LoKrConfig(r=4, target_modules=["up", "down"]))
    how = {"base": tmp_path / "base.st", "overrides": {"down.*": 1}}
    for jobs in (1, 3):
        resources = surgery.Resources(jobs=jobs)
        report = surgery.to_lora(
            tmp_path / "adapter", tmp_path / f"{jobs}.st", rank=surgery.EnergyRule(0.9), resources=resources, **how
        )
    assert (tmp_path / "1.st").read_bytes() == (tmp_path / "3.st").read_bytes()
    ranks = {module.name: module for module in report.modules}
    assert ranks["down.weight"].rank == 1
    assert ranks["up.weight"].energy >= 0.9
    with pytest.raises(surgery.FormatError, match="matches no tensor"):
        surgery.to_lora(tmp_path / "adapter", tmp_path / "x", rank=2, base=how["base"], overrides={"nothing": 1})


def test_what_has_no_plain_factors_is_refused(tmp_path: Path) -> None:
    """Experts, prompts, an adapter of zeros, a rank of 0, an output that is there."""
    experts = lora(tmp_path, "a", build=lambda: Mixture(transposed=False), target_modules=["out"],
                   target_parameters=["experts.up"])  # fmt: skip
    with pytest.raises(Unsupported, match="does not belong to a layer"):
        surgery.to_lora(experts, tmp_path / "b", rank=2, base=tmp_path / "base.st")
    made(tmp_path, peft.LoHaConfig(target_modules=["up"]))
    base, file = tmp_path / "base.st", tmp_path / "adapter/adapter_model.safetensors"
    with pytest.raises(surgery.SurgeryError, match="at least 1"):
        surgery.to_lora(tmp_path / "adapter", tmp_path / "b", rank=0, base=base)
    with pytest.raises(surgery.FormatError, match="overwrite an input"):
        surgery.to_lora(tmp_path / "adapter", base, rank=2, base=base, force=True)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in load_file(file).items()}
    save_file(zeros, file)
    with pytest.raises(NothingToDo, match="changes no weight"):
        surgery.to_lora(tmp_path / "adapter", tmp_path / "b", rank=2, base=base)
    zeros["base_model.model.up.hada_w1_a"][0, 0] = torch.nan
    save_file(zeros, file)
    with pytest.raises(surgery.SurgeryError, match=r"NaN|not finite|finite"):
        surgery.to_lora(tmp_path / "adapter", tmp_path / "b", rank=2, base=base)
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(AdapterFormatError, match="cannot be merged into weights"):
        surgery.to_lora(tmp_path / "adapter", tmp_path / "b", rank=2, base=base)
    assert not (tmp_path / "b").exists()


def test_command(tmp_path: Path, cli: Callable[..., Result], cli_json: Callable[..., dict[str, Any]]) -> None:
    """The ranks' options of resize, which other targets refuse; a dry run writes nothing."""
    made(tmp_path, peft.LoHaConfig(r=2, target_modules=["up", "down"]))
    common = ("convert", tmp_path / "adapter", "--to", "lora", "--base", tmp_path / "base.st", "-o")
    planned = cli(*common, tmp_path / "b.st", "--rank", 2, "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    assert "lower" in planned.stdout
    assert not (tmp_path / "b.st").exists()
    report = cli_json(*common, tmp_path / "b.st", "--energy", 0.9, "--rank", "up.*=1", "--dtype", "bfloat16")
    assert {module["name"]: module["rank"] for module in report["modules"]}["up.weight"] == 1
    with safe_open(tmp_path / "b.st", framework="pt") as file:
        assert json.loads(file.metadata()["adapter_config"])["peft_type"] == "LORA"
    shown = cli(*common, tmp_path / "c", "--rank", 4)
    assert shown.exit_code == 0, shown.stderr
    assert "exact" in shown.stdout
    assert "2 of 2 weights" in shown.stdout
    assert cli(*common, tmp_path / "d").exit_code == 2  # no rank
    assert cli(*common, tmp_path / "d", "--rank", 2, "--base", tmp_path / "base.st").exit_code == 2
    assert cli(*common[:2], "--to", "kohya", "--rank", 2, "-o", tmp_path / "d").exit_code == 2
    assert cli(*common[:2], "--rank", 2, "-o", tmp_path / "d").exit_code == 2


def test_onnx_runtimes_adapter_becomes_a_lora_of_the_layers_as_the_base_stores_them(tmp_path: Path) -> None:
    """Its products are (in, out) whatever the layer; the LoRA's factors are the layer's own, square layers included."""
    random = torch.Generator().manual_seed(0)
    sides = {"h.0.c_fc": (16, 8), "h.0.square": (8, 8), "plain": (12, 10), "square": (10, 10)}  # (out, in)
    turned = ("h.0.c_fc", "h.0.square")  # stored (in, out), as their bias tells or their neighbour's
    base, factors = {}, {}
    for layer, (out, into) in sides.items():
        shape = (into, out) if layer in turned else (out, into)
        base[f"{layer}.weight"] = torch.randn(shape, generator=random)
        base |= {f"{layer}.bias": torch.zeros(out)} if layer in turned else {}
        factors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(2, into, generator=random)
        factors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(out, 2, generator=random)
    save_file(base, tmp_path / "base.st")
    (tmp_path / "peft").mkdir()
    save_file(factors, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    surgery.convert(tmp_path / "peft", tmp_path / "lora.onnx_adapter", "ort", base=tmp_path / "base.st")
    surgery.to_lora(tmp_path / "lora.onnx_adapter", tmp_path / "lora", rank=2, base=tmp_path / "base.st")
    made = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {key: tensor.shape for key, tensor in made.items()} == {key: each.shape for key, each in factors.items()}
    for adapter in ("peft", "lora"):
        surgery.merge(tmp_path / "base.st", tmp_path / adapter, tmp_path / f"{adapter}.st")
    expected, found = (load_file(tmp_path / f"{name}.st") for name in ("peft", "lora"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)
