"""How a weight of a graph is found to be made of the base's tensors, and what is refused: hand-made graphs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file

from formats.errors import CorruptFile, Quantised, ShapeMismatch, UnsafeFile
from surgery.errors import MissingTensors, NothingToDo, TemplateMismatch, Unsupported
from surgery.onnx.files.graph_file import load_graph, payload
from surgery.operations.export.into_template import reweigh
from surgery.operations.look.prove import prove


def _graph(path: Path, weights: dict[str, Any], nodes: list[onnx.NodeProto], width: int = 4) -> Path:
    """A graph over x (n, width) whose initialisers are these arrays."""
    given = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", width])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", [given], [out], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def _tensors(seed: int, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name.replace("_", ".", 1): torch.randn(shape) for name, shape in shapes.items()}


def _saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


def _chain(*products: str) -> list[onnx.NodeProto]:
    """x times one initialiser after the other."""
    names = ["x", *(f"t{index}" for index in range(1, len(products))), "y"]
    return [helper.make_node("MatMul", [names[i], w], [names[i + 1]], f"n{i}") for i, w in enumerate(products)]


def _values(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    model = load_graph(path)
    return {
        tensor.name: payload(tensor, path).view(np.float32).reshape(tensor.dims) for tensor in model.graph.initializer
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_recipes(tmp_path: Path, dtype: torch.dtype) -> None:
    """As it is, transposed, rows below rows, columns beside columns, fused biases; from bfloat16 and float16, cast."""
    shapes = {"a_w": (4, 4), "b_w": (4, 4), "q_w": (4, 4), "k_w": (2, 4), "v_w": (2, 4), "q_b": (4,), "k_b": (2,)}
    base, merged = ({k: t.to(dtype) for k, t in _tensors(seed, **shapes).items()} for seed in (0, 1))

    def weights(of: dict[str, torch.Tensor]) -> dict[str, Any]:
        wide = {name: tensor.float().numpy() for name, tensor in of.items()}
        fused = np.concatenate([wide["q.w"], wide["k.w"], wide["v.w"]])  # (8, 4)
        bias = np.concatenate([wide["q.b"], wide["k.b"]])
        return {"val_0": wide["a.w"], "val_1": wide["b.w"].T, "rows": fused, "columns": fused.T, "bias": bias}

    nodes = _chain("val_0", "val_1", "columns", "rows")
    nodes[-1].output[0] = "t4"
    nodes.append(helper.make_node("Concat", ["bias", "bias"], ["twice"], "twice", axis=0))
    nodes.append(helper.make_node("ReduceSum", ["twice"], ["sum"], "sum", keepdims=0))
    nodes.append(helper.make_node("Add", ["t4", "sum"], ["y"], "end"))
    template = _graph(tmp_path / "t.onnx", weights(base), nodes)
    paths = [_saved(tmp_path / f"{name}.st", of) for name, of in (("base", base), ("merged", merged))]
    report = reweigh(template, paths[1], tmp_path / "out.onnx", base=paths[0])
    assert dict(report.recipes) == {
        "val_0": "a.w", "val_1": "b.wᵀ", "rows": "[q.w; k.w; v.w]", "columns": "[q.w; k.w; v.w]ᵀ", "bias": "[q.b; k.b]"
    }  # fmt: skip
    for name, expected in weights(merged).items():
        assert np.array_equal(_values(tmp_path / "out.onnx")[name], expected), name
    assert prove(template, tmp_path / "out.onnx").level == "graph"


def test_a_graph_in_half_precision(tmp_path: Path) -> None:
    """A float16 graph of a float32 base: its weights are the base's, rounded, and so are the merged ones."""
    base, merged = (_tensors(seed, a_w=(4, 4)) for seed in (0, 1))
    paths = [_saved(tmp_path / f"{name}.st", of) for name, of in (("base", base), ("merged", merged))]
    template = _graph(tmp_path / "t.onnx", {"val": base["a.w"].T.half().numpy()}, _chain("val"))
    reweigh(template, paths[1], tmp_path / "out.onnx", base=paths[0])
    found = numpy_helper.to_array(load_graph(tmp_path / "out.onnx").graph.initializer[0])
    assert np.array_equal(found, merged["a.w"].T.half().numpy())


def test_weights_in_nodes_and_branches(tmp_path: Path) -> None:
    """A Constant node's weight and one inside a branch are weights like any other."""
    base, merged = (_tensors(seed, a_w=(4, 4), b_w=(4, 4)) for seed in (0, 1))
    paths = [_saved(tmp_path / f"{name}.st", of) for name, of in (("base", base), ("merged", merged))]
    held = numpy_helper.from_array(base["a.w"].numpy(), "inner")
    inner = helper.make_node("MatMul", ["t", "branch"], ["z"], "in_branch")
    out = helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None)
    branch = helper.make_graph(
        [inner], "b", [], [out], [numpy_helper.from_array(base["b.w"].T.numpy().copy(), "branch")]
    )
    nodes = [
        helper.make_node("Constant", [], ["w"], "w", value=held),
        helper.make_node("MatMul", ["x", "w"], ["t"], "m"),
        helper.make_node("If", ["yes"], ["y"], "if", then_branch=branch, else_branch=branch),
    ]
    template = _graph(tmp_path / "t.onnx", {"yes": np.array(True)}, nodes)
    report = reweigh(template, paths[1], tmp_path / "out.onnx", base=paths[0])
    assert dict(report.recipes) == {"w": "a.w", "branch": "b.wᵀ"}
    x = np.ones((2, 4), np.float32)
    found = onnxruntime.InferenceSession(str(tmp_path / "out.onnx")).run(None, {"x": x})[0]
    assert np.allclose(found, x @ merged["a.w"].numpy() @ merged["b.w"].numpy().T, atol=1e-5)


def test_shapes_alone_prove_nothing(tmp_path: Path) -> None:
    """A weight with the base's shape and other values is refused by name, and so is a large one of no shape of its."""
    base, merged = (_saved(tmp_path / f"{seed}.st", _tensors(seed, a_w=(4, 4), b_w=(4, 4))) for seed in (0, 1))
    own = {name: tensor.numpy() for name, tensor in load_file(base).items()}
    stranger = np.full((4, 4), 0.5, np.float32)
    template = _graph(tmp_path / "t.onnx", {"m": own["a.w"], "strange": stranger}, _chain("m", "strange"))
    with pytest.raises(TemplateMismatch, match=r"strange F32\[4, 4\]: has the shape of b.w"):
        reweigh(template, merged, tmp_path / "out.onnx", base=base)
    large = np.zeros((4, 20_000), np.float32)
    template = _graph(
        tmp_path / "l.onnx", {"m": own["a.w"], "n": own["b.w"], "large": large}, _chain("m", "n", "large")
    )
    with pytest.raises(TemplateMismatch, match=r"large F32.*too large for a constant of the graph \(80,000 elements\)"):
        reweigh(template, merged, tmp_path / "out.onnx", base=base)
    assert not (tmp_path / "out.onnx").exists()


def test_what_nothing_tells_apart_is_refused(tmp_path: Path) -> None:
    """Two tensors equal in the base, one weight in the graph, and a merge that makes them differ; where both change
    alike, or only names tell them apart, it is done."""
    tensors = _tensors(0, a_w=(4, 4), c_w=(4, 4))
    tensors["b.w"] = tensors["a.w"].clone()
    base = _saved(tmp_path / "base.st", tensors)
    anonymous = {"val_0": tensors["a.w"].numpy(), "val_1": tensors["c.w"].numpy()}
    shared = _graph(tmp_path / "t.onnx", anonymous, _chain("val_0", "val_0", "val_1"))
    changed = tensors["a.w"] + 1
    one = _saved(tmp_path / "one.st", tensors | {"a.w": changed})
    both = _saved(tmp_path / "both.st", tensors | {"a.w": changed, "b.w": changed})
    with pytest.raises(TemplateMismatch, match="matches several") as caught:
        reweigh(shared, one, tmp_path / "out.onnx", base=base)
    assert caught.value.details["found"] == "a.w or b.w: equal in the base, not when merged"
    reweigh(shared, both, tmp_path / "both.onnx", base=base)
    assert np.array_equal(_values(tmp_path / "both.onnx")["val_0"], changed.numpy())
    named = _graph(
        tmp_path / "n.onnx", {"a.w": anonymous["val_0"], "val_1": anonymous["val_1"]}, _chain("a.w", "a.w", "val_1")
    )
    with pytest.raises(TemplateMismatch, match="matches several"):  # a.w may stand for b.w in its second use
        reweigh(named, one, tmp_path / "out.onnx", base=base)
    suffix = _saved(tmp_path / "s.st", {"w": tensors["a.w"], "b.w": tensors["a.w"], "c.w": tensors["c.w"]})
    split = _saved(tmp_path / "ss.st", {"w": changed, "b.w": tensors["a.w"], "c.w": tensors["c.w"]})
    exact = {"w": anonymous["val_0"], "b.w": anonymous["val_0"], "val_1": anonymous["val_1"]}
    reweigh(_graph(tmp_path / "e.onnx", exact, _chain("w", "b.w", "val_1")), split, tmp_path / "s.onnx", base=suffix)
    assert np.array_equal(_values(tmp_path / "s.onnx")["w"], changed.numpy())
    two = {"a.w": anonymous["val_0"], "b.w": anonymous["val_0"], "val_1": anonymous["val_1"]}
    apart = _graph(tmp_path / "p.onnx", two, _chain("a.w", "b.w", "val_1"))
    reweigh(apart, one, tmp_path / "apart.onnx", base=base)
    assert np.array_equal(_values(tmp_path / "apart.onnx")["a.w"], changed.numpy())
    assert np.array_equal(_values(tmp_path / "apart.onnx")["b.w"], anonymous["val_0"])


def test_zeros_may_be_a_constant(tmp_path: Path) -> None:
    """A tensor whose elements are all equal is no evidence: unless its name is, a change of it is refused."""
    tensors = _tensors(0, a_w=(4, 4)) | {"a.b": torch.zeros(4)}
    base, merged = _saved(tmp_path / "base.st", tensors), _saved(tmp_path / "m.st", tensors | {"a.b": torch.ones(4)})
    for name, fine in (("a.b", True), ("val_7", False)):
        nodes = _chain("a.w")
        nodes[0].output[0] = "t"
        nodes.append(helper.make_node("Add", ["t", name], ["y"], "add"))
        template = _graph(
            tmp_path / f"{name}.onnx", {"a.w": tensors["a.w"].numpy(), name: np.zeros(4, np.float32)}, nodes
        )
        if fine:
            assert reweigh(template, merged, tmp_path / "ok.onnx", base=base).changed == ("a.b",)
        else:
            with pytest.raises(TemplateMismatch, match="matches several"):
                reweigh(template, merged, tmp_path / "out.onnx", base=base)


def test_zeros_that_zeros_could_make(tmp_path: Path) -> None:
    """A table of zeros is not taken for two biases of zeros, put together; an empty one is left alone."""
    tensors = _tensors(0, a_w=(4, 4)) | {"a.b": torch.zeros(2), "b.b": torch.zeros(2)}
    nodes = _chain("a.w")
    nodes[0].output[0] = "t"
    nodes.append(helper.make_node("Add", ["t", "zeros"], ["y"], "add"))
    held = {"a.w": tensors["a.w"].numpy(), "zeros": np.zeros(4, np.float32), "empty": np.zeros((0, 3), np.float32)}
    template = _graph(tmp_path / "t.onnx", held, nodes)
    base = _saved(tmp_path / "base.st", tensors)
    both = tensors | {"a.b": torch.ones(2), "b.b": torch.ones(2)}
    with pytest.raises(TemplateMismatch, match="matches several"):
        reweigh(template, _saved(tmp_path / "both.st", both), tmp_path / "no.onnx", base=base)
    merged = _saved(tmp_path / "m.st", tensors | {"a.w": tensors["a.w"] + 1})
    assert reweigh(template, merged, tmp_path / "out.onnx", base=base).changed == ("a.w",)


def test_what_the_optimiser_folded(tmp_path: Path) -> None:
    """Rows that it says it took from a tensor are found there; what it computed otherwise is refused by source."""
    base, merged = (_tensors(seed, a_w=(4, 4), p_w=(9, 4)) for seed in (0, 1))
    paths = [_saved(tmp_path / f"{name}.st", of) for name, of in (("base", base), ("merged", merged))]

    def folded(rows: torch.Tensor) -> Path:
        nodes = _chain("a.w")
        nodes[0].output[0] = "t"
        nodes.append(helper.make_node("Add", ["t", "val_3"], ["y"], "add"))
        weights = {"a.w": base["a.w"].numpy(), "val_3": rows.numpy()}
        model = onnx.load(_graph(tmp_path / "t.onnx", weights, nodes))
        told = helper.make_tensor_value_info("val_3", onnx.TensorProto.FLOAT, list(rows.shape))
        told.metadata_props.add(key="pkg.onnxscript.optimizer.folded_from", value="['p.w', 'arange']")
        model.graph.value_info.append(told)
        (tmp_path / "t.onnx").write_bytes(model.SerializeToString())
        return tmp_path / "t.onnx"

    report = reweigh(folded(base["p.w"][2:5][None]), paths[1], tmp_path / "out.onnx", base=paths[0])
    assert report.recipes["val_3"] == "p.w[2:5]"
    assert np.array_equal(_values(tmp_path / "out.onnx")["val_3"], merged["p.w"][2:5][None].numpy())
    with pytest.raises(TemplateMismatch, match=r"val_3 F32\[1, 4\]: was computed from p.w"):
        reweigh(folded(2 * base["p.w"][:1]), paths[1], tmp_path / "no.onnx", base=paths[0])


def test_tables_of_positions(tmp_path: Path) -> None:
    """Cosines and sines are constants of the graph however large they are, where an op takes them as such."""
    tensors = _tensors(0, a_w=(4, 4))
    base, merged = _saved(tmp_path / "base.st", tensors), _saved(tmp_path / "m.st", {"a.w": tensors["a.w"] + 1})
    nodes = _chain("a.w")
    nodes[0].output[0] = "t"
    nodes.append(helper.make_node("Unsqueeze", ["t", "axes"], ["u"], "u"))  # (n, 1, 1, width)
    nodes.append(helper.make_node("RotaryEmbedding", ["u", "places", "cos", "sin"], ["y"], "r", domain="com.microsoft"))
    angles = np.zeros((40_000, 2), np.float32)
    weights = {"a.w": tensors["a.w"].numpy(), "cos": angles + 1, "sin": angles, "axes": np.array([1, 2])}
    path = _graph(tmp_path / "t.onnx", weights | {"places": np.array([0])}, nodes)
    assert reweigh(path, merged, tmp_path / "out.onnx", base=base).constants == ("cos", "sin")


def test_changes_without_a_place(tmp_path: Path) -> None:
    """What the merge changes must be in the graph; tensors it adds, loses or reshapes are refused; nothing changed is
    an error."""
    tensors = _tensors(0, a_w=(4, 4), head_w=(3, 4))
    base = _saved(tmp_path / "base.st", tensors)
    template = _graph(tmp_path / "t.onnx", {"val": tensors["a.w"].numpy()}, _chain("val"))
    plain = {"a.w": tensors["a.w"] + 1}
    report = reweigh(template, _saved(tmp_path / "m.st", tensors | plain), tmp_path / "ok.onnx", base=base)
    assert (report.ledger["merged"], report.ledger["unused"]) == (1, 1)
    for at, (merged, error) in enumerate(
        (
            (tensors | plain | {"head.w": tensors["head.w"] + 1}, TemplateMismatch),
            (tensors | {"head.w": tensors["head.w"] + 1}, TemplateMismatch),
            (tensors | plain | {"more.w": tensors["a.w"]}, TemplateMismatch),
            ({"head.w": tensors["head.w"]}, MissingTensors),
            (tensors | {"a.w": torch.zeros(5, 4)}, ShapeMismatch),
            (tensors, NothingToDo),
        )
    ):
        with pytest.raises(error):
            reweigh(template, _saved(tmp_path / f"m{at}.st", merged), tmp_path / "out.onnx", base=base)
        assert not (tmp_path / "out.onnx").exists()


def _outside(path: Path, **entries: str) -> Path:
    """The graph with its first weight's external data as told."""
    model = load_graph(path)
    tensor = model.graph.initializer[0]
    raw = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    (path.parent / "weights").write_bytes(raw)
    path.write_bytes(model.SerializeToString())
    return path


def test_bad_templates(tmp_path: Path) -> None:
    """Weights that lead elsewhere, that are cut short, or that are quantised; an output that is no graph."""
    tensors = _tensors(0, a_w=(4, 4))
    base, merged = _saved(tmp_path / "base.st", tensors), _saved(tmp_path / "m.st", {"a.w": tensors["a.w"] + 1})
    held = {"a.w": tensors["a.w"].numpy()}

    def graph() -> Path:
        return _graph(tmp_path / "t.onnx", held, _chain("a.w"))

    (tmp_path / "inner").mkdir()
    os.symlink(tmp_path / "base.st", tmp_path / "inner" / "link")
    for location in ("../weights", str(tmp_path / "weights"), "", "sub/../../weights"):
        with pytest.raises(UnsafeFile):
            reweigh(_outside(graph(), location=location), merged, tmp_path / "out.onnx", base=base)
    leading_out = _outside(_graph(tmp_path / "inner" / "t.onnx", held, _chain("a.w")), location="link")
    with pytest.raises(UnsafeFile):
        reweigh(leading_out, merged, tmp_path / "out.onnx", base=base)
    for entries in ({"offset": "8"}, {"length": "8"}, {"offset": "-4"}, {"length": "many"}):
        with pytest.raises(CorruptFile):
            reweigh(_outside(graph(), location="weights", **entries), merged, tmp_path / "out.onnx", base=base)
    assert reweigh(_outside(graph(), location="weights"), merged, tmp_path / "new" / "out.onnx", base=base).same_graph
    with pytest.raises(Unsupported):
        reweigh(graph(), merged, tmp_path / "out", base=base)
    overlapping = load_graph(_outside(graph(), location="weights"))
    overlapping.graph.initializer.add(name="part", dims=[2], data_type=7, data_location=1)
    overlapping.graph.initializer[-1].external_data.add(key="location", value="weights")
    (tmp_path / "t.onnx").write_bytes(overlapping.SerializeToString())
    with pytest.raises(CorruptFile, match="overlap"):
        reweigh(tmp_path / "t.onnx", merged, tmp_path / "over" / "out.onnx", base=base)
    scaled = [helper.make_node("DequantizeLinear", ["q", "s"], ["w"], "d"), *_chain("w")]
    eight = {"q": np.ones((4, 4), np.int8), "s": np.float32(0.1), **held}
    wide = [helper.make_node("Cast", ["q"], ["f"], "c", to=1), *_chain("f")]
    for nodes, weights in ((scaled, eight), (wide, {"q": np.ones((4, 1000), np.int8)})):
        with pytest.raises(Quantised):
            reweigh(_graph(tmp_path / "q.onnx", weights, nodes), merged, tmp_path / "out.onnx", base=base)
    assert not (tmp_path / "out.onnx").exists()
