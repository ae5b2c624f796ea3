"""--dtype: the graph computes in another dtype than the weights are stored in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.errors import UnsupportedDType
from surgery.errors import NotFinite
from surgery.onnx.payload import PAYLOAD
from surgery.operations.export_onnx import export_onnx

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
    """Refused as they are, saying which ways there are; exact in float32; bfloat16 for other providers, unchecked."""
    folder = make_model(tmp_path / "m", "bert", dtype="bfloat16", num_hidden_layers=1)
    with pytest.raises(UnsupportedDType) as caught:
        export_onnx(folder, tmp_path / "out/model.onnx")
    assert "--dtype bfloat16 --no-verify" in caught.value.details["next"]
    wide = export_onnx(folder, tmp_path / "wide/model.onnx", dtype="float32", verify=False)
    written, stored = load_file(wide.payload), load_file(folder / PAYLOAD)
    assert all(torch.equal(written[name], tensor.float()) for name, tensor in stored.items())
    with pytest.raises(UnsupportedDType, match="cannot be compared"):
        export_onnx(folder, tmp_path / "out/model.onnx", dtype="bfloat16")
    narrow = export_onnx(folder, tmp_path / "narrow/model.onnx", dtype="bfloat16", verify=False)
    assert narrow.dtype == "BF16"
    onnx.checker.check_model(narrow.graphs[0].path)
    assert "not compared with torch" in narrow.notes


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
