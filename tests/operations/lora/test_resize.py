"""resize: an adapter at another rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from peft_oracle import Convolutions, Mixture
from recasting import PLAIN, adapter, deltas, loaded, matrix
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import Unsupported

X = torch.randint(0, 7, (3, 4), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("rslora", [False, True])
def test_every_weight_gets_its_optimum(tmp_path: Path, rslora: bool) -> None:
    """Embedding, Conv1D, linear, convolution; against numpy's SVD of the dense ΔW, within 1e-6 of the optimum."""
    before = adapter(tmp_path, "a", use_rslora=rslora, rank_pattern={"linear": 3}, alpha_pattern={"wte": 9})
    report = surgery.resize(before, tmp_path / "b", rank=2)
    old, new = deltas(tmp_path, before), deltas(tmp_path, tmp_path / "b")
    assert old.keys() == new.keys() == {module.name for module in report.modules}
    total = left = 0.0
    for module in report.modules:
        dense = matrix(old[module.name])
        values = np.linalg.svd(dense.numpy(), compute_uv=False)
        kept = np.linalg.svd(matrix(new[module.name]).numpy(), compute_uv=False)
        np.testing.assert_allclose(kept[:2], values[:2], rtol=1e-5)
        optimum = float(np.sqrt((values[2:] ** 2).sum()))
        assert float((dense - matrix(new[module.name])).norm()) == pytest.approx(optimum, rel=1e-6)
        assert module.residual == pytest.approx(optimum / float(dense.norm()), rel=1e-6)
        assert module.rank == 2
        total += float((values**2).sum())
        left += optimum**2
    assert report.residual == pytest.approx((left / total) ** 0.5, rel=1e-6)
    assert report.energy == pytest.approx(1 - left / total, rel=1e-6)


def test_peft_loads_it(tmp_path: Path) -> None:
    """peft's outputs are those of the merged weights, under rank patterns too; what else was in the config stays."""
    before = adapter(tmp_path, "a", lora_dropout=0.25, bias="all")
    surgery.resize(before, tmp_path / "b", rank=surgery.EnergyRule(0.8), overrides={"conv1d.*": 1})
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.25
    assert config["alpha_pattern"] == config["rank_pattern"]
    surgery.merge(tmp_path / "base.st", tmp_path / "b", tmp_path / "merged.st")
    adapted = loaded(tmp_path, tmp_path / "b")
    with torch.no_grad():
        output = adapted(X)
        model = adapted.merge_and_unload()
        model.load_state_dict(load_file(tmp_path / "merged.st"))
        torch.testing.assert_close(model(X), output, atol=1e-5, rtol=1e-4)


def test_dora_keeps_its_magnitudes(tmp_path: Path) -> None:
    """They are taken over to the bit, and the report says what its residual is of."""
    before = adapter(tmp_path, "a", use_dora=True)
    report = surgery.resize(before, tmp_path / "b", rank=3)
    old, new = (load_file(path / "adapter_model.safetensors") for path in (before, tmp_path / "b"))
    magnitudes = [key for key in old if "magnitude" in key]
    assert magnitudes
    assert all(torch.equal(old[key], new[key]) for key in magnitudes)
    assert any("DoRA" in note for note in report.notes)
    with torch.no_grad():
        near, far = loaded(tmp_path, tmp_path / "b")(X), loaded(tmp_path, before)(X)
    assert near.shape == far.shape
    assert near.isfinite().all()


def test_the_whole_rank_and_dora_lose_nothing(tmp_path: Path) -> None:
    """At their own rank the outputs are those of before."""
    before = adapter(tmp_path, "a", use_dora=True)
    report = surgery.resize(before, tmp_path / "b.st", rank=4, dtype="float32")
    surgery.merge(tmp_path / "base.st", before, tmp_path / "one.st")
    surgery.merge(tmp_path / "base.st", tmp_path / "b.st", tmp_path / "other.st")
    one, other = load_file(tmp_path / "one.st"), load_file(tmp_path / "other.st")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-7)
    assert report.residual < 1e-6


def test_lora_bias_goes_along(tmp_path: Path) -> None:
    """With the scaling in it, since alpha is the rank afterwards."""
    before = adapter(tmp_path, "a", target_modules=PLAIN[1:], lora_bias=True)
    surgery.resize(before, tmp_path / "b", rank=4)
    old, new = deltas(tmp_path, before), deltas(tmp_path, tmp_path / "b")
    assert old.keys() == new.keys() == {"linear.weight", "linear.bias"}
    for name in old:
        torch.testing.assert_close(old[name], new[name], rtol=1e-6, atol=1e-7)


def test_convolutions(tmp_path: Path) -> None:
    """Of one, two and three dimensions: A is flattened, and comes back with its kernel."""
    before = adapter(tmp_path, "a", build=Convolutions, target_modules=["one", "two", "point", "three"])
    report = surgery.resize(before, tmp_path / "b", rank=2)
    assert {module.name for module in report.modules} == {f"{name}.weight" for name in ("one", "two", "point", "three")}
    old, new = deltas(tmp_path, before), deltas(tmp_path, tmp_path / "b")
    for name in old:
        optimum = torch.linalg.svdvals(matrix(old[name]))[2:].square().sum().sqrt()
        torch.testing.assert_close(matrix(old[name] - new[name]).norm(), optimum, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert loaded(tmp_path, tmp_path / "b", Convolutions)(torch.ones(2, 4, 9)).isfinite().all()


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_one_by_one(tmp_path: Path, transposed: bool) -> None:
    """Each expert gets its own optimum; the base must be named, since the factors do not tell how many there are."""

    def build() -> torch.nn.Module:
        return Mixture(transposed=transposed)

    settings: dict[str, Any] = {"target_modules": ["into"], "target_parameters": ["experts.up", "experts.down"]}
    before = adapter(tmp_path, "a", build=build, r=3, **settings)
    with pytest.raises(surgery.FormatError, match="do not determine the weights"):
        surgery.resize(before, tmp_path / "b", rank=1)
    report = surgery.resize(before, tmp_path / "b", rank=2, base=tmp_path / "base.st", overrides={"experts.up": 1})
    old, new = deltas(tmp_path, before), deltas(tmp_path, tmp_path / "b")
    assert {module.name: module.rank for module in report.modules} == {
        "experts.up": 1,
        "experts.down": 2,
        "into.weight": 2,
    }
    for module in report.modules:
        stack = old[module.name] if old[module.name].dim() == 3 else old[module.name][None]
        left = (stack - new[module.name]).square().sum()
        optimum = sum(torch.linalg.svdvals(one)[module.rank :].square().sum() for one in stack)
        torch.testing.assert_close(left, optimum, rtol=1e-5, atol=1e-9)
    surgery.merge(tmp_path / "base.st", tmp_path / "b", tmp_path / "merged.st")
    adapted, x = loaded(tmp_path, tmp_path / "b", build), torch.ones(2, 4)
    model = build()
    model.load_state_dict(load_file(tmp_path / "merged.st"))
    with torch.no_grad():
        torch.testing.assert_close(model(x), adapted(x), atol=1e-5, rtol=1e-4)


def test_what_is_carried_in_full_goes_along(tmp_path: Path) -> None:
    """Saved modules and biases to the bit; files beside the weights too."""
    before = adapter(tmp_path, "a", target_modules=["linear"], modules_to_save=["conv"], bias="lora_only")
    (before / "tokenizer.json").write_text("{}")
    report = surgery.resize(before, tmp_path / "b", rank=1)
    old, new = (load_file(path / "adapter_model.safetensors") for path in (before, tmp_path / "b"))
    full = {key for key in old if "lora_" not in key}
    assert full
    assert all(torch.equal(old[key], new[key]) for key in full)
    assert old.keys() == new.keys()
    assert report.ledger["copied"] == len(full)
    assert report.ledger["low_rank"] == 2
    assert (tmp_path / "b" / "tokenizer.json").exists()
    loaded(tmp_path, tmp_path / "b")


def test_a_tied_head_carried_twice_goes_along_twice(tmp_path: Path) -> None:
    """A base that ties its head has it once; peft writes it twice and wants both back."""
    before = adapter(tmp_path, "a", target_modules=["linear"], modules_to_save=["wte"])
    path = before / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.wte.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    surgery.resize(before, tmp_path / "b", rank=1, base=tmp_path / "base.st")
    assert load_file(tmp_path / "b" / "adapter_model.safetensors").keys() == tensors.keys()


def test_a_budget_is_kept(tmp_path: Path) -> None:
    """Files and folders of at most that size, and of more energy than any uniform rank of the size."""
    before = adapter(tmp_path, "a")
    uniform = surgery.resize(before, tmp_path / "u.st", rank=2)
    for out in ("b.st", "b"):
        report = surgery.resize(before, tmp_path / out, rank=surgery.Budget(uniform.nbytes + 200))
        assert report.nbytes <= uniform.nbytes + 200
    with pytest.raises(surgery.SurgeryError, match="budget is too small"):
        surgery.resize(before, tmp_path / "c", rank=surgery.Budget(100))
    roomy = surgery.resize(before, tmp_path / "d", rank=surgery.Budget(10**6))
    assert all(module.rank == 4 for module in roomy.modules)


def test_a_rank_it_does_not_have_is_not_made_up(tmp_path: Path) -> None:
    """More rank than there is keeps the factors, and the report says so."""
    before = adapter(tmp_path, "a")
    report = surgery.resize(before, tmp_path / "b", rank=64)
    assert all(module.rank == 4 for module in report.modules)
    assert "4 of 4 weights keep their full rank" in report.notes


def test_a_module_that_was_never_trained(tmp_path: Path) -> None:
    """B = 0: whatever the rule, it stays zero."""
    before = adapter(tmp_path, "a")
    path = before / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.linear.lora_B.weight"].zero_()
    save_file(tensors, path, metadata={"format": "pt"})
    surgery.resize(before, tmp_path / "b", rank=surgery.RatioRule(10))
    assert "linear.weight" not in deltas(tmp_path, tmp_path / "b")


def test_threads_do_not_show(tmp_path: Path) -> None:
    """The same bytes for one worker and for three."""
    before = adapter(tmp_path, "a")
    for jobs in (1, 3):
        surgery.resize(before, tmp_path / f"{jobs}.st", rank=2, resources=surgery.Resources(jobs=jobs))
    assert (tmp_path / "1.st").read_bytes() == (tmp_path / "3.st").read_bytes()


def test_refused(tmp_path: Path) -> None:
    """Other methods, unknown patterns, an output that is there: each with its reason."""
    before = adapter(tmp_path, "a")
    with pytest.raises(surgery.FormatError, match="matches no tensor"):
        surgery.resize(before, tmp_path / "b", rank=1, overrides={"nothing.*": 2})
    with pytest.raises(surgery.FormatError, match="overwrite an input"):
        surgery.resize(before, before, rank=1, force=True)
    surgery.convert(before, tmp_path / "c.st", "comfyui", base=tmp_path / "base.st")
    with pytest.raises(Unsupported, match="only adapters in peft's names") as caught:
        surgery.resize(tmp_path / "c.st", tmp_path / "b", rank=1)
    assert "--to peft --base BASE" in str(caught.value)
    config = before / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"ensure_weight_tying": True}))
    with pytest.raises(Unsupported, match="ensure_weight_tying"):
        surgery.resize(before, tmp_path / "b", rank=1)


def test_attention_of_torch_is_refused(tmp_path: Path) -> None:
    """One rank for two weights, and the second added twice: named as such."""

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2)

    before = adapter(tmp_path, "a", build=Attention, target_modules=["attention"])
    with pytest.raises(Unsupported, match="MultiheadAttention"):
        surgery.resize(before, tmp_path / "b", rank=1)


def test_command(tmp_path: Path, cli: Callable[..., Result], cli_json: Callable[..., dict[str, Any]]) -> None:
    """The options of extract; a dry run writes nothing; a file holds its config in its metadata."""
    before = adapter(tmp_path, "a")
    planned = cli("resize", before, "--rank", 2, "-o", tmp_path / "b.st", "--dry-run")
    assert planned.exit_code == 0
    assert "recast" in planned.stdout
    assert not (tmp_path / "b.st").exists()
    report = cli_json("resize", before, "--energy", 0.9, "--rank", "linear.*=1", "-o", tmp_path / "b.st")
    assert {module["name"]: module["rank"] for module in report["modules"]}["linear.weight"] == 1
    assert report["nbytes"] == (tmp_path / "b.st").stat().st_size
    with safe_open(tmp_path / "b.st", framework="pt") as file:
        assert json.loads(file.metadata()["adapter_config"])["peft_type"] == "LORA"
    shown = cli("resize", before, "--residual", 0.5, "-o", tmp_path / "c")
    assert shown.exit_code == 0
    assert "linear.weight" in shown.stdout
    assert "bytes before" in shown.stdout
    assert cli("resize", before, "-o", tmp_path / "d").exit_code == 2


def test_the_base_is_never_replaced(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Only its headers are read, and yet it is an input; of resize and of combine."""
    before, other = adapter(tmp_path, "a"), adapter(tmp_path, "b", seed=2)
    precious = (tmp_path / "base.st").read_bytes()
    common = ("--base", tmp_path / "base.st", "-o", tmp_path / "base.st", "--force")
    for words in (("resize", before, "--rank", 2), ("combine", before, other, "--how", "cat")):
        for more in ((), ("--dry-run",)):
            refused = cli(*words, *common, *more)
            assert refused.exit_code == 1
            assert "overwrite an input" in refused.stderr
    assert (tmp_path / "base.st").read_bytes() == precious
