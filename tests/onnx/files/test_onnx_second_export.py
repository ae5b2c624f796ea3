"""An export onto a graph that is there already."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors.torch import load_file, save_file

from formats.errors import CorruptFile, FormatError, PathNotFound, ShapeMismatch, UnsupportedDType
from surgery.errors import MissingTensors, ReportedError, Unsupported
from surgery.onnx.files.payload import PAYLOAD
from surgery.operations.export.export_onnx import export_onnx

Make = Callable[..., Path]

WITHOUT_TORCH = """
import sys
from surgery.cli import main
try: main(["export-onnx", *sys.argv[1:]])
except SystemExit as end: assert not end.code, end.code
heavy = [name for name in ("torch", "transformers", "onnxscript", "onnxruntime") if name in sys.modules]
assert not heavy, heavy
"""


@pytest.fixture
def merged(tmp_path: Path, twins: Callable[[str], Any]) -> Path:
    """A copy of the second BERT's folder."""
    return shutil.copytree(twins("bert")[1].model, tmp_path / "merged")


def test_the_same_files_without_torch(tmp_path: Path, twins: Callable[[str], Any], merged: Path) -> None:
    """What tracing makes, byte for byte, by a process that loads neither torch nor a runtime."""
    base, traced = twins("bert")
    out = tmp_path / "out" / "model.onnx"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(merged), "--graph", str(base.onnx), "-o", str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == traced.onnx.read_bytes()
    assert (out.parent / PAYLOAD).read_bytes() == (traced.onnx.parent / PAYLOAD).read_bytes()


def test_the_report_says_that_nothing_was_traced(tmp_path: Path, twins: Callable[[str], Any], merged: Path) -> None:
    """Same hashes as a traced export; nothing was compared with torch, and nothing had to be."""
    base, traced = twins("bert")
    report = export_onnx(merged, tmp_path / "out/model.onnx", graph=base.onnx)
    assert (report.traced, traced.report.traced) == (False, True)
    assert report.payload_blake3 == traced.report.payload_blake3
    assert report.graphs[0].sha256 == traced.report.graphs[0].sha256
    assert report.graphs[0].inputs == traced.report.graphs[0].inputs
    assert report.model_class == "BertModel"
    assert report.max_rel_error is None
    assert report.notes == ()


def test_verify_runs_it_all_the_same(tmp_path: Path, twins: Callable[[str], Any], merged: Path) -> None:
    """On demand the graph over the new weights is compared with torch."""
    report = export_onnx(merged, tmp_path / "out/model.onnx", graph=twins("bert")[0].onnx, verify=True)
    assert report.max_rel_error is not None
    assert report.tolerance is not None
    assert 0 < report.max_rel_error < report.tolerance
    assert report.graphs[0].nodes_run == twins("bert")[0].report.graphs[0].nodes_run


def test_into_its_own_place(tmp_path: Path, twins: Callable[[str], Any], merged: Path) -> None:
    """The graph that is given may be the one that stands at the output: then only the weights are exchanged."""
    folder = shutil.copytree(twins("bert")[0].onnx.parent, tmp_path / "out")
    export_onnx(merged, folder / "model.onnx", graph=folder / "model.onnx", force=True)
    assert (folder / PAYLOAD).read_bytes() == (twins("bert")[1].onnx.parent / PAYLOAD).read_bytes()


def test_a_file_of_weights_alone(tmp_path: Path, twins: Callable[[str], Any], merged: Path) -> None:
    """It will do, since the graph says the rest; the report says what could not be compared."""
    report = export_onnx(merged / PAYLOAD, tmp_path / "out/model.onnx", graph=twins("bert")[0].onnx)
    assert report.payload_blake3 == twins("bert")[1].report.payload_blake3
    assert "only names, dtypes and shapes" in report.notes[0]


def _change(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / PAYLOAD)
    change(tensors)
    save_file(tensors, folder / PAYLOAD)


NAME = "encoder.layer.0.output.dense.weight"  # (32, 64)
BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Any]], object], type[ReportedError]]] = {
    "missing": (lambda tensors: tensors.pop(NAME), MissingTensors),
    "shape": (lambda tensors: tensors.update({NAME: tensors[NAME].T.contiguous()}), ShapeMismatch),
    "dtype": (lambda tensors: tensors.update({NAME: tensors[NAME].half()}), UnsupportedDType),
}


@pytest.mark.parametrize("which", BAD_TENSORS)
def test_weights_that_do_not_fit(tmp_path: Path, twins: Callable[[str], Any], merged: Path, which: str) -> None:
    """Each difference is an error that names the tensor and the way out, and nothing is written."""
    change, kind = BAD_TENSORS[which]
    _change(merged, change)
    with pytest.raises(kind) as caught:
        export_onnx(merged, tmp_path / "out/model.onnx", graph=twins("bert")[0].onnx)
    assert NAME in str(caught.value)
    assert "omit --graph" in caught.value.details["next"]
    assert not (tmp_path / "out").exists()


def test_another_models_weights(tmp_path: Path, twins: Callable[[str], Any]) -> None:
    """A GPT-2 under a BERT's graph."""
    with pytest.raises(MissingTensors, match="the graph needs tensors"):
        export_onnx(twins("gpt2")[0].model, tmp_path / "out/model.onnx", graph=twins("bert")[0].onnx)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"num_attention_heads": 8, "hidden_act": "relu"}, True),
        ({"id2label": {"0": "good"}, "transformers_version": "4.0", "hidden_dropout_prob": 0.5}, False),
    ],
)
def test_config_counts_where_it_changes_the_graph(
    tmp_path: Path, twins: Callable[[str], Any], merged: Path, changes: dict[str, Any], refused: bool
) -> None:
    """Names and shapes do not tell four heads from eight; config.json does. Labels and dropout change nothing."""
    config = merged / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    if not refused:
        export_onnx(merged, tmp_path / "out/model.onnx", graph=twins("bert")[0].onnx)
        return
    with pytest.raises(Unsupported) as caught:
        export_onnx(merged, tmp_path / "out/model.onnx", graph=twins("bert")[0].onnx)
    assert caught.value.details["found"] == 'hidden_act: "gelu", "relu"; num_attention_heads: 4, 8'


def test_a_tie_that_the_weights_broke(tmp_path: Path, twins: Callable[[str], Any]) -> None:
    """A head of its own has no place in a graph whose head is the embedding; one that equals it needs none."""
    base, other = twins("gpt2")
    folder = shutil.copytree(other.model, tmp_path / "merged")
    _change(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    report = export_onnx(folder, tmp_path / "equal/model.onnx", graph=base.onnx)
    assert report.unused == ("lm_head.weight",)
    _change(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(Unsupported, match="ties two tensors"):
        export_onnx(folder, tmp_path / "out/model.onnx", graph=base.onnx)


@pytest.mark.parametrize("which", ["missing", "no onnx", "somebody else's"])
def test_graphs_that_will_not_do(tmp_path: Path, twins: Callable[[str], Any], merged: Path, which: str) -> None:
    """No file, no ONNX, or no graph of ours."""
    path = tmp_path / "graph.onnx"
    expected: type[FormatError] | type[ReportedError] = CorruptFile
    if which == "missing":
        expected = PathNotFound
    elif which == "no onnx":
        path.write_text("neither")
    else:
        model = onnx.load(twins("bert")[0].onnx, load_external_data=False)
        model.producer_name = "pytorch"
        path.write_bytes(model.SerializeToString())
        expected = Unsupported
    with pytest.raises(expected):
        export_onnx(merged, tmp_path / "out/model.onnx", graph=path)
    assert not (tmp_path / "out").exists()


def test_another_dtype_by_conversion(tmp_path: Path, make_model: Make, merged: Path) -> None:
    """Under a float16 graph float32 weights go with --dtype float16 only; the report's dtype is the graph's."""
    half = export_onnx(merged, tmp_path / "half/model.onnx", dtype="float16", verify=False)
    with pytest.raises(UnsupportedDType, match="another dtype"):
        export_onnx(merged, tmp_path / "out/model.onnx", graph=half.graphs[0].path)
    report = export_onnx(merged, tmp_path / "out/model.onnx", graph=half.graphs[0].path, dtype="float16")
    assert report.payload_blake3 == half.payload_blake3
    assert json.loads((merged / "config.json").read_text())["dtype"] == "float32"
    assert report.dtype == "F16"
