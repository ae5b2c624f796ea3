"""Quantised files are told for what they are, from headers and config.json, and refused with a way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from lora_by_hand import lora, up
from miniature import weights
from safetensors.torch import load_file, save_file

import surgery
from formats.errors import CorruptFile, Quantised
from formats.model_config import model_config
from formats.quantized import foreign, quantization_config
from formats.spec import DType, TensorSpec

I32, U8, F8 = torch.int32, torch.uint8, torch.float8_e4m3fn
STEM = "layers.0.up"


def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A tensor whose values do not matter."""
    return torch.zeros(shape, dtype=dtype)


# What each stores instead of layers.0.up.weight (48, 16), its quantization_config, and what it is called.
FORMS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "gptq": (
        {"qweight": zeros(2, 48, dtype=I32), "qzeros": zeros(1, 6, dtype=I32), "scales": zeros(1, 48),
         "g_idx": zeros(16, dtype=I32)},
        {"quant_method": "gptq", "bits": 4}, "GPTQ",
    ),
    "gptq without a config": (
        {"qweight": zeros(2, 48, dtype=I32), "qzeros": zeros(1, 6, dtype=I32), "scales": zeros(1, 48),
         "g_idx": zeros(16, dtype=I32)},
        {}, "GPTQ",
    ),
    "awq": (
        {"qweight": zeros(16, 6, dtype=I32), "qzeros": zeros(1, 6, dtype=I32), "scales": zeros(1, 48)},
        {"quant_method": "awq", "bits": 4}, "AWQ",
    ),
    "bitsandbytes nf4": (
        {"weight": zeros(384, 1, dtype=U8), "weight.absmax": zeros(12, dtype=U8), "weight.quant_map": zeros(16),
         "weight.quant_state.bitsandbytes__nf4": zeros(80, dtype=U8)},
        {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4-bit",
    ),
    "bitsandbytes int8": (
        {"weight": zeros(48, 16, dtype=torch.int8), "SCB": zeros(48), "weight_format": zeros(1, dtype=U8)},
        {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit",
    ),
    "hqq": (
        {"W_q": zeros(24, 16, dtype=U8), "scale": zeros(12, 1), "zero": zeros(12, 1)}, {"quant_method": "hqq"}, "HQQ",
    ),
    "compressed-tensors, packed": (
        {"weight_packed": zeros(48, 2, dtype=I32), "weight_scale": zeros(48, 1), "weight_shape": zeros(2, dtype=I32)},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors pack-quantized",
    ),
    "compressed-tensors, int8": (
        {"weight": zeros(48, 16, dtype=torch.int8), "weight_scale": zeros(48, 1)},
        {"quant_method": "compressed-tensors", "format": "int-quantized"}, "compressed-tensors",
    ),
    "nvfp4, compressed-tensors": (
        {"weight_packed": zeros(48, 8, dtype=U8), "weight_scale": zeros(48, 1).to(F8), "weight_global_scale": zeros(1)},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "NVFP4",
    ),
    "nvfp4, ModelOpt": (
        {"weight": zeros(48, 8, dtype=U8), "weight_scale": zeros(48, 1).to(F8), "weight_scale_2": zeros(1)},
        {"quant_method": "modelopt"}, "NVFP4",
    ),
}  # fmt: skip


def model(folder: Path, case: str) -> Path:
    """The miniature with one layer in a quantised form."""
    instead, config, _ = FORMS[case]
    folder.mkdir()
    tensors = weights(dtype=torch.float16)
    del tensors[f"{STEM}.weight"]
    save_file(tensors | {f"{STEM}.{name}": each for name, each in instead.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    return folder


@pytest.mark.parametrize("case", FORMS)
def test_a_merge_names_the_form_and_the_way_out(tmp_path: Path, case: str, cli: Callable[..., Result]) -> None:
    """While planning, the dry run included; unmerge likewise; nothing is written."""
    base, adapter = model(tmp_path / "base", case), lora(tmp_path / "a", up())
    with pytest.raises(Quantised) as caught:
        surgery.merge(base, adapter, tmp_path / "m")
    assert FORMS[case][2] in str(caught.value)
    assert "unquantised model" in str(caught.value)
    assert cli("merge", base, adapter, "-o", tmp_path / "m", "--dry-run").exit_code == 1
    with pytest.raises(Quantised):
        surgery.unmerge(base, adapter, tmp_path / "m")
    with pytest.raises(Quantised):
        surgery.verify(base, base, adapter)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("case", FORMS)
def test_extract_refuses_either_side(tmp_path: Path, case: str) -> None:
    """Base or tuned; not where the layer is left out."""
    quantised, plain = model(tmp_path / "q", case), tmp_path / "plain.st"
    save_file(weights(dtype=torch.float16), plain)
    for pair in ((quantised, plain), (plain, quantised)):
        with pytest.raises(Quantised, match="no difference"):
            surgery.extract(*pair, tmp_path / "a", rank=2)
    shutil.copytree(quantised, tmp_path / "tuned")
    tensors = load_file(quantised / "model.safetensors")
    tensors["layers.0.down.weight"] += 0.5
    save_file(tensors, tmp_path / "tuned" / "model.safetensors")
    surgery.extract(quantised, tmp_path / "tuned", tmp_path / "b", rank=2, include=["layers.0.down.*"])


def test_layers_beside_a_quantised_one_can_be_merged(tmp_path: Path) -> None:
    """What the adapter does not touch is copied as it is; another dtype for all is refused."""
    base = model(tmp_path / "base", "bitsandbytes int8")
    factors = {name.replace("up", "down"): tensor for name, tensor in up(out=16, into=48).items()}
    adapter = lora(tmp_path / "a", factors)
    report = surgery.merge(base, adapter, tmp_path / "m")
    assert report.ledger["merged"] == 1
    with pytest.raises(Quantised):
        surgery.merge(base, adapter, tmp_path / "n", dtype="bfloat16")


def test_float8_with_scales_has_no_difference_either(tmp_path: Path) -> None:
    """Factors of the stored numbers would be factors of nothing."""
    tensors = weights(dtype=torch.bfloat16)
    tensors["layers.0.up.weight"] = tensors["layers.0.up.weight"].to(F8)
    for name, scale in (("a.st", 1.0), ("b.st", 2.0)):
        save_file(tensors | {"layers.0.up.weight_scale": torch.tensor(scale)}, tmp_path / name)
    with pytest.raises(Quantised, match="float8 with scales"):
        surgery.extract(tmp_path / "a.st", tmp_path / "b.st", tmp_path / "out", rank=2)


def test_stacked_mxfp4_is_told_by_its_names() -> None:
    """gpt-oss: `_blocks` and `_scales` in place of a parameter."""
    specs = {
        name: TensorSpec(name, DType.U8, shape)
        for name, shape in (("mlp.experts.up_blocks", (2, 4, 1, 16)), ("mlp.experts.up_scales", (2, 4, 1)))
    }
    assert foreign(specs, {}) == {"mlp.experts.up": "MXFP4"}


def test_a_config_that_says_nothing_says_nothing(tmp_path: Path) -> None:
    """No config.json, no such entry, an entry of another type; one that is no JSON object is an error."""
    assert model_config(tmp_path) == {}
    for text in ("{}", '{"quantization_config": 3}'):
        (tmp_path / "config.json").write_text(text)
        assert quantization_config(model_config(tmp_path / "model.safetensors")) == {}
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CorruptFile, match="config is not"):
            model_config(tmp_path)
