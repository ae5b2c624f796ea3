"""DoRA, with peft itself as the judge: it makes adapters that we merge, and loads adapters written with our keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import Everything, assert_merges_like_peft, assert_peft_agrees, made_by_peft, random, save_base
from safetensors.torch import load_file, save_file

import surgery
from formats.dialects.peft_writing import (
    Extracted,
    factor_keys,
    magnitude_key,
    magnitude_shape,
)
from formats.errors import AdapterFormatError, ShapeMismatch
from formats.layers import LayerKind
from surgery.errors import NotFinite, NotMergeable, NotMerged

pytestmark = pytest.mark.filterwarnings("ignore")


IDS = torch.tensor([[0, 3, 6, 2], [5, 5, 1, 4]])


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["wte", "conv1d", "linear", "conv"]},
     {"target_modules": ["wte", "conv1d", "conv"], "fan_in_fan_out": True, "use_rslora": True},
     {"target_modules": ["linear", "conv"], "rank_pattern": {"conv": 3}, "alpha_pattern": {"linear": 5}}],
    ids=["plain", "fan_in_fan_out", "patterns"],
)  # fmt: skip
def test_dora_merges_as_peft_merges_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    """m · (W0 + ΔW) / ‖W0 + ΔW‖ with the norm over the inputs of each output, whichever way these are stored."""
    assert_merges_like_peft(tmp_path, Everything, IDS, use_dora=True, **settings)


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_dora_in_half_precision_is_nearer_to_float64_than_peft(tmp_path: Path, dtype: torch.dtype, ulp: float) -> None:
    """peft rounds ΔW, the norm, the quotient and the product; ours is the value of float64, rounded once."""
    targets = ["wte", "conv1d", "linear", "conv"]
    adapted = made_by_peft(tmp_path, Everything, dtype=dtype, target_modules=targets, use_dora=True)
    surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")
    merged = load_file(tmp_path / "merged.st")
    theirs = adapted.merge_and_unload().state_dict()
    exact = made_by_peft(tmp_path, Everything, dtype=dtype, target_modules=targets, use_dora=True).double()
    truth = exact.merge_and_unload().state_dict()
    for module in targets:
        name = f"{module}.weight"
        ours, peer = ((each[name].double() - truth[name]).abs() for each in (merged, theirs))
        assert (ours <= 1.01 * ulp * truth[name].abs()).all(), name
        assert ours.norm() <= peer.norm(), name


def test_peft_loads_dora_written_with_our_keys(tmp_path: Path) -> None:
    """Magnitudes of every kind of layer in the shapes that peft gives them."""
    model = save_base(tmp_path, Everything)
    tensors = {}
    kinds = {"wte": LayerKind.EMBEDDING, "conv1d": LayerKind.TRANSPOSED, "conv": LayerKind.CONV}
    for module, kind in kinds.items():
        shape = model.get_submodule(module).weight.shape
        out, *into = shape if kind is LayerKind.CONV else shape[::-1]
        key_a, key_b = factor_keys(module, kind)
        tensors[key_a] = random(2, *into)
        tensors[key_b] = random(out, 2, *(1,) * (len(shape) - 2))
        tensors[magnitude_key(module)] = 2 + random(*magnitude_shape(kind, tuple(shape)))
    extracted = Extracted(dict.fromkeys(kinds, 2), (), False, True, frozenset({*kinds, "linear"}), 2, "base", dora=True)
    assert_peft_agrees(tmp_path, Everything, tensors, extracted, IDS)


def test_dora_stands_alone_and_cannot_be_taken_off(tmp_path: Path) -> None:
    """No strength but 1, no way back from the merged weight, no module without magnitudes; all before any work."""
    made_by_peft(tmp_path, Everything, use_dora=True, target_modules=["linear"])
    base, adapter, merged = tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st"
    with pytest.raises(NotMergeable, match="more strongly or weakly"):
        surgery.merge(base, adapter, merged, weight=0.5)
    surgery.merge(base, adapter, merged)
    with pytest.raises(NotMerged, match="length of W0"):
        surgery.unmerge(merged, adapter, tmp_path / "back.st")
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(AdapterFormatError, match="contradict each other"):
        surgery.merge(base, adapter, tmp_path / "other.st")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    kept = {key: tensor for key, tensor in tensors.items() if "magnitude" not in key}
    save_file(kept, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterFormatError, match="contradict each other"):
        surgery.merge(base, adapter, tmp_path / "other.st")
    wrong = {magnitude_key("linear"): torch.ones(4)}
    save_file(tensors | wrong, adapter / "adapter_model.safetensors")
    with pytest.raises(ShapeMismatch, match="one for each output"):
        surgery.merge(base, adapter, tmp_path / "other.st")


def test_a_row_without_direction_is_named(tmp_path: Path) -> None:
    """Where W0 + ΔW is zero peft divides by zero."""
    made_by_peft(tmp_path, Everything, use_dora=True, target_modules=["linear"])
    adapter, base = load_file(tmp_path / "adapter/adapter_model.safetensors"), load_file(tmp_path / "base.st")
    base["linear.weight"][2] = 0
    adapter["base_model.model.linear.lora_B.weight"][2] = 0
    save_file(base, tmp_path / "base.st")
    save_file(adapter, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(NotFinite, match="no direction"):
        surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")
