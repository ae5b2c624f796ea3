"""How the dialects name layers, and the bases whose names differ by a leading part."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import surgery
from formats.dialects import open_adapter_file
from formats.dialects.underscored import restored, underscored
from formats.errors import AdapterFormatError
from formats.open_files import OpenFiles
from formats.spec import DType, TensorSpec

LAYER = "down_blocks.0.attn1"
SIDES = (".down.weight", ".up.weight")
BASES = {
    "plain": "",
    "a whole pipeline's": "model.diffusion_model.",
    "ComfyUI's": "diffusion_model.",
    "wrapped": "unet.",
}
FORMS = {
    "kohya": ("lora_unet_down_blocks_0_attn1_to_out_0.lora_down.weight", "lora_down", "lora_up"),
    "diffusers": (f"unet.{LAYER}.to_out.0.lora_A.weight", "lora_A", "lora_B"),
    "diffusers, attention": (f"unet.{LAYER}.to_out.0.lora.down.weight", *SIDES),
    "diffusers, processors": (f"unet.{LAYER}.processor.to_out_lora.down.weight", *SIDES),
    "diffusers, processors alone": (f"{LAYER}.processor.to_out_lora.down.weight", *SIDES),
    "comfyui": (f"diffusion_model.{LAYER}.to_out.0.lora_up.weight", "lora_up", "lora_down"),
    "comfyui, peft's factors": (f"diffusion_model.{LAYER}.to_out.0.lora_A.weight", "lora_A", "lora_B"),
    "comfyui, linear layers": (
        f"diffusion_model.{LAYER}.to_out.0.lora_linear_layer.down.weight",
        ".down.weight",
        ".up.weight",
    ),
}


@pytest.mark.parametrize("prefix", BASES.values(), ids=BASES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_key_finds_its_layer(tmp_path: Path, form: str, prefix: str) -> None:
    """Whatever stands before the layer's name in the base; the dialect is told by the keys."""
    key, one, other = FORMS[form]
    torch.manual_seed(0)
    a, b = torch.randn(2, 6), torch.randn(4, 2)
    first, second = (b, a) if one == "lora_up" else (a, b)
    save_file({key: first, key.replace(one, other): second}, tmp_path / "lora.safetensors")
    name = f"{prefix}{LAYER}.to_out.0.weight"
    rest = {f"{prefix}{LAYER}.to_q.weight": torch.zeros(4, 6), f"{prefix}norm.weight": torch.zeros(4)}
    save_file({name: torch.zeros(4, 6), **rest}, tmp_path / "base.st")
    surgery.merge(tmp_path / "base.st", tmp_path / "lora.safetensors", tmp_path / "m.st")
    torch.testing.assert_close(load_file(tmp_path / "m.st")[name], b @ a, atol=1e-6, rtol=1e-6)
    with OpenFiles() as files:
        adapter = open_adapter_file(tmp_path / "lora.safetensors", files)
        assert adapter.dialect.name == form.partition(",")[0]


def test_a_linear_layer_may_be_called_like_an_embedding(tmp_path: Path) -> None:
    """With the base its bias tells what it is, and without one the factors are taken as they are."""
    lora = {"lora_A.weight": torch.randn(2, 6), "lora_B.weight": torch.randn(4, 2)}
    save_file({f"unet.time_emb_proj.{name}": tensor for name, tensor in lora.items()}, tmp_path / "lora.safetensors")
    layer = {"time_emb_proj.weight": torch.zeros(4, 6), "time_emb_proj.bias": torch.zeros(4)}
    save_file(layer, tmp_path / "base.st")
    for base in (None, tmp_path / "base.st"):
        for to, key in (("kohya", "lora_unet_time_emb_proj.lora_down.weight"), ("peft", None)):
            out = tmp_path / f"{to}.safetensors"
            surgery.convert(tmp_path / "lora.safetensors", out, to, base=base, force=True)
            key = key or "base_model.model.time_emb_proj.lora_A.weight"
            assert torch.equal(load_file(out)[key], lora["lora_A.weight"])


@given(st.lists(st.from_regex(r"[ab_]{1,3}(\.[ab0_]{1,3}){0,3}", fullmatch=True), min_size=1, max_size=8, unique=True))
def test_names_come_back_from_their_underscores(modules: list[str]) -> None:
    """Every one whose form is no other's; those of two modules are refused."""
    base = {f"{module}.weight": TensorSpec(f"{module}.weight", DType.F32, (1, 1)) for module in modules}
    forms = Counter(map(underscored, modules))
    for module in modules:
        if forms[underscored(module)] == 1:
            assert restored([underscored(module)], base, "file") == {underscored(module): module}
        else:
            with pytest.raises(AdapterFormatError, match="several modules"):
                restored([underscored(module)], base, "file")


def test_a_name_with_one_part_more_than_the_base(tmp_path: Path) -> None:
    """kohya's text encoders carry `text_model_`, which a base may lack; every key must agree."""
    lora = {}
    for number in (0, 1):
        lora[f"lora_te1_text_model_layers_{number}_q_proj.lora_down.weight"] = torch.ones(1, 3)
        lora[f"lora_te1_text_model_layers_{number}_q_proj.lora_up.weight"] = torch.ones(3, 1)
    save_file(lora, tmp_path / "lora.safetensors")
    save_file({f"layers.{number}.q_proj.weight": torch.zeros(3, 3) for number in (0, 1)}, tmp_path / "base.st")
    surgery.merge(tmp_path / "base.st", tmp_path / "lora.safetensors", tmp_path / "m.st")
    assert all(torch.equal(tensor, torch.ones(3, 3)) for tensor in load_file(tmp_path / "m.st").values())


def test_the_parts_of_a_whole_checkpoint(tmp_path: Path) -> None:
    """SDXL's in one file, the text encoder four names deep: one part is merged after the other."""
    names = {
        "unet": ("lora_unet_middle_block_1_proj_in", "model.diffusion_model.middle_block.1.proj_in"),
        "text_encoder": (
            "lora_te1_text_model_layers_0_q_proj",
            "conditioner.embedders.0.transformer.text_model.layers.0.q_proj",
        ),
    }
    lora = {f"{key}.lora_down.weight": torch.ones(1, 3) for key, _ in names.values()}
    lora |= {f"{key}.lora_up.weight": torch.ones(3, 1) for key, _ in names.values()}
    save_file(lora, tmp_path / "lora.safetensors")
    rest = {"first_stage_model.decoder.conv_in.weight": torch.zeros(3, 3)}
    base = {f"{module}.weight": torch.zeros(3, 3) for _, module in names.values()} | rest
    save_file(base, tmp_path / "base.st")
    source = tmp_path / "base.st"
    for part, (_, module) in names.items():
        surgery.merge(source, tmp_path / "lora.safetensors", tmp_path / f"{part}.st", told=surgery.Told(component=part))
        source = tmp_path / f"{part}.st"
        assert torch.equal(load_file(source)[f"{module}.weight"], torch.ones(3, 3))
    assert not any(load_file(source)[name].any() for name in rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_alpha_is_read_in_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """Web tools store it as the factors' dtype, diffusers' conversion as an integer."""
    lora = {
        "lora_up.weight": torch.ones(3, 2),
        "lora_down.weight": torch.ones(2, 3),
        "alpha": torch.tensor(6).to(dtype),
    }
    save_file({f"lora_unet_q.{name}": tensor for name, tensor in lora.items()}, tmp_path / "lora.safetensors")
    save_file({"q.weight": torch.zeros(3, 3)}, tmp_path / "base.st")
    surgery.merge(tmp_path / "base.st", tmp_path / "lora.safetensors", tmp_path / "m.st")
    assert torch.equal(load_file(tmp_path / "m.st")["q.weight"], torch.full((3, 3), 6.0))


@pytest.mark.parametrize(("base", "factors"), [((4, 6, 1, 1), ()), ((4, 6), (1, 1))], ids=["a convolution", "a matrix"])
def test_a_convolution_of_one_point_is_a_linear_layer(
    tmp_path: Path, base: tuple[int, ...], factors: tuple[int, ...]
) -> None:
    """Factors of either form fit a weight of either, and keep ΔW on their way to the others."""
    torch.manual_seed(0)
    lora = {"lora_up.weight": torch.randn(4, 2, *factors), "lora_down.weight": torch.randn(2, 6, *factors)}
    save_file({f"lora_unet_q.{name}": tensor for name, tensor in lora.items()}, tmp_path / "lora.safetensors")
    save_file({"q.weight": torch.zeros(base)}, tmp_path / "base.st")
    expected = (lora["lora_up.weight"].flatten(1) @ lora["lora_down.weight"].flatten(1)).view(base)
    sources = [tmp_path / "lora.safetensors"]
    for to in ("peft", "comfyui", "diffusers"):
        out = tmp_path / f"{to}.safetensors"
        surgery.convert(sources[0], out, to, base=tmp_path / "base.st")
        sources.append(out)
    for source in sources:
        surgery.merge(tmp_path / "base.st", source, tmp_path / "m.st", force=True)
        torch.testing.assert_close(load_file(tmp_path / "m.st")["q.weight"], expected, atol=1e-6, rtol=1e-6)
