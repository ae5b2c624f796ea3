"""Merged weights in graphs that other exporters made: found in the base byte for byte, or refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import Result
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file

from formats.errors import CorruptFile, OutputExists, Quantised, ShapeMismatch, UnsafeFile
from surgery.errors import MissingTensors, NothingToDo, TemplateMismatch, Unsupported
from surgery.onnx.graph_file import load_graph, payload
from surgery.operations.merge import merge
from surgery.operations.prove import prove
from surgery.operations.reweigh import merge_onnx, reweigh

Exporter = Callable[[str, Path], None]

KINDS = ("bert", "gpt2", "llama", "vit")
ADAPTED = {
    "bert": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "wte"],
    "llama": ["q_proj", "v_proj", "down_proj", "lm_head"],
    "vit": ["q_proj", "v_proj", "fc1"],
}


def _model(kind: str) -> Any:
    """A tiny random model of one of the classes, every parameter unlike the others."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
    }  # fmt: skip
    text = {**sizes, "vocab_size": 100, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
    model: Any
    if kind == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**text))
    elif kind == "gpt2":
        small = {"vocab_size": 100, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, bos_token_id=0, eos_token_id=0))
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text, num_key_value_heads=2))
    else:
        model = transformers.ViTForImageClassification(
            transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.config.use_cache = False
    return model.eval()


def _inputs(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(0, 100, (2, 8), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _by_torch(kind: str, path: Path) -> None:
    """torch's default export: optimised, weights transposed and renamed."""
    inputs = _inputs(kind)
    axes = {name: dict.fromkeys(range(1 if kind == "vit" else 2), torch.export.Dim.DYNAMIC) for name in inputs}
    torch.onnx.export(_model(kind), (), str(path), kwargs=inputs, dynamo=True, dynamic_shapes=axes, verbose=False)


def _by_transformers(kind: str, path: Path) -> None:
    """transformers' exporter with ONNX Runtime's fusions: query, key and value in one product."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    exporter, config = OnnxExporter(), OnnxConfig(dynamic=True, ort_fusions="cpu")
    exporter.export(_model(kind), _inputs(kind), config=config).save_pretrained(str(path.parent))


@dataclass(frozen=True)
class Case:
    """A class's base and adapter as folders, the merged folder, and what torch makes of that."""

    base: Path
    adapter: Path
    merged: Path
    logits: np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """By class; made when asked for."""
    made: dict[str, Case] = {}

    def case(kind: str) -> Case:
        if kind not in made:
            import peft

            root = tmp_path_factory.mktemp(kind)
            model = _model(kind)
            model.save_pretrained(root / "base")
            config = peft.LoraConfig(r=2, target_modules=ADAPTED[kind], init_lora_weights=False)
            torch.manual_seed(1)
            peft.get_peft_model(model, config).save_pretrained(root / "adapter")
            merge(root / "base", root / "adapter", root / "merged")
            merged = type(_model(kind)).from_pretrained(root / "merged").eval()
            with torch.no_grad():
                logits = merged(**_inputs(kind)).logits.numpy()
            made[kind] = Case(root / "base", root / "adapter", root / "merged", logits)
        return made[kind]

    return case


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Exporter], Path]:
    """A class's graph by an exporter, made when asked for; to be copied, not changed."""
    made: dict[tuple[str, Exporter], Path] = {}

    def template(kind: str, exporter: Exporter) -> Path:
        if (kind, exporter) not in made:
            made[kind, exporter] = tmp_path_factory.mktemp("graph") / "model.onnx"
            exporter(kind, made[kind, exporter])
        return made[kind, exporter]

    return template


@pytest.fixture
def bert(templates: Callable[[str, Exporter], Path]) -> Path:
    """BERT's graph by torch's exporter."""
    return templates("bert", _by_torch)


def _run(path: Path, kind: str) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(str(path))
    inputs = _inputs(kind)
    outputs = session.run(None, {each.name: inputs[each.name].numpy() for each in session.get_inputs()})
    return np.asarray(outputs[0])


def _close(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return float(np.abs(a - b).max()) <= 1e-5 * float(np.abs(b).max())


@pytest.mark.parametrize("exporter", [_by_torch, _by_transformers], ids=["torch", "transformers"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_exporters_graphs(
    tmp_path: Path,
    cases: Callable[[str], Case],
    templates: Callable[[str, Exporter], Path],
    kind: str,
    exporter: Exporter,
) -> None:
    """For four classes: the merged graph gives what torch makes of the merged model, whether its weights come from a
    merged folder or from adapters, and it is the template's program."""
    case, template = cases(kind), templates(kind, exporter)
    report = reweigh(template, case.merged, tmp_path / "a" / "model.onnx", base=case.base)
    assert _close(_run(tmp_path / "a" / "model.onnx", kind), case.logits)
    assert not _close(_run(template, kind), case.logits)
    proof = prove(template, tmp_path / "a" / "model.onnx", shape=(2, 8))
    assert (proof.level, proof.notes, proof.cost_a.uncounted) == ("bytes", (), ())
    assert report.same_graph
    assert sum(report.ledger.values()) == len(load_file(case.base / "model.safetensors"))
    assert report.ledger["unused"] == 0
    if exporter is _by_transformers and kind != "gpt2":
        assert any(recipe.count(";") == 2 for recipe in report.recipes.values())  # query, key and value
    again = merge_onnx(template, case.adapter, tmp_path / "b" / "model.onnx", base=case.base)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert again.surviving.keys()
    assert again.changed == report.changed


class _Logits(torch.nn.Module):
    """What torch's old exporter can trace: tensors in, one tensor out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits


@pytest.mark.filterwarnings("ignore")
def test_torchs_old_exporter(tmp_path: Path, cases: Callable[[str], Case]) -> None:
    """It names folded weights by numbers and says nothing of where they come from: the bytes do."""
    case, template = cases("gpt2"), tmp_path / "model.onnx"
    inputs = _inputs("gpt2")
    model, names = _Logits(_model("gpt2")), list(inputs)
    torch.onnx.export(model, tuple(inputs.values()), str(template), dynamo=False, input_names=names)
    reweigh(template, case.merged, tmp_path / "merged" / "model.onnx", base=case.base)
    assert _close(_run(tmp_path / "merged" / "model.onnx", "gpt2"), case.logits)
    assert prove(template, tmp_path / "merged" / "model.onnx", shape=(2, 8)).level == "graph"


def test_the_command_line(tmp_path: Path, cases: Callable[[str], Case], bert: Path, cli: Callable[..., Result]) -> None:
    """export-onnx --template and merge BASE.onnx give the same files; options that mean nothing there are refused."""
    case = cases("bert")
    one, two = tmp_path / "one" / "m.onnx", tmp_path / "two" / "m.onnx"
    done = cli("export-onnx", case.merged, "--template", bert, "--base", case.base, "-o", one)
    assert done.exit_code == 0, done.output
    assert "the template's, byte for byte" in done.output
    done = cli("merge", bert, case.adapter, "--base", case.base, "-o", two)
    assert done.exit_code == 0, done.output
    assert [file.read_bytes() for file in sorted(one.parent.iterdir())] == [
        file.read_bytes() for file in sorted(two.parent.iterdir())
    ]
    weighed = cli("merge", bert, case.adapter, "--weight", 0.5, "--base", case.base, "-o", tmp_path / "w.onnx")
    assert weighed.exit_code == 0, weighed.output
    for arguments in (
        ("export-onnx", case.merged, "--template", bert, "-o", tmp_path / "x.onnx"),
        ("export-onnx", case.merged, "--template", bert, "--base", case.base, "--no-verify", "-o", tmp_path / "x.onnx"),
        ("merge", bert, case.adapter, "-o", tmp_path / "x.onnx"),
        ("merge", case.base, case.adapter, "--base", case.base, "-o", tmp_path / "x"),
        ("merge", bert, case.adapter, "--base", case.base, "--untie", "-o", tmp_path / "x.onnx"),
        ("merge", bert, case.adapter, "--base", case.base, "--undo", tmp_path / "u.st", "-o", tmp_path / "x.onnx"),
    ):
        assert cli(*arguments).exit_code == 2


def test_every_method_that_merge_knows(tmp_path: Path, cases: Callable[[str], Case], bert: Path) -> None:
    """DoRA, a head in full and two adapters at once: the files are those of the merged checkpoint."""
    import peft

    case = cases("bert")
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules=["key"], use_dora=True, modules_to_save=["classifier"])
    tuned = peft.get_peft_model(_model("bert"), config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "dora")
    adapters = [(case.adapter, 0.5), tmp_path / "dora"]
    merge(case.base, adapters, tmp_path / "merged")
    reweigh(bert, tmp_path / "merged", tmp_path / "a" / "m.onnx", base=case.base)
    report = merge_onnx(bert, adapters, tmp_path / "b" / "m.onnx", base=case.base)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert {"classifier.weight", "classifier.bias"} <= set(report.changed)


def test_another_base_is_refused(tmp_path: Path, cases: Callable[[str], Case], bert: Path) -> None:
    """A checkpoint of the same shapes and other values, in all tensors or in one, is not what the graph was made of."""
    case = cases("bert")
    other = load_file(case.base / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.bias"
    save_file(other | {name: other[name] + 1}, tmp_path / "bias.safetensors")
    save_file({key: tensor + 1 for key, tensor in other.items()}, tmp_path / "all.safetensors")
    for base in ("bias", "all"):
        with pytest.raises(TemplateMismatch, match="has other values than") as caught:
            reweigh(bert, case.merged, tmp_path / "out" / "m.onnx", base=tmp_path / f"{base}.safetensors")
        assert "bert." in caught.value.details["found"]
        assert not (tmp_path / "out").exists()


def test_beside_the_template(tmp_path: Path, cases: Callable[[str], Case], bert: Path) -> None:
    """In the template's own folder the weights get a file called after the output; nothing is replaced unasked."""
    case, folder = cases("bert"), tmp_path / "g"
    folder.mkdir()
    for file in bert.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    report = reweigh(folder / bert.name, case.merged, folder / "merged.onnx", base=case.base)
    assert sorted(file.name for file in folder.iterdir()) == sorted([*before, "merged.onnx", "merged.onnx.data"])
    assert all((folder / name).read_bytes() == data for name, data in before.items())
    assert not report.same_graph
    assert _close(_run(folder / "merged.onnx", "bert"), case.logits)
    assert prove(folder / bert.name, folder / "merged.onnx").level == "graph"
    with pytest.raises(OutputExists):
        reweigh(folder / bert.name, case.merged, folder / "merged.onnx", base=case.base)
    reweigh(folder / bert.name, case.merged, folder / "merged.onnx", base=case.base, force=True)
    with pytest.raises(OutputExists):
        reweigh(folder / bert.name, case.merged, folder / bert.name, base=case.base, force=True)
    with pytest.raises(OutputExists):  # merged.onnx.data is what this template's weights lie in
        reweigh(folder / "merged.onnx", case.base, folder / "merged.onnx", base=case.merged, force=True)
    (folder / "other.onnx").write_bytes((folder / "merged.onnx").read_bytes())
    (folder / "merged.onnx").unlink()
    with pytest.raises(OutputExists):
        reweigh(folder / "other.onnx", case.base, folder / "merged.onnx", base=case.merged, force=True)


def test_our_own_export_as_template(tmp_path: Path, twins: Callable[[str], Any]) -> None:
    """The files are those that exporting the merged model gives, the safetensors header included."""
    base, merged = twins("bert")
    reweigh(base.onnx, merged.model, tmp_path / "new" / "model.onnx", base=base.model)
    for file in merged.onnx.parent.iterdir():
        assert (tmp_path / "new" / file.name).read_bytes() == file.read_bytes()


# Small graphs by hand ------------------------------------------------------------------------------------------------


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
    with pytest.raises(TemplateMismatch, match="nothing tells which") as caught:
        reweigh(shared, one, tmp_path / "out.onnx", base=base)
    assert caught.value.details["found"] == "a.w or b.w: equal in the base, not when merged"
    reweigh(shared, both, tmp_path / "both.onnx", base=base)
    assert np.array_equal(_values(tmp_path / "both.onnx")["val_0"], changed.numpy())
    named = _graph(
        tmp_path / "n.onnx", {"a.w": anonymous["val_0"], "val_1": anonymous["val_1"]}, _chain("a.w", "a.w", "val_1")
    )
    with pytest.raises(TemplateMismatch, match="nothing tells which"):  # a.w may stand for b.w in its second use
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
            with pytest.raises(TemplateMismatch, match="nothing tells which"):
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
    with pytest.raises(TemplateMismatch, match="nothing tells which"):
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
