"""prove: the same program or not, and where two programs part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import Result
from onnx import helper

from formats.errors import CorruptFile, PathNotFound, UnsafeFile
from surgery.errors import ProviderUnavailable, Unsupported
from surgery.onnx.files.graph_file import load_graph
from surgery.onnx.run.runtime import zeros
from surgery.onnx.same_program.canonical import canonical
from surgery.onnx.same_program.cost import Executed, Operand, cost
from surgery.onnx.same_program.difference import first_difference
from surgery.operations.look.prove import prove

Change = Callable[[onnx.ModelProto], None]


def _initialisers(seed: int, width: int = 4) -> list[onnx.TensorProto]:
    rng = np.random.default_rng(seed)
    shapes = {"table": (10, width), "w1": (width, width), "b1": (width,), "w2": (width, width), "b2": (width,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays |= {"half": np.float32(0.5), "axes": np.array([1], np.int64)}
    arrays |= {"A": rng.standard_normal((width, 2)).astype(np.float32), "B": np.ones((2, width), np.float32)}
    return [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]


def _network(path: Path, seed: int = 0, change: Change | None = None) -> Path:
    """Embedding, two layers side by side, softmax: enough for order, sharing and attributes to matter."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"], "embed"),
        helper.make_node("MatMul", ["x", "w1"], ["left"], "left"),
        helper.make_node("MatMul", ["x", "w2"], ["right"], "right"),
        helper.make_node("Add", ["left", "b1"], ["left_b"], "left_bias"),
        helper.make_node("Add", ["right", "b2"], ["right_b"], "right_bias"),
        helper.make_node("Mul", ["left_b", "half"], ["scaled"], "scale"),
        helper.make_node("Sub", ["scaled", "right_b"], ["both"], "join"),
        helper.make_node("Softmax", ["both"], ["y"], "softmax", axis=-1),
    ]
    given = helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", "sequence"])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", "sequence", 4])
    graph = helper.make_graph(nodes, "g", [given], [out], _initialisers(seed))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if change is not None:
        change(model)
    used = {name for node in model.graph.node for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)
    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path)
    return path


def _node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def _insert(model: onnx.ModelProto, after: str, nodes: Sequence[onnx.NodeProto]) -> None:
    at = [node.name for node in model.graph.node].index(after) + 1
    every = [*model.graph.node[:at], *nodes, *model.graph.node[at:]]
    del model.graph.node[:]
    model.graph.node.extend(every)


def _op(model: onnx.ModelProto) -> None:
    _node(model, "join").op_type = "Add"


def _attribute(model: onnx.ModelProto) -> None:
    _node(model, "softmax").attribute[0].i = 1


def _wiring(model: onnx.ModelProto) -> None:
    _node(model, "right").input[0] = "left_b"  # b after a instead of beside it
    names = ["embed", "left", "left_bias", "right", "right_bias", "scale", "join", "softmax"]
    every = [_node(model, name) for name in names]
    del model.graph.node[:]
    model.graph.node.extend(every)


def _shared(model: onnx.ModelProto) -> None:
    _node(model, "right").input[1] = "w1"


def _constant(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "half")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(0.25), "half"))


def _branch(model: onnx.ModelProto) -> None:
    """LoRA left as a branch of the left layer."""
    down = helper.make_node("MatMul", ["x", "A"], ["down"], "lora_A")
    up = helper.make_node("MatMul", ["down", "B"], ["up"], "lora_B")
    _insert(model, "left", [down, up, helper.make_node("Add", ["left", "up"], ["left_l"], "lora")])
    _node(model, "left_bias").input[0] = "left_l"


def _renamed(model: onnx.ModelProto) -> None:
    """Other names for nodes, values, weights and axes; independent nodes in another order; a Constant node."""
    nodes = list(model.graph.node)
    nodes[1:5] = [nodes[2], nodes[4], nodes[1], nodes[3]]
    for at, node in enumerate(nodes):
        node.name = f"n{at}"
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = name if name in ("input_ids", "y") else f"v_{name}"
    for tensor in model.graph.initializer:
        tensor.name = f"v_{tensor.name}"
    half = next(tensor for tensor in model.graph.initializer if tensor.name == "v_half")
    model.graph.initializer.remove(half)
    nodes.insert(0, helper.make_node("Constant", [], ["v_half"], "c", value=half))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = f"s_{dim.dim_param}"


def _difference(tmp_path: Path, change: Change) -> Any:
    a, b = _network(tmp_path / "a.onnx"), _network(tmp_path / "b.onnx", 1, change)
    return first_difference(canonical(load_graph(a), a), canonical(load_graph(b), b))


def test_exports_of_base_and_merged_are_identical_bytes(
    twins: Callable[[str], Any], cli: Callable[..., Result]
) -> None:
    """Our own exports of two models of one class: the same bytes, and the same at every level after that."""
    base, merged = twins("bert")
    result = cli("prove", base.onnx, merged.onnx)
    assert result.exit_code == 0, result.output
    assert "identical, byte for byte" in result.output
    report = prove(base.onnx, merged.onnx, shape=(2, 16))
    assert (report.level, report.same, report.difference) == ("bytes", True, None)
    assert [check.name for check in report.checks] == ["bytes", "graph", "optimised graph", "assignment", "cost"]
    assert report.nodes_a == report.nodes_b
    assert report.nodes_a[1] < report.nodes_a[0]
    assert report.cost_a == report.cost_b
    assert report.cost_a.uncounted == ()
    # two layers: query, key, value, output and the block's two; scores and their product with the values; the pooler
    products = 2 * (2 * 2 * 16 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 2 * 2 * 16 * 16 * 32) + 2 * 2 * 32 * 32
    ops = [op for op in report.cost_a.by_op if op.endswith(("MatMul", "Gemm"))]
    assert sum(report.cost_a.by_op[op].flops for op in ops) - products in (0, 2 * 32)  # with its bias, or without


def test_names_order_and_numbers_do_not_matter(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Renamed and reordered: canonically equal, before and after optimisation, though the bytes differ."""
    a, b = _network(tmp_path / "a.onnx"), _network(tmp_path / "b.onnx", 1, _renamed)
    report = prove(a, b)
    assert (report.level, report.same, report.checks[0].same) == ("graph", True, False)
    assert cli("prove", a, b).exit_code == 0


@pytest.mark.parametrize(
    ("change", "what", "ours", "theirs"),
    [
        (_op, "node 6", "Sub (join)", "Add (join)"),
        (_attribute, "attribute axis of Softmax (node 7, softmax)", "-1", "1"),
        (_wiring, "input 0 of MatMul (node 4, right)", "output 0 of Gather (embed)", "output 0 of Add (left_bias)"),
        (_shared, "input 1 of MatMul (node 4, right)", "weight w2 float[4,4]", "weight w1 float[4,4]"),
        (_constant, "input 1 of Mul (node 3, scale)", "constant float[] 0.5", "constant float[] 0.25"),
        (_branch, "node 2", "Add (left_bias)", "MatMul (lora_A)"),
    ],
)
def test_the_first_difference_is_named(
    tmp_path: Path, cli: Callable[..., Result], change: Change, what: str, ours: str, theirs: str
) -> None:
    """By op, attribute, wiring, sharing, constant and added branch: which node, and what stands there in either."""
    a, b = _network(tmp_path / "a.onnx"), _network(tmp_path / "b.onnx", 1, change)
    result = cli("prove", a, b)
    assert result.exit_code == 3, result.output
    assert "not the same program" in result.output
    found = _difference(tmp_path, change)
    assert found is not None
    assert found.what == what
    assert found.a.startswith(ours)
    assert found.b.startswith(theirs)
    assert f"first difference, graph: {what}" in result.output


def test_a_branch_costs_more(tmp_path: Path, cli_json: Callable[..., dict[str, Any]]) -> None:
    """FLOPs and bytes by hand: two thin products and an addition more."""
    a, b = _network(tmp_path / "a.onnx"), _network(tmp_path / "b.onnx", 0, _branch)
    report = cli_json("prove", a, a, "--shape", "3x5")
    assert (report["same"], report["level"], report["cost_a"]["uncounted"]) == (True, "bytes", [])
    found = prove(a, b, shape=(3, 5))
    plain, branched = found.cost_a, found.cost_b
    tokens = 3 * 5
    assert plain.by_op["MatMul"].flops == 2 * 2 * tokens * 4 * 4
    assert plain.by_op["MatMul"].nbytes == 2 * 4 * (2 * tokens * 4 + 4 * 4)
    assert plain.by_op["Gather"].flops == 0
    assert branched.flops - plain.flops == 2 * 2 * tokens * 4 * 2 + tokens * 4
    assert not plain.uncounted


def test_what_lies_outside_is_payload_all_the_same(tmp_path: Path) -> None:
    """Weights in the graph in one file and beside it in the other: the same program."""
    a, b = _network(tmp_path / "a.onnx"), _network(tmp_path / "b.onnx", 1)
    model = onnx.load(b)
    (tmp_path / "out").mkdir()
    onnx.save(model, tmp_path / "out" / "b.onnx", save_as_external_data=True, location="b.data", size_threshold=0)
    report = prove(a, tmp_path / "out" / "b.onnx")
    assert (report.level, report.difference) == ("graph", None)


def _with_if(path: Path, low: str, high: str) -> Path:
    """A graph whose branches capture values from around them."""
    branches = {}
    for name, op in (("then_branch", low), ("else_branch", high)):
        inner = helper.make_node(op, ["twice"], [f"{name}_y"])
        out = helper.make_tensor_value_info(f"{name}_y", onnx.TensorProto.FLOAT, [2])
        branches[name] = helper.make_graph([inner], name, [], [out])
    nodes = [
        helper.make_node("Add", ["x", "x"], ["twice"], "twice"),
        helper.make_node("If", ["flag"], ["y"], "choose", **branches),
    ]
    inputs = [
        helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2]),
    ]
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    graph = helper.make_graph(nodes, "g", inputs, [out])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_subgraphs_are_compared_too(tmp_path: Path) -> None:
    """A difference within a branch is found there; of a run, the branch that was taken is counted."""
    a, b = _with_if(tmp_path / "a.onnx", "Neg", "Abs"), _with_if(tmp_path / "b.onnx", "Neg", "Exp")
    assert prove(a, a).level == "bytes"
    report = prove(a, b)
    assert report.difference is not None
    assert report.difference.difference is not None
    assert report.difference.difference.what == "node 0, in else_branch of If (node 1, choose)"
    assert report.cost_a.by_op["If"].flops == 0
    assert report.cost_a.uncounted == ()


def test_cost_rules() -> None:
    """Products by hand: convolution in groups, transposed operands, attention; the rest by its largest operand."""

    def count(op: str, inputs: Sequence[tuple[int, ...]], *outputs: tuple[int, ...]) -> int:
        operands = [tuple(Operand(shape, 4) for shape in side) for side in (inputs, outputs)]
        return cost([Executed(op, "cpu", *operands)]).flops

    assert count("MatMul", [(2, 3, 4), (4, 5)], (2, 3, 5)) == 2 * 2 * 3 * 4 * 5
    assert count("FusedMatMul", [(2, 4, 3), (2, 4, 5)], (2, 3, 5)) == 2 * 2 * 3 * 4 * 5
    assert count("Gemm", [(3, 4), (4, 5), (5,)], (3, 5)) == 2 * 3 * 4 * 5 + 15
    assert count("Conv", [(1, 4, 8, 8), (6, 2, 3, 3), (6,)], (1, 6, 6, 6)) == 6 * 36 * (2 * 18 + 1)
    assert count("ConvTranspose", [(1, 4, 5, 5), (4, 6, 2, 2)], (1, 6, 6, 6)) == 2 * 100 * 24
    assert count("MultiHeadAttention", [(1, 7, 8), (1, 9, 8), (1, 9, 8)], (1, 7, 8)) == 4 * 7 * 9 * 8
    assert count("MultiHeadAttention", [(1, 7, 2, 3, 4), (24,)], (1, 7, 8)) == 4 * 7 * 7 * 8
    assert count("Attention", [(1, 2, 7, 4), (1, 2, 9, 4), (1, 2, 9, 4)], (1, 2, 7, 4)) == 4 * 2 * 7 * 9 * 4
    assert count("Attention", [(1, 7, 8), (8, 24), (24,)], (1, 7, 8)) == 2 * 7 * 8 * 24 + 4 * 7 * 8 * 7
    assert count("GroupQueryAttention", [(1, 7, 16)], (1, 7, 8), (1, 1, 9, 4)) == 4 * 7 * 8 * 9
    assert count("LayerNormalization", [(2, 8), (8,)], (2, 8)) == 16
    assert count("ReduceSum", [(2, 8)], (2,)) == 16
    assert count("Transpose", [(2, 8)], (8, 2)) == 0
    assert cost([Executed("Einsum", "cpu", (), ())]).uncounted == ("Einsum",)


def test_a_graph_that_does_not_run_at_the_shape(tmp_path: Path) -> None:
    """Compared all the same; that its cost is not counted is said."""

    def fixed(model: onnx.ModelProto) -> None:
        axes = next(each for each in model.graph.initializer if each.name == "axes")
        axes.CopyFrom(onnx.numpy_helper.from_array(np.array([20, 4], np.int64), "axes"))
        _insert(model, "softmax", [helper.make_node("Reshape", ["y", "axes"], ["z"], "reshape")])
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [20, 4]))

    a, b = _network(tmp_path / "a.onnx", 0, fixed), _network(tmp_path / "b.onnx", 1, fixed)
    assert prove(a, b, shape=(4, 5)).notes == ()
    report = prove(a, b, shape=(4, 6))
    assert (report.level, report.cost_a.flops) == ("graph", 0)
    assert len(report.notes) == 2
    assert "does not run at this shape" in report.notes[0]


def test_lengths_of_axes(tmp_path: Path) -> None:
    """Batch first, sequence elsewhere, sums by their parts, fixed ones as they are."""
    axes: dict[str, list[int | str | None]] = {
        "ids": ["batch", "sequence"],
        "mask": ["batch", "past + sequence"],
        "key": ["batch", 2, "past", 4],
        "one": [None],
    }
    inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in axes.items()]
    model = helper.make_model(helper.make_graph([], "g", inputs, []))
    found = {name: array.shape for name, array in zeros(model, (3, 5)).items()}
    assert found == {"ids": (3, 5), "mask": (3, 10), "key": (3, 2, 5, 4), "one": (3,)}


def test_bad_input(tmp_path: Path) -> None:
    """Missing, no graph, a circle, a value from nowhere, weights elsewhere, no such provider, no such shape."""
    model = _network(tmp_path / "a.onnx")
    with pytest.raises(PathNotFound):
        prove(model, tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("not a graph at all")
    with pytest.raises(CorruptFile):
        prove(model, tmp_path / "text.onnx")

    def circle(model: onnx.ModelProto) -> None:
        _node(model, "embed").input[0] = "both"

    def nowhere(model: onnx.ModelProto) -> None:
        _node(model, "embed").input[0] = "nothing"

    for at, (change, message) in enumerate(((circle, "computed from itself"), (nowhere, "nothing in the graph"))):
        with pytest.raises(CorruptFile, match=message):
            _difference(tmp_path / str(at), change)

    def elsewhere(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "axes")
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../axes")
        _insert(model, "join", [helper.make_node("Unsqueeze", ["both", "axes"], ["more"], "more")])
        model.graph.output.append(helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, None))

    (tmp_path / "e").mkdir()
    with pytest.raises(UnsafeFile):
        prove(model, _network(tmp_path / "e" / "a.onnx", 0, elsewhere))
    with pytest.raises(ProviderUnavailable):
        prove(model, model, provider="nonsense")
    with pytest.raises(Unsupported):
        prove(model, model, shape=(0, 4))


def test_an_opset_that_the_runtime_lacks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One error that says what to do, and ONNX Runtime says nothing beside it."""

    def future(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = 99

    with pytest.raises(Unsupported, match="does not load this graph") as caught:
        prove(_network(tmp_path / "a.onnx"), _network(tmp_path / "b.onnx", 1, future))
    assert "opset" in caught.value.details["next"]
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_a_provider_that_would_fall_back_is_an_error(tmp_path: Path, no_cuda: None) -> None:
    """ONNX Runtime runs a CUDA session on the CPU without a word; a proof of that would prove nothing."""
    model = _network(tmp_path / "a.onnx")
    with pytest.raises(ProviderUnavailable):
        prove(model, model, provider="cuda")


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the GPUs there may be."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
