from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from opened import opened_architecture

from formats import DType, open_checkpoint
from formats.errors import UnsupportedDType
from surgery.onnx.trace.architecture import build_module
from surgery.onnx.trace.template import build_template, order_nodes

pytestmark = pytest.mark.processor

Make = Callable[..., Path]

IN_ANOTHER_PROCESS = """
import sys
from surgery.operations.export.export_onnx import export_onnx
export_onnx(sys.argv[1], "model.onnx", verify=False)
"""


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_two_weight_sets_one_graph(twins: Callable[[str], Any], kind: str) -> None:
    """`cmp base.onnx merged.onnx` is silent; the payloads differ."""
    base, merged = twins(kind)
    assert base.onnx.read_bytes() == merged.onnx.read_bytes()
    assert base.report.graphs[0].sha256 == merged.report.graphs[0].sha256
    assert base.report.payload_blake3 != merged.report.payload_blake3


def test_another_process_another_folder(tmp_path: Path, bert: Any) -> None:
    """Neither hash seeds nor working folders nor the model's place leave a trace in the bytes; nor is anything said."""
    folder = shutil.copytree(bert.model, tmp_path / "there/and/deeper")
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(folder)],
        env={**os.environ, "PYTHONHASHSEED": "42", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=out,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""
    assert (out / "model.onnx").read_bytes() == bert.onnx.read_bytes()


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_weights_keep_the_checkpoints_names(twins: Callable[[str], Any], kind: str) -> None:
    """Initialisers outside the graph are the checkpoint's tensors by name; those inside are small constants."""
    exported = twins(kind)[0]
    model = onnx.load(exported.onnx, load_external_data=False)
    outside = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    with open_checkpoint(exported.model) as checkpoint:
        assert outside == set(checkpoint.specs)
    inside = [t for t in model.graph.initializer if t.name not in outside]
    assert all(re.fullmatch(r"constant_\d+", t.name) for t in inside)
    assert all(t.ByteSize() < 2000 for t in inside)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_nothing_says_how_the_graph_was_made(twins: Callable[[str], Any], kind: str) -> None:
    """No paths, traces or doc strings, and no metadata but what the graph depends on; axes are called what they are."""
    exported = twins(kind)[0]
    model = onnx.load(exported.onnx, load_external_data=False)
    text = str(model)
    assert not re.search(r"doc_string|\.py|site-packages|stack_trace|pkg\.|_hook|transformers", text)
    assert {entry.key for entry in model.metadata_props} == {"surgery.config", "surgery.ties"}
    assert str(exported.model.parent) not in text
    symbols = {d.dim_param for v in (*model.graph.input, *model.graph.output, *model.graph.value_info)
               for d in v.type.tensor_type.shape.dim if d.dim_param}  # fmt: skip
    assert symbols == {"batch", "sequence"}
    assert model.producer_name == "surgery"
    assert not model.producer_version


def test_nodes_are_named_after_their_modules(bert: Any) -> None:
    """A profile of the graph reads like the model."""
    model = onnx.load(bert.onnx, load_external_data=False)
    names = {node.name for node in model.graph.node}
    assert "encoder.layer.1.attention.self.query/MatMul" in names
    assert len(names) == len(model.graph.node)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_as_lean_as_the_exporters_own(bert: Any, tmp_path: Path) -> None:
    """Keeping the names costs no node: ONNX Runtime ends with as many as for torch's own optimised export."""
    import onnxruntime
    import torch

    architecture = opened_architecture(bert.model)
    ids = torch.ones(2, 8, dtype=torch.int64)
    names = [each.name for each in architecture.kind.programs[0].inputs]
    module = build_module(architecture, DType.F32)
    with torch.no_grad():  # torch's optimiser drops what is zero or there twice, and fresh memory may be either
        for parameter in module.parameters():
            parameter.normal_()
    torch.onnx.export(
        module,
        (),
        str(tmp_path / "theirs.onnx"),
        kwargs=dict.fromkeys(names, ids),
        dynamic_shapes={name: dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC) for name in names},
        dynamo=True,
        optimize=True,
        opset_version=20,
        verbose=False,
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(tmp_path / "theirs.onnx", options, providers=["CPUExecutionProvider"])
    theirs = len(onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node)
    assert bert.report.graphs[0].nodes_run == theirs


@pytest.mark.parametrize(("dtypes", "found"), [((DType.BF16,), "BF16"), ((DType.F32, DType.F16), "F16")])
def test_dtypes_that_onnxruntime_does_not_run(
    tmp_path: Path, make_model: Make, dtypes: tuple[DType, ...], found: str
) -> None:
    """bfloat16, and a mixture, are refused before anything is traced, saying what to do."""
    folder = make_model(tmp_path / "m", "bert")
    with open_checkpoint(folder) as checkpoint:
        specs = {
            name: replace(spec, dtype=dtypes[index % len(dtypes)])
            for index, (name, spec) in enumerate(checkpoint.specs.items())
        }
    with pytest.raises(UnsupportedDType) as caught:
        build_template(opened_architecture(folder), specs)
    assert found in caught.value.details["found"]
    assert "--dtype float32" in caught.value.details["next"]


@pytest.mark.parametrize("swapped", [False, True])
def test_nodes_stand_in_the_order_in_which_outputs_need_them(swapped: bool) -> None:
    """Whichever of two independent branches the tracer met first."""
    import onnx_ir as ir

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    branches = [[ir.node(kind, [x])] for kind in ("Sin", "Cos")]
    for branch in branches:
        branch.append(ir.node("Neg", [branch[0].outputs[0]]))
    total = ir.node("Add", [branch[1].outputs[0] for branch in branches])
    met = [node for branch in (branches[::-1] if swapped else branches) for node in branch]
    graph = ir.Graph([x], total.outputs, nodes=[*met, total], opset_imports={"": 20}, name="g")
    order_nodes(graph)
    assert [node.op_type for node in graph] == ["Sin", "Neg", "Cos", "Neg", "Add"]
