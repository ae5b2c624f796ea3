"""AdapterHub's LoRA, as tests/golden/make_adapterhub.py made it with the library itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from formats.errors import AdapterFormatError

GOLDEN = Path(__file__).parent.parent / "golden" / "adapterhub"


def edited(folder: Path, model: str, **settings: Any) -> Path:
    """A copy of an adapter with other settings."""
    copy = folder / "adapter"
    shutil.copytree(GOLDEN / model / "adapter", copy)
    file = copy / "adapter_config.json"
    config = json.loads(file.read_text())
    config["version"] = settings.pop("version", config["version"])
    config["config"] |= settings
    file.write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_it_merges_as_its_library_does(tmp_path: Path, model: str) -> None:
    """Linear layers, and two of three slices of GPT-2's fused layer, stored (in, out)."""
    base = GOLDEN / model / "base.st"
    surgery.merge(base, GOLDEN / model / "adapter", tmp_path / "m.st")
    expected, merged, before = load_file(GOLDEN / model / "merged.st"), load_file(tmp_path / "m.st"), load_file(base)
    assert {name for name in before if not torch.equal(before[name], merged[name])} == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_it_becomes_peft_s(tmp_path: Path, model: str) -> None:
    """With the same ΔW; the fused layer's slices as blocks of one B."""
    base = GOLDEN / model / "base.st"
    report = surgery.convert(GOLDEN / model / "adapter", tmp_path / "peft", "peft", base=base)
    assert report.source == "adapterhub"
    surgery.merge(base, tmp_path / "peft", tmp_path / "m.st")
    merged = load_file(tmp_path / "m.st")
    for name, tensor in load_file(GOLDEN / model / "merged.st").items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-6)


def test_older_files_are_scaled_as_they_were_trained(tmp_path: Path) -> None:
    """adapters before 1.1.0 scaled by 1, and reads such files so: 3/2 is what the golden file has."""
    adapter = edited(tmp_path, "bert", version="adapters.1.0.1")
    base = load_file(GOLDEN / "bert" / "base.st")
    surgery.merge(GOLDEN / "bert" / "base.st", adapter, tmp_path / "m.st")
    merged = load_file(tmp_path / "m.st")
    for name, tensor in load_file(GOLDEN / "bert" / "merged.st").items():
        torch.testing.assert_close(1.5 * (merged[name] - base[name]), tensor - base[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "prefix_tuning"}, "only LoRA is read"),
        ({"composition_mode": "scale"}, "only LoRA is read"),
        ({"use_gating": True}, "depends on the input"),
        ({"use_dora": True}, "DoRA"),
        ({"r": 4}, "rank contradicts the config"),
    ],
    ids=str,
)
def test_what_it_cannot_mean_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """With the reason."""
    adapter = edited(tmp_path, "bert", **settings)
    with pytest.raises(AdapterFormatError, match=message):
        surgery.merge(GOLDEN / "bert" / "base.st", adapter, tmp_path / "m.st")


def test_other_tensors_beside_the_factors_are_refused(tmp_path: Path) -> None:
    """None is left out in silence."""
    adapter = edited(tmp_path, "bert")
    weights = adapter / "adapter.safetensors"
    save_file({**load_file(weights), "prefix_tunings.style.wte": torch.zeros(2)}, weights)
    with pytest.raises(AdapterFormatError, match="no factor of LoRA"):
        surgery.merge(GOLDEN / "bert" / "base.st", adapter, tmp_path / "m.st")
