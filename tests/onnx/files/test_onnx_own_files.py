"""An export into the model's own folder: the graph alone, over the files that are there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from formats.errors import CorruptFile, OutputExists
from surgery.onnx.files.payload import PAYLOAD
from surgery.operations.export.export_onnx import export_onnx
from surgery.operations.export.into_template import reweigh
from surgery.operations.look.prove import prove

SHARDS, TORCH, RECEIPT = "shards", "torch", "receipt"


@pytest.fixture
def folder(tmp_path: Path, twins: Callable[[str], Any]) -> Callable[[str], Path]:
    """The second BERT in a folder of its own: as shards, as a torch file, or with metadata as merge writes it."""

    def make(kind: str) -> Path:
        source, made = twins("bert")[1].model, tmp_path / kind
        if kind == SHARDS:
            transformers.BertModel.from_pretrained(source).save_pretrained(made, max_shard_size="20KB")
            return made
        shutil.copytree(source, made)
        tensors = load_file(made / PAYLOAD)
        if kind == TORCH:
            (made / PAYLOAD).unlink()
            torch.save(tensors, made / "pytorch_model.bin")
        else:
            save_file(tensors, made / PAYLOAD, metadata={"surgery.receipt": "x" * 999})
        return made

    return make


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _run(load: Callable[[Path], Any], graph: Path) -> Any:
    ids = np.arange(12).reshape(2, 6)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return load(graph).run(None, feed)[0]


@pytest.mark.parametrize("kind", [SHARDS, TORCH, RECEIPT])
def test_the_graph_alone_is_written(
    folder: Callable[[str], Path], twins: Callable[[str], Any], loads_silently: Callable[[Path], Any], kind: str
) -> None:
    """Whatever the files: none is touched, none is added; the runtime finds the weights in them; the program is that
    of the other exports."""
    base, copied = twins("bert")
    model = folder(kind)
    before = _files(model)
    report = export_onnx(model, model / "model.onnx", graph=base.onnx)
    after = _files(model)
    assert set(after) == {*before, "model.onnx"}
    assert {name: after[name] for name in before} == before
    assert (report.payload_blake3, report.payload) == (None, str(model))
    assert report.ledger["copied"] == 39
    onnx.checker.check_model(str(model / "model.onnx"), full_check=True)
    assert np.array_equal(_run(loads_silently, model / "model.onnx"), _run(loads_silently, copied.onnx))
    assert prove(base.onnx, model / "model.onnx", shape=(2, 8)).level == "graph"


def test_a_trace_is_compared_with_torch(folder: Callable[[str], Path]) -> None:
    """Over several files, too."""
    model = folder(SHARDS)
    report = export_onnx(model, model / "model.onnx")
    assert report.max_rel_error is not None
    assert report.tolerance is not None
    assert report.max_rel_error < report.tolerance


def test_a_canonical_file_gives_identical_bytes(tmp_path: Path, twins: Callable[[str], Any]) -> None:
    """What transformers saves has the payload's layout, so the graph is the other export's."""
    base, copied = twins("bert")
    model = shutil.copytree(copied.model, tmp_path / "model")
    export_onnx(model, model / "model.onnx", graph=base.onnx)
    assert (model / "model.onnx").read_bytes() == copied.onnx.read_bytes()


def test_its_graph_serves_other_exports(
    tmp_path: Path, folder: Callable[[str], Path], twins: Callable[[str], Any]
) -> None:
    """A graph is pointed at the weights it is put over, wherever it found its own."""
    base, copied = twins("bert")
    model = folder(RECEIPT)
    export_onnx(model, model / "model.onnx", graph=base.onnx)
    export_onnx(model, tmp_path / "out/model.onnx", graph=model / "model.onnx")
    assert (tmp_path / "out/model.onnx").read_bytes() == copied.onnx.read_bytes()
    reweigh(model / "model.onnx", base.model, tmp_path / "back/model.onnx", base=model)
    assert prove(base.onnx, tmp_path / "back/model.onnx", shape=(2, 8)).level == "graph"


def test_again(folder: Callable[[str], Path], twins: Callable[[str], Any]) -> None:
    """A graph that is there is replaced by --force alone; it is no part of the model, so that may be."""
    model, graph = folder(RECEIPT), twins("bert")[0].onnx
    export_onnx(model, model / "model.onnx", graph=graph)
    with pytest.raises(OutputExists):
        export_onnx(model, model / "model.onnx", graph=graph)
    export_onnx(model, model / "model.onnx", graph=graph, force=True)


def test_a_weight_file_alone(folder: Callable[[str], Path], twins: Callable[[str], Any]) -> None:
    """The graph may lie beside a file that is no folder's, whatever its name."""
    model = folder(RECEIPT)
    (model / PAYLOAD).rename(model / "mine.st")
    export_onnx(model / "mine.st", model / "mine.onnx", graph=twins("bert")[0].onnx)
    graph = onnx.load(model / "mine.onnx", load_external_data=False)
    places = {entry.value for tensor in graph.graph.initializer for entry in tensor.external_data[:1]}
    assert "mine.st" in places
    assert PAYLOAD not in places


@pytest.mark.parametrize("which", ["another dtype", "symbolic link", "hard link", "scattered"])
def test_weights_that_cannot_serve(
    tmp_path: Path, folder: Callable[[str], Path], twins: Callable[[str], Any], which: str
) -> None:
    """They are not ours to replace, --force or not; the error names the first, and nothing is written."""
    model, half = folder(TORCH if which == "scattered" else RECEIPT), tmp_path / "half/model.onnx"
    kept = tmp_path / "kept.safetensors"
    graph, dtype = twins("bert")[0].onnx, None
    found = "a link"
    if which == "another dtype":
        export_onnx(model, half, dtype="float16", verify=False)
        graph, dtype, found = half, "float16", "F32, where the graph takes F16"
    elif which == "symbolic link":
        (model / PAYLOAD).rename(kept)
        (model / PAYLOAD).symlink_to(kept)
    elif which == "hard link":
        os.link(model / PAYLOAD, kept)
    else:
        tensors = torch.load(model / "pytorch_model.bin", weights_only=True)
        name = "encoder.layer.1.output.dense.weight"
        tensors[name] = tensors[name].T.contiguous().T
        torch.save(tensors, model / "pytorch_model.bin")
        found = name
    before = _files(model)
    with pytest.raises(OutputExists, match="own folder") as caught:
        export_onnx(model, model / "model.onnx", graph=graph, dtype=dtype, force=True)
    assert found in str(caught.value.details["found"])
    assert _files(model) == before


def test_weights_that_were_written_anew(folder: Callable[[str], Path], twins: Callable[[str], Any]) -> None:
    """A longer header moves every weight; a runtime would take whatever lies at the old places."""
    base, model = twins("bert")[0], folder(RECEIPT)
    export_onnx(model, model / "model.onnx", graph=base.onnx)
    save_file(load_file(model / PAYLOAD), model / PAYLOAD, metadata={"surgery.receipt": "x" * 5000})
    with pytest.raises(CorruptFile, match="have been rewritten") as caught:
        prove(base.onnx, model / "model.onnx")
    assert "export the graph again" in caught.value.details["next"]
    export_onnx(model, model / "model.onnx", graph=model / "model.onnx", force=True)
    assert prove(base.onnx, model / "model.onnx", shape=(2, 8)).level == "graph"
