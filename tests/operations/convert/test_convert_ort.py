"""The dialect of ONNX Runtime's adapters: names and dtype of the base, the scaling in lora_B, factors turned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib
import peft
import pytest
import torch
from dialect_models import made_by_peft
from safetensors.torch import load_file, save_file
from tiny_models import build

import surgery
from formats import Destination, create_checkpoint, open_checkpoint
from formats.containers import Container
from formats.errors import AdapterFormatError, FormatError, ReportedError, ShapeMismatch, UnmatchedKeys
from formats.spec import DType
from formats.tensors import spec_of

SQUARE = {"bert": ["query", "dense"], "gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "up_proj"]}


def adapted(folder: Path, kind: str, **settings: Any) -> tuple[Path, Path]:
    """A tiny model's folder and an adapter of it."""
    model = build(kind)
    model.save_pretrained(folder / "base")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=SQUARE[kind], fan_in_fan_out=kind == "gpt2", **settings)
    made = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(folder / "peft")
    return folder / "base", folder / "peft"


def merged(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    """The merged model's tensors."""
    surgery.merge(base, adapter, out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("kind", SQUARE)
def test_square_weights_keep_their_side(tmp_path: Path, kind: str) -> None:
    """Which way round a weight lies is learned from the base: peft → ort → peft merges to the same, each of them."""
    base, adapter = adapted(tmp_path, kind)
    surgery.convert(adapter, tmp_path / "a.onnx_adapter", "ort", base=base)
    surgery.convert(tmp_path / "a.onnx_adapter", tmp_path / "again", "peft", base=base)
    expected = merged(base, adapter, tmp_path / "merged")
    for path in (tmp_path / "a.onnx_adapter", tmp_path / "again"):
        found = merged(base, path, tmp_path / f"merged-{path.stem}")
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)
    report = surgery.verify(tmp_path / "merged-a", base=base, adapters=tmp_path / "a.onnx_adapter")
    assert report.verdict == "exact"


def test_names_shapes_and_dtype_are_the_graphs(tmp_path: Path) -> None:
    """A (in, rank), B (rank, out), in the base's dtype and under the base's names, whatever the adapter's own."""
    tensors = {"encoder.layer.weight": torch.zeros(8, 12, dtype=torch.float16), "encoder.norm.weight": torch.ones(8)}
    save_file(tensors, tmp_path / "base.st")
    a, b = torch.randn(2, 12).bfloat16(), torch.randn(8, 2).bfloat16()
    key = "base_model.model.bert.encoder.layer.lora_{}.weight"
    config = '{"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["layer"]}'
    save_file({key.format("A"): a, key.format("B"): b}, tmp_path / "p.st", metadata={"adapter_config": config})
    report = surgery.convert(tmp_path / "p.st", tmp_path / "a.onnx_adapter", "ort", base=tmp_path / "base.st")
    assert (report.copied, report.computed) == (0, 2)
    with open_checkpoint(tmp_path / "a.onnx_adapter") as checkpoint:
        specs = {name: (spec.dtype, spec.shape) for name, spec in checkpoint.specs.items()}
        assert specs == {"encoder.layer.lora_A": (DType.F16, (12, 2)), "encoder.layer.lora_B": (DType.F16, (2, 8))}
        assert torch.equal(checkpoint.read("encoder.layer.lora_A"), a.mT.half())
        assert torch.equal(checkpoint.read("encoder.layer.lora_B"), (b.mT.double() * 1.5).half())


def test_the_same_bytes_again(tmp_path: Path) -> None:
    """Whatever the number of threads; and ort → ort is a copy, byte for byte."""
    base, adapter = adapted(tmp_path, "llama")
    files = []
    for jobs in (1, 3):
        files.append(tmp_path / f"{jobs}.onnx_adapter")
        surgery.convert(adapter, files[-1], "ort", base=base, resources=surgery.Resources(jobs=jobs))
    files.append(tmp_path / "copy.onnx_adapter")
    surgery.convert(files[0], files[-1], "ort", base=base)
    assert len({file.read_bytes() for file in files}) == 1


def test_a_fused_layer_of_loralibs(tmp_path: Path) -> None:
    """Its blocks become one lora_B, turned."""
    torch.manual_seed(0)
    layer = loralib.MergedLinear(12, 18, r=2, lora_alpha=5, enable_lora=[True, False, True])
    torch.nn.init.normal_(layer.lora_B)
    plain = {f"attn.{name}": tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    save_file({name: t for name, t in plain.items() if "lora" not in name}, tmp_path / "base.st")
    save_file({name: t for name, t in plain.items() if "lora" in name}, tmp_path / "lora.st")
    told = surgery.Told(alpha=5, enable_lora=(True, False, True))
    surgery.convert(tmp_path / "lora.st", tmp_path / "a.onnx_adapter", "ort", base=tmp_path / "base.st", told=told)
    surgery.merge(tmp_path / "base.st", tmp_path / "lora.st", tmp_path / "one.st", told=told)
    surgery.merge(tmp_path / "base.st", tmp_path / "a.onnx_adapter", tmp_path / "two.st")
    one, two = load_file(tmp_path / "one.st"), load_file(tmp_path / "two.st")
    assert not torch.equal(one["attn.weight"], plain["attn.weight"])
    torch.testing.assert_close(two["attn.weight"], one["attn.weight"], atol=1e-6, rtol=1e-6)


def test_a_folder_holds_it_too(tmp_path: Path, cli_json: Callable[..., Any]) -> None:
    """And is an adapter like others."""
    made_by_peft(tmp_path, "linear")
    surgery.convert(tmp_path / "peft", tmp_path / "ort", "ort", base=tmp_path / "base.st")
    assert [path.name for path in (tmp_path / "ort").iterdir()] == ["adapter.onnx_adapter"]
    surgery.merge(tmp_path / "base.st", tmp_path / "ort", tmp_path / "m.st")
    told = cli_json("inspect", tmp_path / "ort")
    assert (told["kind"], told["container"], told["adapter"]["dialect"]) == ("adapter", "onnx_adapter", "ort")


def test_the_base_must_be_named(tmp_path: Path) -> None:
    """Names and dtype are its; and what is read has no names of its own either."""
    made_by_peft(tmp_path, "linear")
    with pytest.raises(AdapterFormatError, match="a graph's inputs") as caught:
        surgery.convert(tmp_path / "peft", tmp_path / "a.onnx_adapter", "ort")
    assert "--base" in caught.value.details["next"]
    surgery.convert(tmp_path / "peft", tmp_path / "a.onnx_adapter", "ort", base=tmp_path / "base.st")
    with pytest.raises(AdapterFormatError, match="ort's files do not give") as caught:
        surgery.convert(tmp_path / "a.onnx_adapter", tmp_path / "p.st", "peft")
    assert "--base" in caught.value.details["next"]


def test_the_container_and_the_dialect_go_together(tmp_path: Path) -> None:
    """No other dialect in an .onnx_adapter, no ort in another file, no change of the container alone."""
    made_by_peft(tmp_path, "linear")
    base = tmp_path / "base.st"
    for dialect, name in (("peft", "a.onnx_adapter"), ("ort", "a.safetensors"), ("ort", "a.pt")):
        with pytest.raises(FormatError):
            surgery.convert(tmp_path / "peft", tmp_path / name, dialect, base=base)
        assert not (tmp_path / name).exists()
    with pytest.raises(FormatError, match="convert --to ort"):
        surgery.merge(base, tmp_path / "peft", tmp_path / "m.onnx_adapter")
    with pytest.raises(FormatError, match="convert --to ort"):
        surgery.convert_container(base, tmp_path / "b.onnx_adapter")
    surgery.convert(tmp_path / "peft", tmp_path / "a.onnx_adapter", "ort", base=base)
    with pytest.raises(AdapterFormatError, match="transposed factors"):
        surgery.convert_container(tmp_path / "a.onnx_adapter", tmp_path / "a.safetensors")
    with pytest.raises(AdapterFormatError, match="loralib's files"):
        surgery.merge(base, tmp_path / "a.onnx_adapter", tmp_path / "m.st", told=surgery.Told(alpha=4))


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        ({"model.q.MatMul.weight": (12, 2)}, AdapterFormatError, "not an input of an exported graph"),
        ({"layer.lora_A": (12, 2)}, AdapterFormatError, "one factor of a pair"),
        ({"layer.lora_A": (12, 2), "layer.lora_B": (3, 8)}, ShapeMismatch, "does not fit"),
        ({"layer.lora_A": (2, 12), "layer.lora_B": (8, 2)}, ShapeMismatch, "does not fit"),
        ({"layer.lora_A": (12, 0), "layer.lora_B": (0, 8)}, ShapeMismatch, "does not fit"),
        ({"layr.lora_A": (12, 2), "layr.lora_B": (2, 8)}, UnmatchedKeys, "match nothing"),
    ],
)
def test_bad_files(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], kind: type[ReportedError], message: str
) -> None:
    """One clear error each, and nothing written."""
    save_file({"layer.weight": torch.zeros(8, 12)}, tmp_path / "base.st")
    made = {name: torch.ones(shape) for name, shape in tensors.items()}
    destination = Destination(tmp_path / "a.onnx_adapter", container=Container.ORT)
    with create_checkpoint(destination, [spec_of(name, t) for name, t in made.items()], {}) as writer:
        for name, tensor in made.items():
            writer.write(name, tensor)
    with pytest.raises(kind, match=message):
        surgery.merge(tmp_path / "base.st", tmp_path / "a.onnx_adapter", tmp_path / "m.st")
    assert not (tmp_path / "m.st").exists()


def test_a_float8_base_has_no_graph(tmp_path: Path) -> None:
    """Its inputs would have a dtype that nothing is computed in."""
    save_file({"layer.weight": torch.zeros(8, 12).to(torch.float8_e4m3fn)}, tmp_path / "base.st")
    key = "base_model.model.layer.lora_{}.weight"
    config = '{"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["layer"]}'
    factors = {key.format("A"): torch.ones(2, 12), key.format("B"): torch.ones(8, 2)}
    save_file(factors, tmp_path / "p.st", metadata={"adapter_config": config})
    with pytest.raises(AdapterFormatError, match="graphs do not multiply"):
        surgery.convert(tmp_path / "p.st", tmp_path / "a.onnx_adapter", "ort", base=tmp_path / "base.st")
