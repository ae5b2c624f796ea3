"""The two names of a UNet's layers, with diffusers' own conversions as the judge (tests/golden/make_diffusers.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file, save_file

import surgery
from formats.dialects.unet_names import NameForm, Names, other_names
from formats.errors import AdapterFormatError, UnmatchedKeys

WRITTEN = GOLDEN / "diffusers"

KOHYA, LOADED = WRITTEN / "sdxl-kohya.st", WRITTEN / "sdxl-loaded.st"
NAMES: dict[str, str] = json.loads((WRITTEN / "unet-names.json").read_text())  # the original's → diffusers'
HEAD = "model.diffusion_model."


def base(folder: Path, *, original: bool) -> Path:
    """A checkpoint of zeros with all layers' names in one form and the shapes that the adapter has; others are tiny."""
    lora = load_file(KOHYA)
    tensors = {}
    for name, theirs in NAMES.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        shape: tuple[int, ...] = (1,)
        if f"{key}.alpha" in lora:
            down, up = lora[f"{key}.lora_down.weight"], lora[f"{key}.lora_up.weight"]
            shape = (up.shape[0], *down.shape[1:])
        module = HEAD + name if original else theirs
        tensors |= {f"{module}.weight": torch.zeros(shape), f"{module}.bias": torch.zeros(shape[:1])}
    path = folder / f"{'original' if original else 'diffusers'}.st"
    save_file(tensors, path)
    return path


def deltas(folder: Path, path: Path, adapter: Path, **told: str) -> dict[str, torch.Tensor]:
    """What merging leaves in a base of zeros, by diffusers' names."""
    surgery.merge(path, adapter, folder / "merged.st", told=surgery.Told(**told), force=True)
    merged = {
        name.removeprefix(HEAD).removesuffix(".weight"): tensor
        for name, tensor in load_file(folder / "merged.st").items()
    }
    return {NAMES.get(name, name): tensor for name, tensor in merged.items() if tensor.any()}


def test_names_are_diffusers_own(tmp_path: Path) -> None:
    """All layers, both ways; the heads of whole checkpoints make no difference."""
    for head in ("", HEAD, "diffusion_model."):
        names = Names.of("diffusers", NameForm.DIFFUSERS, [head + name for name in NAMES])
        assert {name: names.adapted(head + name) for name in NAMES} == NAMES
        assert other_names([head + name for name in NAMES]) == {new: head + old for old, new in NAMES.items()}
    names = Names.of("comfyui", NameForm.ORIGINAL, NAMES.values())
    assert {names.adapted(theirs): theirs for theirs in NAMES.values()} == NAMES
    assert other_names(["encoder.layer.0", "out.0", "conv_in"]) == {}


@pytest.mark.parametrize("original", [True, False], ids=["the original's base", "diffusers' base"])
def test_kohyas_sdxl_becomes_what_diffusers_makes_of_it(tmp_path: Path, original: bool) -> None:
    """On either base: the same tensors under the same names, alpha in the config, and the same ΔW."""
    path = base(tmp_path, original=original)
    report = surgery.convert(KOHYA, tmp_path / "d", "diffusers", base=path)
    ours = load_file(tmp_path / "d" / "pytorch_lora_weights.safetensors")
    theirs = load_file(LOADED)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert report.weights == {"lora": len(theirs) // 2}
    found = deltas(tmp_path, path, tmp_path / "d", component="unet")
    assert found.keys() == {name[5:].partition(".lora_")[0] for name in theirs}
    for name, tensor in found.items():
        a, b = (ours[f"unet.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(tensor, 0.5 * (b.flatten(1) @ a.flatten(1)).view(tensor.shape), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("original", [True, False], ids=["the original's base", "diffusers' base"])
def test_comfyui_gets_the_names_it_knows(tmp_path: Path, original: bool) -> None:
    """The original's, from either base; read back on either, the ΔW is the same."""
    path = base(tmp_path, original=original)
    surgery.convert(KOHYA, tmp_path / "c.st", "comfyui", base=path)
    layers = {name.partition(".lora_")[0] for name in load_file(tmp_path / "c.st") if ".lora_" in name}
    assert layers <= {f"diffusion_model.{name}" for name in NAMES}
    expected = deltas(tmp_path, path, KOHYA)
    for other in (True, False):
        found = deltas(tmp_path, base(tmp_path, original=other), tmp_path / "c.st")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_kohya_of_a_first_stable_diffusion_has_diffusers_names(tmp_path: Path) -> None:
    """As its trainer writes them, though the base is the original checkpoint; SDXL's keep the base's."""
    path = base(tmp_path, original=True)
    for sdxl in (True, False):
        tensors = {name: tensor for name, tensor in load_file(path).items() if sdxl or "label_emb" not in name}
        save_file(tensors, tmp_path / "base.st")
        lora = {key: t for key, t in load_file(KOHYA).items() if "label_emb" not in key}
        save_file(lora, tmp_path / "source.st")
        surgery.convert(tmp_path / "source.st", tmp_path / "c.st", "comfyui", base=tmp_path / "base.st", force=True)
        surgery.convert(tmp_path / "c.st", tmp_path / "k.st", "kohya", base=tmp_path / "base.st", force=True)
        written = set(load_file(tmp_path / "k.st"))
        assert (written == set(lora)) is sdxl
        assert any(key.startswith("lora_unet_down_blocks_") for key in written) is not sdxl


def test_names_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    """Without the base's own names the blocks cannot be counted; Flux has other layers in each form."""
    lora = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(4, 2)}

    def file(layer: str) -> Path:
        save_file({f"{layer}.{name}": tensor.clone() for name, tensor in lora.items()}, tmp_path / "source.st")
        return tmp_path / "source.st"

    with pytest.raises(AdapterFormatError, match="use another name for this layer") as caught:
        surgery.convert(file("unet.down_blocks.1.attentions.0.proj_in"), tmp_path / "c.st", "comfyui")
    assert "--base" in str(caught.value)
    with pytest.raises(AdapterFormatError, match="use another name for this layer"):
        surgery.convert(file("diffusion_model.input_blocks.4.1.proj_in"), tmp_path / "d", "diffusers")
    with pytest.raises(AdapterFormatError, match="use another name for this layer"):
        surgery.convert(file("diffusion_model.double_blocks.0.img_attn.proj"), tmp_path / "d", "diffusers")
    with pytest.raises(AdapterFormatError, match="ComfyUI reads diffusers' files"):
        surgery.convert(file("transformer.single_transformer_blocks.0.attn.to_q"), tmp_path / "c.st", "comfyui")
    flux = {f"lora_unet_double_blocks_0_img_attn_qkv.{name}": lora[key].clone()
            for name, key in (("lora_down.weight", "lora_A.weight"), ("lora_up.weight", "lora_B.weight"))}  # fmt: skip
    save_file(flux, tmp_path / "flux.st")
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.zeros(4, 4)}, tmp_path / "base.st")
    with pytest.raises(UnmatchedKeys, match="use the original checkpoint"):
        surgery.merge(tmp_path / "base.st", tmp_path / "flux.st", tmp_path / "m.st")
