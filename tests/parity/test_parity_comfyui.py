"""What convert writes for ComfyUI, by its own way of reading (tests/comfyui_loader.py): every key asked for, and the
weights that merge gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfyui_loader import patched
from dialect_models import KINDS, PART, made_by_peft
from safetensors.torch import load_file
from test_parity_lycoris import ALGORITHMS, NOT_IN_COMFYUI, made_by_lycoris

import surgery


def compared(folder: Path, source: Path, *, dora: bool) -> None:
    """Converts and compares; DoRA only in what ComfyUI's other length makes of it."""
    base, out = folder / "base.st", folder / "c.safetensors"
    report = surgery.convert(source, out, "comfyui", base=base, told=surgery.Told(component=PART))
    surgery.merge(base, source, folder / "merged.st")
    before, merged = load_file(base), load_file(folder / "merged.st")
    found, left = patched(before, load_file(out))
    assert not left
    assert any("ComfyUI computes DoRA differently" in note for note in report.notes) is dora
    assert {name for name in before if not torch.equal(found[name], before[name])} == {
        name for name in before if not torch.equal(merged[name], before[name])
    }
    for name, tensor in merged.items():
        other = found[name]
        if dora and tensor.dim() > 1:  # the same directions
            tensor, other = (torch.nn.functional.normalize(each.flatten(1)) for each in (tensor, other))
        torch.testing.assert_close(other, tensor, atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"biases"}))
def test_comfyui_reads_what_peft_made(tmp_path: Path, kind: str) -> None:
    """Each kind of layer and of factors that the dialect has."""
    made_by_peft(tmp_path, kind)
    compared(tmp_path, tmp_path / "peft", dora=kind == "DoRA")


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS.keys() - NOT_IN_COMFYUI))
def test_comfyui_reads_what_lycoris_made(tmp_path: Path, algorithm: str) -> None:
    """Its own methods, whole differences and norms with them."""
    made_by_lycoris(tmp_path, **ALGORITHMS[algorithm])
    compared(tmp_path, tmp_path / "lycoris.safetensors", dora="DoRA" in algorithm)
