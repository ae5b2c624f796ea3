from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dialect_models import KINDS, PART, changes, made_by_peft
from safetensors.torch import load_file

import surgery
from formats.dialects.writing import Piece
from formats.errors import ReportedError
from formats.spec import CheckpointRef, DType, TensorRef, TensorSpec
from surgery.operations.convert import Make

DIALECTS = ("peft", "kohya", "lycoris", "comfyui", "diffusers", "loralib")
ALPHA = {"linear": 6, "embedding": 6, "Conv1D": 6, "ranks": 6, "rsLoRA": 12, "biases": 6}
# What each dialect has; the others are refused.
HAS = {
    "peft": set(KINDS),
    "kohya": {"linear", "conv", "ranks", "rsLoRA"},
    "lycoris": {"linear", "conv", "ranks", "rsLoRA", "DoRA", "LoHa", "LoKr"},
    "comfyui": set(KINDS) - {"biases"},
    "diffusers": {"linear", "conv", "ranks", "rsLoRA", "DoRA", "lora_bias"},
    "loralib": {"linear", "embedding", "Conv1D", "rsLoRA", "biases"},
}


def told_of(dialect: str, kind: str) -> surgery.Told:
    """What must be said of a file in a dialect."""
    if dialect == "loralib":
        return surgery.Told(alpha=ALPHA[kind])
    return surgery.Told()


def written(folder: Path, source: Path, kind: str, dialect: str, told: surgery.Told, to: str) -> Path:
    """Converts, with the part of the pipeline where one of the two has any."""
    parts = {dialect, to} - {"peft", "loralib"}
    said = surgery.Told(alpha=told.alpha, component=PART if parts else None)
    out = folder / f"{source.name.partition('.')[0]}-{to}.st"
    surgery.convert(source, out, to, base=folder / "base.st", told=said)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", DIALECTS)
def test_round_trips(tmp_path: Path, kind: str, first: str) -> None:
    """peft → first → every other dialect: the same ΔW within 1e-6, or a refusal where the dialect has no such thing."""
    made_by_peft(tmp_path, kind)
    base = tmp_path / "base.st"
    expected = changes(base, tmp_path / "peft", tmp_path)
    assert expected
    if kind not in HAS[first]:
        with pytest.raises(ReportedError, match="cannot express"):
            written(tmp_path, tmp_path / "peft", kind, "peft", surgery.Told(), first)
        return
    source = tmp_path / "peft"
    if first != "peft":
        source = written(tmp_path, source, kind, "peft", surgery.Told(), first)
    told = told_of(first, kind)
    for second in DIALECTS:
        if kind not in HAS[second]:
            with pytest.raises(ReportedError, match="cannot express"):
                written(tmp_path, source, kind, first, told, second)
            continue
        out = written(tmp_path, source, kind, first, told, second)
        found = changes(base, out, tmp_path, alpha=told_of(second, kind).alpha)
        assert found.keys() == expected.keys()
        for name, delta in expected.items():
            scale = max(delta.abs().max().item(), load_file(base)[name].abs().max().item())
            assert (found[name] - delta).abs().max() <= 1e-6 * scale, (second, name)


def test_what_is_computed_is_rounded_once() -> None:
    """To bfloat16 the nearest of the float64 product, not of the float32 between the two."""
    value = 1 + 2**-8 + 2**-30  # float32 makes a tie of it, which goes down to 1
    source = TensorRef(CheckpointRef("adapter"), TensorSpec("lora_B", DType.BF16, (1,)))
    made = Make(Piece(source.spec, (source,), factor=value))(torch.ones(1, dtype=torch.bfloat16))
    assert made.tensors[0].item() == 1 + 2**-7
