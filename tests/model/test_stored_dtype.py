"""merge --dtype: every weight in another precision, rounded once, and every way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora_by_hand import lora, up
from miniature import weights
from safetensors.torch import load_file, save_file

import surgery
from formats import DType
from formats.errors import UnsupportedDType
from surgery.errors import NotFinite, NothingToDo
from surgery.exact.rounding import round_once

NAME = "layers.0.up.weight"
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OURS = {"float32": DType.F32, "float16": DType.F16, "bfloat16": DType.BF16}


def folder(path: Path, dtype: torch.dtype, config: dict[str, object]) -> Path:
    """The miniature as a model's folder."""
    path.mkdir()
    save_file(weights(dtype=dtype), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_bytes(json.dumps(config, indent=1).replace("\n", "\r\n").encode())
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """LoRA of the first linear layer, and a norm in full."""
    return lora(tmp_path / "a", up() | {"layers.0.norm.weight": torch.full((16,), 2.1)}, modules_to_save=["norm"])


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", TORCH)
def test_every_weight_is_rounded_once(tmp_path: Path, adapter: Path, own: torch.dtype, name: str) -> None:
    """The merged one from the exact sum, the others from what they were, integers not at all; the ledger tells."""
    base = folder(tmp_path / "base", own, {"torch_dtype": "any", "text_config": {"dtype": "any"}, "width": 16})
    report = surgery.merge(base, adapter, tmp_path / "m", dtype=name)
    before, after = weights(dtype=own), load_file(tmp_path / "m" / "model.safetensors")
    factors = up()
    a, b = (factors[f"layers.0.up.lora_{role}.weight"].double() for role in "AB")
    exact = before[NAME].double() + 2 * b @ a
    unit = 0.5 * torch.finfo(TORCH[name]).eps * exact.abs()
    assert bool(((after[NAME].double() - exact).abs() <= unit + 2e-6).all())
    if name != "float32":  # whose products are as fine as it is
        assert int((after[NAME] != round_once(exact, OURS[name])).sum()) <= 1
    assert torch.equal(
        after["layers.0.norm.weight"], torch.full((16,), 2.1).to(own if own is TORCH[name] else TORCH[name])
    )
    for other in ("embed.token_embeddings.weight", "layers.0.up.bias"):
        assert torch.equal(after[other], round_once(before[other].double(), OURS[name]))
    assert after["layers.0.steps"].dtype == torch.int64
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config == {"torch_dtype": name, "text_config": {"dtype": name}, "width": 16}
    same = own is TORCH[name]
    assert report.ledger["converted"] == (0 if same else 5)
    assert report.ledger["copied"] == (6 if same else 1)


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", TORCH)
def test_undo_gives_the_base_back_in_its_own_dtype(tmp_path: Path, adapter: Path, own: torch.dtype, name: str) -> None:
    """Weights and config.json byte for byte."""
    base = folder(tmp_path / "base", own, {"dtype": "any"})
    undo = tmp_path / "u.st"
    surgery.merge(base, adapter, tmp_path / "m", dtype=name, undo=undo)
    report = surgery.unmerge(tmp_path / "m", adapter, tmp_path / "b", undo=undo)
    assert report.bit_exact is True
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "b" / file).read_bytes() == (base / file).read_bytes()


def test_unmerge_without_undo_is_the_nearest_in_the_bases_dtype(tmp_path: Path, adapter: Path) -> None:
    """A wider dtype forgets nothing of what was only converted; a narrower one does, and that is said."""
    base = folder(tmp_path / "base", torch.bfloat16, {"dtype": "bfloat16"})
    surgery.merge(base, adapter, tmp_path / "wide", dtype="float32")
    wide = surgery.unmerge(tmp_path / "wide", adapter, tmp_path / "b")
    assert wide.bit_exact is True
    assert (tmp_path / "b" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    fine = folder(tmp_path / "fine", torch.float32, {})
    surgery.merge(fine, adapter, tmp_path / "narrow", dtype="bfloat16")
    narrow = surgery.unmerge(tmp_path / "narrow", adapter, tmp_path / "c")
    assert narrow.bit_exact is False
    back = load_file(tmp_path / "c" / "model.safetensors")
    assert all(back[name].dtype == tensor.dtype for name, tensor in weights().items())
    assert torch.allclose(back[NAME], weights()[NAME], atol=0.1)


def test_verify_replays_the_dtype(tmp_path: Path, adapter: Path) -> None:
    """As the receipt says, or, for a file without one, as the file is."""
    base = folder(tmp_path / "base", torch.float32, {})
    surgery.merge(base, adapter, tmp_path / "m.st", dtype="bfloat16")
    save_file(load_file(tmp_path / "m.st"), tmp_path / "bare.st")
    for merged in ("m.st", "bare.st"):
        assert surgery.verify(tmp_path / merged, base, adapter).verdict == "exact"


def test_what_cannot_be_stored_so_is_refused(tmp_path: Path, adapter: Path) -> None:
    """Beyond float16's range, merged or converted; no such dtype; a delta of zero is no merge, whatever the dtype."""
    base = weights()
    base["layers.0.down.bias"][3] = 1e6
    save_file(base, tmp_path / "base.st")
    with pytest.raises(NotFinite, match="exceeds the range") as caught:
        surgery.merge(tmp_path / "base.st", adapter, tmp_path / "m.st", dtype="float16")
    assert "layers.0.down.bias" in str(caught.value)
    with pytest.raises(UnsupportedDType, match="cannot be stored"):
        surgery.merge(tmp_path / "base.st", adapter, tmp_path / "m.st", dtype="int8")
    zero = lora(tmp_path / "z", {name: torch.zeros_like(tensor) for name, tensor in up().items()})
    with pytest.raises(NothingToDo):
        surgery.merge(tmp_path / "base.st", zero, tmp_path / "m.st", dtype="bfloat16")
    assert not (tmp_path / "m.st").exists()
