"""verify: exactly that merge, or not, or as near as PEFT's own rounding lets its files be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from lora_by_hand import lora, up
from miniature import weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import NothingToDo

NAME = "layers.0.up.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The miniature in bfloat16."""
    save_file(weights(dtype=torch.bfloat16), tmp_path / "base.st")
    return tmp_path / "base.st"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """LoRA of the first linear layer, about a tenth of it, and a norm in full."""
    factors = {name: 0.08 * tensor for name, tensor in up().items()}
    return lora(tmp_path / "a", factors | {"layers.0.norm.weight": torch.ones(16)}, modules_to_save=["norm"])


def as_peft(base: Path, adapter: Path, out: Path, weight: float = 1.0) -> None:
    """The merge as PEFT computes it: the delta rounded to the stored dtype, then the sum; no receipt."""
    tensors, factors = load_file(base), load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.layers.0.up.lora_{role}.weight"] for role in "AB")
    tensors[NAME] = tensors[NAME] + (2 * weight * (b @ a)).bfloat16()
    tensors["layers.0.norm.weight"] = torch.ones(16, dtype=torch.bfloat16)
    save_file(tensors, out)


def test_a_merge_of_ours_is_exact(base: Path, adapter: Path, tmp_path: Path, cli_json: Callable[..., Any]) -> None:
    """Every tensor bit for bit, several adapters and weights included; without its receipt too."""
    other = lora(tmp_path / "b", {name: tensor.flip(0) for name, tensor in up().items()})
    surgery.merge(base, [adapter, (other, 0.5)], tmp_path / "m.st")
    save_file(load_file(tmp_path / "m.st"), tmp_path / "bare.st")
    for merged in ("m.st", "bare.st"):
        report = cli_json(
            "verify", tmp_path / merged, "--base", base, "--adapter", f"{other}:0.5", "--adapter", adapter
        )
        assert report["verdict"] == "exact"
        assert report["ledger"] == {"exact": 8, "within PEFT's rounding": 0, "differs": 0}


def test_one_bit_is_enough(base: Path, adapter: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    """In a file with our receipt nothing is tolerated; exit code 3, and the tensor is named."""
    surgery.merge(base, adapter, tmp_path / "m.st")
    with safe_open(tmp_path / "m.st", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "m.st")
    tensors[NAME].view(torch.int16)[5, 5] ^= 1
    save_file(tensors, tmp_path / "m.st", metadata=metadata)
    result = cli("verify", tmp_path / "m.st", "--base", base, "--adapter", adapter)
    assert result.exit_code == 3
    assert f"{NAME} differs" in result.stdout


def test_other_weights_other_adapters_other_tensors_differ(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Each with the tensors that tell."""
    surgery.merge(base, adapter, tmp_path / "m.st", weight=0.5)
    assert surgery.verify(tmp_path / "m.st", base, adapter).differing == (NAME,)
    assert surgery.verify(tmp_path / "m.st", base, adapter, weight=0.5).agrees
    assert set(surgery.verify(base, base, adapter).differing) == {NAME, "layers.0.norm.weight"}
    tensors = load_file(tmp_path / "m.st") | {"stray": torch.zeros(1)}
    del tensors["layers.0.steps"]
    save_file(tensors, tmp_path / "odd.st")
    assert surgery.verify(tmp_path / "odd.st", base, adapter, weight=0.5).differing == (
        "layers.0.steps",
        "stray",
    )


@pytest.mark.parametrize("scale", [0.02, 1.0, 50.0])
def test_a_file_without_receipt_may_differ_by_pefts_rounding(base: Path, tmp_path: Path, scale: float) -> None:
    """And it is said; the base itself, or a merge at half the weight, does not pass for it, however small the delta."""
    factors = {name: 0.2 * scale**0.5 * tensor for name, tensor in up().items()}
    norm = {"layers.0.norm.weight": torch.ones(16)}
    adapter = lora(tmp_path / "s", factors | norm, modules_to_save=["norm"])
    as_peft(base, adapter, tmp_path / "p.st")
    report = surgery.verify(tmp_path / "p.st", base, adapter)
    assert report.agrees
    assert report.rounded in ((NAME,), ())
    assert (report.verdict == "within PEFT's rounding") is bool(report.rounded)
    assert NAME in surgery.verify(base, base, adapter).differing
    as_peft(base, adapter, tmp_path / "half.st", weight=0.5)
    assert NAME in surgery.verify(tmp_path / "half.st", base, adapter).differing


def test_replaced_and_copied_tensors_are_never_within_rounding(base: Path, adapter: Path, tmp_path: Path) -> None:
    """PEFT does not compute them, so they must be equal."""
    as_peft(base, adapter, tmp_path / "p.st")
    tensors = load_file(tmp_path / "p.st")
    for name in ("layers.0.norm.weight", "layers.0.down.weight"):
        tensors[name].view(torch.int16).view(-1)[0] ^= 1
    save_file(tensors, tmp_path / "p.st")
    report = surgery.verify(tmp_path / "p.st", base, adapter)
    assert set(report.differing) == {"layers.0.down.weight", "layers.0.norm.weight"}


def test_what_merge_would_refuse_is_an_error(base: Path, adapter: Path, cli: Callable[..., Result]) -> None:
    """Not a verdict: exit code 1."""
    with pytest.raises(NothingToDo):
        surgery.verify(base, base, adapter, weight=0)
    assert cli("verify", base, "--base", base, "--adapter", "nowhere").exit_code == 1
    assert cli("verify", base, "--base", base).exit_code == 2
