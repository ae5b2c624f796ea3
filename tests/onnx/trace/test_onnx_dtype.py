"""--dtype: the graph computes in another dtype than the weights are stored in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from formats.errors import UnsupportedDType
from surgery.errors import NotFinite, Unsupported
from surgery.onnx.files.payload import PAYLOAD
from surgery.operations.export.export_onnx import export_onnx

pytestmark = pytest.mark.processor

Make = Callable[..., Path]


def test_float16_of_float32_weights(tmp_path: Path, make_model: Make) -> None:
    """The payload is the weights rounded once; the error against float32 is reported besides that against float16."""
    folder = make_model(tmp_path / "m", "bert", num_hidden_layers=1)
    report = export_onnx(folder, tmp_path / "out/model.onnx", dtype="float16")
    assert report.dtype == "F16"
    assert report.max_rel_error is not None
    assert report.tolerance is not None
    assert report.float32_error is not None
    assert report.max_rel_error < report.tolerance
    assert 1e-5 < report.float32_error < 0.05
    written, stored = load_file(tmp_path / "out" / PAYLOAD), load_file(folder / PAYLOAD)
    for name, tensor in stored.items():
        assert torch.equal(written[name], tensor.half())
    kinds = {t.data_type for t in onnx.load(report.graphs[0].path, load_external_data=False).graph.initializer
             if t.external_data}  # fmt: skip
    assert kinds == {onnx.TensorProto.FLOAT16}


def test_bfloat16_weights(tmp_path: Path, make_model: Make) -> None:
    """Refused as they are, saying which ways there are; exact in float32; bfloat16 for other providers."""
    folder = make_model(tmp_path / "m", "bert", dtype="bfloat16", num_hidden_layers=1)
    with pytest.raises(UnsupportedDType) as caught:
        export_onnx(folder, tmp_path / "out/model.onnx")
    assert "--dtype bfloat16" in caught.value.details["next"]
    wide = export_onnx(folder, tmp_path / "wide/model.onnx", dtype="float32", verify=False)
    written, stored = load_file(wide.payload), load_file(folder / PAYLOAD)
    assert all(torch.equal(written[name], tensor.float()) for name, tensor in stored.items())
    narrow = export_onnx(folder, tmp_path / "narrow/model.onnx", dtype="bfloat16", verify=False)
    assert narrow.dtype == "BF16"
    assert all(torch.equal(load_file(narrow.payload)[name], tensor) for name, tensor in stored.items())
    onnx.checker.check_model(narrow.graphs[0].path)
    assert "not compared with torch" in narrow.notes


def test_bfloat16_of_float32_weights(tmp_path: Path, make_model: Make) -> None:
    """Compared all the same, over the rounded weights and in float32 otherwise; and what the rounding costs is told."""
    folder = make_model(tmp_path / "m", "gpt2")
    report = export_onnx(folder, tmp_path / "out/model.onnx", dtype="bfloat16")
    assert report.dtype == "BF16"
    assert report.max_rel_error is not None
    assert report.tolerance is not None
    assert report.float32_error is not None
    assert report.max_rel_error < report.tolerance < 0.02
    assert 1e-4 < report.float32_error < 0.05
    assert any("bfloat16 weights" in note for note in report.notes)
    graph = onnx.load(report.graphs[0].path, load_external_data=False).graph
    assert {t.data_type for t in graph.initializer if t.external_data} == {onnx.TensorProto.BFLOAT16}
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


def test_what_no_op_takes_is_refused(tmp_path: Path) -> None:
    """A convolution takes no bfloat16 in the opset that we write: refused, compared or not, and nothing is written."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hidden_layers=1, image_size=16, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "m")
    with pytest.raises(Unsupported, match="valid ONNX") as caught:
        export_onnx(tmp_path / "m", tmp_path / "out/model.onnx", dtype="bfloat16", verify=False)
    assert "Conv" in caught.value.details["found"]
    assert not (tmp_path / "out").exists()


def test_a_kept_adapter_cannot_be_compared_in_bfloat16(tmp_path: Path, make_model: Make) -> None:
    """Refused before anything is traced, with the ways out."""
    folder = make_model(tmp_path / "m", "bert", num_hidden_layers=1)
    with pytest.raises(UnsupportedDType, match="adapters in the graph cannot be compared") as caught:
        export_onnx(folder, tmp_path / "out/model.onnx", adapters=[tmp_path / "a"], dtype="bfloat16")
    assert "--no-verify" in caught.value.details["next"]


def test_a_weight_beyond_the_range(tmp_path: Path, make_model: Make) -> None:
    """float16 ends at 65504; what is larger is an error that names the tensor, and nothing is written."""
    folder = make_model(tmp_path / "m", "bert", num_hidden_layers=1)
    tensors = load_file(folder / PAYLOAD)
    tensors["pooler.dense.bias"][3] = 1e6
    save_file(tensors, folder / PAYLOAD)
    with pytest.raises(NotFinite) as caught:
        export_onnx(folder, tmp_path / "out/model.onnx", dtype="float16", verify=False)
    assert "pooler.dense.bias" in caught.value.details["where"]
    assert not (tmp_path / "out").exists()
