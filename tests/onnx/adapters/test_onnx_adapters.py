"""Adapters left in the graph: as a branch and as inputs, each against the merged model's own graph."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import surgery
from formats import open_checkpoint
from formats.errors import OutputExists, ReportedError, ShapeMismatch, UnmatchedKeys
from formats.spec import DType, TensorSpec
from surgery.errors import Unsupported, VerificationFailed
from surgery.onnx.adapters.lora import LoraBranch, graft
from surgery.onnx.files.payload import PAYLOAD
from surgery.onnx.trace.template import Template
from surgery.operations.export import export_onnx as operation
from surgery.operations.export import loras as export_adapters

pytestmark = pytest.mark.processor

KINDS = ("bert", "llama", "gpt2")
TOKENS = np.random.default_rng(5).integers(0, 100, (3, 9))
# A first adapter's layers, and a second one's: with bias and without, Gemm and MatMul, the head, square weights.
TARGETS = {
    "bert": (["query", "intermediate.dense", "pooler.dense"], ["query", "value"]),
    "llama": (["q_proj", "down_proj", "lm_head"], ["q_proj", "v_proj"]),
    "gpt2": (["c_attn"], ["c_attn", "c_proj"]),
}


def adapter_of(model: Path, out: Path, targets: list[str], seed: int = 0, **settings: Any) -> Path:
    """An adapter that peft made of a model's folder, its factors random."""
    torch.manual_seed(seed)
    name = json.loads((model / "config.json").read_text())["architectures"][0]
    loaded = getattr(transformers, name).from_pretrained(model)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(loaded, config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        adapted.save_pretrained(out, save_embedding_layers=False)
    return out


@pytest.fixture
def export(twins: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Exports a model of a kind, or what was merged from it, without building its graph anew."""

    def run(kind: str, model: Path, out: Path, **how: Any) -> operation.ExportReport:
        exported = twins(kind)[0]
        graph = onnx.load(exported.onnx, load_external_data=False)
        with open_checkpoint(exported.model) as checkpoint:
            template = Template(graph, tuple(sorted(checkpoint.specs.values(), key=lambda spec: spec.name)), ())
        monkeypatch.setattr("surgery.onnx.trace.template.build_templates", lambda *what: (template,))
        return operation.export_onnx(model, out, **how)

    return run


def outputs(path: Path, adapter: Path | None = None) -> list[Any]:
    """What ONNX Runtime makes of random tokens, with an adapter's file where one is given."""
    options, run = onnxruntime.SessionOptions(), onnxruntime.RunOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    if adapter is not None:
        loaded = onnxruntime.LoraAdapter()
        loaded.Load(str(adapter))
        run.add_active_adapter(loaded)
    feed = {entry.name: np.full((3, 9), int(entry.name == "attention_mask")) for entry in session.get_inputs()}
    feed["input_ids"] = TOKENS
    return session.run(None, feed, run)


def by_peft(model: Path, adapter: Path) -> list[Any]:
    """What peft makes of the same tokens, the adapter unmerged."""
    name = json.loads((model / "config.json").read_text())["architectures"][0]
    loaded = peft.PeftModel.from_pretrained(getattr(transformers, name).from_pretrained(model), adapter).eval()
    with torch.no_grad():
        result = loaded(input_ids=torch.from_numpy(TOKENS), use_cache=False)
    return [tensor.numpy() for tensor in result.to_tuple()]


def distance(one: list[Any], other: list[Any]) -> float:
    """The largest difference in relation to its output's largest value."""
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(one, other, strict=True))


def merged(kind: str, model: Path, adapter: Path, folder: Path, export: Callable[..., Any]) -> tuple[Path, Any]:
    """The graph of the merged model, and its report."""
    surgery.merge(model, adapter, folder / "model")
    return folder / "onnx/model.onnx", export(kind, folder / "model", folder / "onnx/model.onnx")


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_computes_what_merging_computes(
    tmp_path: Path, twins: Callable[[str], Any], export: Callable[..., Any], kind: str
) -> None:
    """The same outputs at the price of more nodes; merged, the base's graph runs as it is."""
    base = twins(kind)[0]
    adapter = adapter_of(base.model, tmp_path / "a", TARGETS[kind][0])
    report = export(kind, base.model, tmp_path / "branch/model.onnx", adapters=[adapter])
    with_merged, merged_report = merged(kind, base.model, adapter, tmp_path / "merged", export)
    expected = outputs(with_merged)
    assert distance(expected, outputs(tmp_path / "branch/model.onnx")) <= report.adapted_tolerance
    assert distance(expected, outputs(base.onnx)) > 100 * report.adapted_tolerance
    ours, plain = report.graphs[0], base.report.graphs[0]
    assert merged_report.graphs[0].nodes_run == plain.nodes_run
    assert 0 < ours.nodes_run - plain.nodes_run <= 3 * len(report.adapted)  # what was fused is fused
    assert with_merged.read_bytes() == base.onnx.read_bytes()
    assert ours.nodes == plain.nodes + 3 * len(report.adapted)
    assert report.adapters == "branch"
    assert 0 < report.adapted_rel_error <= report.adapted_tolerance
    tensors = load_file(tmp_path / "branch" / PAYLOAD)
    assert {f"{name.removesuffix('weight')}lora_{side}" for name in report.adapted for side in "AB"} < tensors.keys()
    onnx.checker.check_model(str(tmp_path / "branch/model.onnx"), full_check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_serves_many_adapters(
    tmp_path: Path, twins: Callable[[str], Any], export: Callable[..., Any], kind: str
) -> None:
    """Two adapters of different rank, scaling and layers, by ONNX Runtime's own files: what merging gives, and peft.
    Without any it gives the base's bits."""
    base = twins(kind)[0]
    first, second = TARGETS[kind]
    one = adapter_of(base.model, tmp_path / "one", first, rank_pattern={first[0]: 3}, alpha_pattern={first[0]: 5})
    two = adapter_of(base.model, tmp_path / "two", second, seed=1, r=9, use_rslora=True)
    graph = tmp_path / "inputs/model.onnx"
    report = export(kind, base.model, graph, adapters=[one, two], adapters_as="inputs")
    assert (graph.parent / PAYLOAD).read_bytes() == (base.onnx.parent / PAYLOAD).read_bytes()
    for a, b in zip(outputs(base.onnx), outputs(graph), strict=True):
        np.testing.assert_array_equal(a, b)
    for adapter in (one, two):
        file = tmp_path / f"{adapter.name}.onnx_adapter"
        surgery.convert(adapter, file, "ort", base=base.model)
        expected = outputs(merged(kind, base.model, adapter, tmp_path / f"merged-{adapter.name}", export)[0])
        assert distance(expected, outputs(graph, file)) <= report.adapted_tolerance
        assert distance(by_peft(base.model, adapter), outputs(graph, file)) <= report.adapted_tolerance
    assert any("--to ort" in note for note in report.notes)
    onnx.checker.check_model(str(graph), full_check=True)


def test_shapes_stay_complete(tmp_path: Path, bert: Any, export: Callable[..., Any]) -> None:
    """Every value has its shape, so that ONNX Runtime sees what it fuses; ranks are axes with names of their own."""
    adapter = adapter_of(bert.model, tmp_path / "a", TARGETS["bert"][0])
    export("bert", bert.model, tmp_path / "inputs/model.onnx", adapters=[adapter], adapters_as="inputs")
    graph = onnx.load(tmp_path / "inputs/model.onnx", load_external_data=False).graph
    before = onnx.load(bert.onnx, load_external_data=False).graph
    known = {value.name for value in (*graph.value_info, *graph.output)}
    untold = {name for node in before.node for name in node.output} - {
        v.name for v in (*before.value_info, *before.output)
    }
    assert {name for node in graph.node for name in node.output} - known == untold
    axes = {axis.dim_param for value in graph.value_info for axis in value.type.tensor_type.shape.dim}
    assert "encoder.layer.1.attention.self.query.rank" in axes
    names = [node.name for node in graph.node]
    assert len(names) == len(set(names))
    inputs = {value.name: value.type.tensor_type for value in graph.input}
    a, b = (inputs[f"pooler.dense.lora_{side}"].shape.dim for side in "AB")
    assert (a[0].dim_value, a[1].dim_param) == (32, "pooler.dense.rank")
    assert (b[0].dim_param, b[1].dim_value) == ("pooler.dense.rank", 32)


def test_ranks_do_not_show_in_the_inputs_graph(bert: Any) -> None:
    """Nor does the order in which the adapters are named."""
    model = onnx.load(bert.onnx, load_external_data=False)
    weights = [f"encoder.layer.{n}.attention.self.query.weight" for n in range(2)]

    def branches(rank: int) -> list[LoraBranch]:
        return [branch_of(weight, rank) for weight in weights]

    one = graft(model, branches(2), inputs=True).SerializeToString(deterministic=True)
    assert graft(model, branches(7)[::-1], inputs=True).SerializeToString(deterministic=True) == one
    fixed = graft(model, branches(2), inputs=False).SerializeToString(deterministic=True)
    assert graft(model, branches(7), inputs=False).SerializeToString(deterministic=True) != fixed
    assert model.SerializeToString() == onnx.load(bert.onnx, load_external_data=False).SerializeToString()


def branch_of(weight: str, rank: int = 2, turned: bool = False) -> LoraBranch:
    """A branch beside a weight of 32 × 32."""
    module = weight.removesuffix(".weight")
    a, b = TensorSpec(f"{module}.lora_A", DType.F32, (32, rank)), TensorSpec(f"{module}.lora_B", DType.F32, (rank, 32))
    return LoraBranch(weight, a, b, turned)


def test_a_weight_that_serves_twice_has_two_branches() -> None:
    """As in models whose layers share their weights; the second product's value is the graph's output."""
    helper = onnx.helper
    float32 = onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Transpose", ["w.weight"], ["t"], "t", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["one"], "one/MatMul"),
        helper.make_node("MatMul", ["one", "t"], ["y"], "two/MatMul"),
    ]
    x, y = (helper.make_tensor_value_info(name, float32, ["batch", 32]) for name in "xy")
    rng = np.random.default_rng(0)
    w, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((32, 32), (32, 2), (2, 32)))
    weight = onnx.numpy_helper.from_array(w, "w.weight")
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [weight]), opset_imports=[helper.make_opsetid("", 20)]
    )
    model.ir_version = 10
    grafted = graft(model, [branch_of("w.weight")], inputs=True)
    onnx.checker.check_model(grafted, full_check=True)
    assert [node.name for node in grafted.graph.node if node.op_type == "Add"] == ["one/MatMul/lora", "two/MatMul/lora"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(grafted.SerializeToString(), options)
    given = rng.normal(size=(3, 32)).astype(np.float32)
    (found,) = session.run(None, {"x": given, "w.lora_A": a, "w.lora_B": b})
    step = w.T + a @ b
    np.testing.assert_allclose(found, given @ step @ step, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("weight", "turned", "message"),
    [
        ("embeddings.word_embeddings.weight", False, "otherwise than to multiply"),
        ("encoder.layer.0.attention.self.query.weight", True, "otherwise than to multiply"),
        ("encoder.layer.9.attention.self.query.weight", False, "does not multiply"),
    ],
)
def test_what_no_branch_can_stand_beside(bert: Any, weight: str, turned: bool, message: str) -> None:
    """A table, a weight stored the other way round, a weight that the graph does not have."""
    model = onnx.load(bert.onnx, load_external_data=False)
    with pytest.raises(Unsupported, match=message) as caught:
        graft(model, [branch_of(weight, turned=turned)], inputs=False)
    assert "merge the adapter" in caught.value.details["next"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"target_modules": ["word_embeddings"]}, "cannot express lora on an embedding layer"),
        ({"bias": "all"}, "carries in full"),
        ({"lora_bias": True}, "the change of a bias"),
        ({"modules_to_save": ["pooler.dense"]}, "carries in full"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_stay_is_refused(tmp_path: Path, bert: Any, settings: dict[str, Any], message: str) -> None:
    """Before the graph is built, with the way out; nothing is left."""
    adapter = adapter_of(bert.model, tmp_path / "a", ["query"], **settings)
    for way in ("branch", "inputs"):
        with pytest.raises(Unsupported, match=message) as caught:
            operation.export_onnx(bert.model, tmp_path / "out/model.onnx", adapters=[adapter], adapters_as=way)
        assert "surgery merge" in caught.value.details["next"]
    with pytest.raises(ReportedError, match="ort cannot express"):
        surgery.convert(adapter, tmp_path / "a.onnx_adapter", "ort", base=bert.model)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "a.onnx_adapter").exists()


def test_adapters_of_other_models_are_refused(tmp_path: Path, bert: Any, twins: Callable[[str], Any]) -> None:
    """By names that match nothing and by shapes that do not fit."""
    other = adapter_of(twins("llama")[0].model, tmp_path / "llama", ["q_proj"])
    with pytest.raises(UnmatchedKeys):
        operation.export_onnx(bert.model, tmp_path / "out/model.onnx", adapters=[other])
    narrow = adapter_of(bert.model, tmp_path / "narrow", ["query"])
    path = narrow / "adapter_model.safetensors"
    save_file({name: tensor[..., :8].contiguous() for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ShapeMismatch):
        operation.export_onnx(bert.model, tmp_path / "out/model.onnx", adapters=[narrow])
    assert not (tmp_path / "out").exists()


def test_a_wrong_branch_is_found_out(
    tmp_path: Path, bert: Any, export: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the scaling, and nothing is written: exit code 3."""
    adapter = adapter_of(bert.model, tmp_path / "a", ["query"])
    right = export_adapters.GraphLora.factors
    monkeypatch.setattr(
        export_adapters.GraphLora,
        "factors",
        lambda self: {name: tensor / 2 if name.endswith("B") else tensor for name, tensor in right(self).items()},
    )
    for way in ("branch", "inputs"):
        with pytest.raises(VerificationFailed, match="merged weights") as caught:
            export("bert", bert.model, tmp_path / "out/model.onnx", adapters=[adapter], adapters_as=way)
        assert caught.value.exit_code == 3
        assert not (tmp_path / "out").exists()


def test_the_output_must_not_be_the_adapter(tmp_path: Path, bert: Any) -> None:
    """Nor replace its weights."""
    adapter = adapter_of(bert.model, tmp_path / "a", ["query"])
    file = shutil.copy(adapter / "adapter_model.safetensors", tmp_path / "model.onnx")
    shutil.copy(adapter / "adapter_config.json", tmp_path / "adapter_config.json")
    with pytest.raises(OutputExists, match="an input"):
        operation.export_onnx(bert.model, tmp_path / "model.onnx", adapters=[file], force=True)


def test_the_command_line(
    tmp_path: Path, bert: Any, export: Callable[..., Any], cli: Callable[..., Any], cli_json: Callable[..., Any]
) -> None:
    """--adapter and --as; what makes no sense is a usage error, or says the way out."""
    export("bert", bert.model, tmp_path / "first/model.onnx", verify=False)  # so that the graph is not built anew
    adapter = adapter_of(bert.model, tmp_path / "a", ["query"])
    out = tmp_path / "out/model.onnx"
    report = cli_json("export-onnx", bert.model, "--adapter", adapter, "--as", "inputs", "-o", out)
    assert report["adapters"] == "inputs"
    assert report["ledger"]["unused"] == 4
    shown = cli("export-onnx", bert.model, "--adapter", adapter, "-o", tmp_path / "branch/model.onnx")
    assert shown.exit_code == 0, shown.stderr
    assert "branch, 2 places" in shown.stdout
    assert "against merged weights" in shown.stdout
    assert cli("export-onnx", bert.model, "--as", "inputs", "-o", tmp_path / "x/model.onnx").exit_code == 2
    two = cli("export-onnx", bert.model, "--adapter", adapter, "--adapter", adapter, "-o", tmp_path / "x/model.onnx")
    assert two.exit_code == 1
    assert "surgery combine" in two.stderr
    assert not (tmp_path / "x").exists()
