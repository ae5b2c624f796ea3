"""Bottlenecks, prefixes and prompts in the graph: against the library's golden outputs and peft, in all their forms."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import torch
from bottleneck_models import CASES as ALL_CASES
from bottleneck_models import GOLDEN, inputs, saved
from safetensors.torch import load_file, save_file

import surgery
from formats import open_checkpoint
from formats.errors import CorruptFile, ReportedError
from formats.grafts import BranchGraft, PrefixGraft, PromptGraft, Value
from formats.spec import DType, TensorSpec
from surgery.errors import NotMergeable, Unsupported, VerificationFailed
from surgery.methods.activations import activation, function
from surgery.onnx.adapters.activation_nodes import _NODES, activate
from surgery.onnx.adapters.bottleneck import HALF
from surgery.onnx.adapters.graph import Graph
from surgery.onnx.adapters.sites import graft_sites
from surgery.onnx.trace.template import Template
from surgery.operations.export import export_onnx as operation
from surgery.operations.export import grafts as export_grafts

HALVES = ("compacter", "compacter_linear", "double_seq_bn", "double_seq_bn_linear")
TRACED = ("bert", "gpt2", "llama", "vit")  # DistilBERT's and RoBERTa's layers are BERT's
CASES = [case for case in ALL_CASES if case[0] in TRACED]


class Bases:
    """The golden models as folders, and the reports of their exports, each made when it is first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._made: dict[str, tuple[Path, operation.ExportReport]] = {}

    def __getitem__(self, name: str) -> tuple[Path, operation.ExportReport]:
        if name not in self._made:
            folder = self._factory.mktemp(name)
            saved(name, folder / "model")
            report = operation.export_onnx(folder / "model", folder / "onnx/model.onnx")
            self._made[name] = folder / "model", report
        return self._made[name]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """See there."""
    return Bases(tmp_path_factory)


@pytest.fixture
def export(bases: Bases, monkeypatch: pytest.MonkeyPatch) -> Callable[..., operation.ExportReport]:
    """Exports a golden model, or a fold of it, without tracing its graph anew."""

    def run(kind: str, out: Path, model: Path | None = None, **how: Any) -> operation.ExportReport:
        folder, report = bases[kind]
        assert report.output is not None
        graph = onnx.load(report.output, load_external_data=False)
        with open_checkpoint(model or folder) as checkpoint:
            template = Template(graph, tuple(sorted(checkpoint.specs.values(), key=lambda spec: spec.name)), ())
        monkeypatch.setattr("surgery.onnx.trace.template.build_templates", lambda *what: (template,))
        return operation.export_onnx(model or folder, out / "model.onnx", **how)

    return run


def outputs(report: operation.ExportReport, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """What ONNX Runtime makes of tokens or an image: the first output."""
    assert report.output is not None
    session = onnxruntime.InferenceSession(report.output, providers=["CPUExecutionProvider"])
    shape = next(iter(given.values())).shape
    feed = {entry.name: np.full(shape, int(entry.name == "attention_mask")) for entry in session.get_inputs()}
    feed |= {name: tensor.numpy() for name, tensor in given.items()}
    found: np.ndarray[Any, Any] = session.run(None, feed)[0]
    return torch.from_numpy(found)


def check_golden(report: operation.ExportReport, model: str, name: str) -> None:
    """The library's outputs, within 1e-5."""
    golden = load_file(GOLDEN / model / name / "outputs.st")
    torch.testing.assert_close(outputs(report, inputs(golden)), golden["last_hidden_state"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("model", "name"), CASES)
def test_the_graph_gives_what_the_library_gives(
    tmp_path: Path, export: Callable[..., Any], model: str, name: str
) -> None:
    """And what torch gives with hooks, before anything is written; half-folded with fewer nodes than as a branch."""
    report = export(model, tmp_path / "half", adapters=[GOLDEN / model / name])
    check_golden(report, model, name)
    assert report.max_rel_error <= report.tolerance
    half = name in HALVES
    beside = name.startswith(("prefix", "prompt"))
    assert report.adapters == (HALF if half else "constants" if beside else "branch")
    if half:
        branch = export(model, tmp_path / "branch", adapters=[GOLDEN / model / name], adapters_as="branch")
        check_golden(branch, model, name)
        assert branch.adapters == "branch"
        nodes, more = (each.graphs[0].nodes_run for each in (report, branch))
        # Where the projection has no bias, and f is gelu, ONNX Runtime makes the branch's first bias one with f.
        assert nodes <= more if (model, name) == ("llama", "compacter") else nodes < more
        # Four weights; or, where there are biases, the attentions' two and all four of these.
        assert report.ledger["converted"] == (4 if model == "llama" else 6)


@pytest.mark.parametrize("model", ["bert", "gpt2", "llama", "vit"])
def test_what_fold_leaves_is_put_into_the_graph(
    tmp_path: Path, export: Callable[..., Any], bases: Bases, model: str
) -> None:
    """Without being named."""
    for name, way in (("double_seq_bn", HALF), ("double_seq_bn", "branch"), ("mam", None)):
        folder, out = tmp_path / name, tmp_path / f"{name}-{way}"
        surgery.fold(bases[model][0], GOLDEN / model / name, folder, force=True)
        report = export(model, out, folder, adapters_as=way)
        check_golden(report, model, name)
        assert report.graphs[0].nodes_run > bases[model][1].graphs[0].nodes_run


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (model, name)
        for model, name in CASES
        if name in ("compacter_linear", "double_seq_bn_linear") and model != "llama"
    ],
)
def test_what_fold_folds_whole_costs_no_node(
    tmp_path: Path, export: Callable[..., Any], bases: Bases, model: str, name: str
) -> None:
    """The graph runs as many nodes as the base's, after ONNX Runtime's optimisation."""
    surgery.fold(bases[model][0], GOLDEN / model / name, tmp_path / "folded")
    report = export(model, tmp_path / "onnx", tmp_path / "folded")
    check_golden(report, model, name)
    assert report.adapters == ""
    assert report.graphs[0].nodes_run == bases[model][1].graphs[0].nodes_run


@pytest.mark.parametrize(
    ("model", "name", "more"),
    [("bert", "par_bn_gelu", 0), ("llama", "double_seq_bn_linear", 2 * 7)],
)
def test_what_changes_the_model_s_shapes_is_exported_anew(
    tmp_path: Path, bases: Bases, model: str, name: str, more: int
) -> None:
    """A wider MLP runs as many nodes as the base's; of the biases that a Llama gets each is one more."""
    surgery.fold(bases[model][0], GOLDEN / model / name, tmp_path / "folded")
    report = operation.export_onnx(tmp_path / "folded", tmp_path / "onnx/model.onnx")
    check_golden(report, model, name)
    assert report.graphs[0].nodes_run == bases[model][1].graphs[0].nodes_run + more


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "roberta"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_prompts_and_prefixes_of_peft(
    tmp_path: Path, export: Callable[..., Any], bases: Bases, kind: str, method: str
) -> None:
    """Among the words' embeddings, and with positions that begin behind the prefix, RoBERTa's without padding."""
    from transformers import AutoModel

    configs = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
    base = AutoModel.from_pretrained(bases[kind][0], dtype=torch.float32)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(base, configs[method](task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)).eval()
    with torch.no_grad():
        for parameter in adapted.prompt_encoder.parameters():
            parameter.copy_(torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 5, 2, 9, 7], [3, 3, 8, 0, 1]])
    with torch.no_grad():
        expected = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    report = export(kind, tmp_path / "onnx", adapters=[tmp_path / "adapter"])
    torch.testing.assert_close(outputs(report, {"input_ids": ids}), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("bert", "double_seq_bn"),
        ("bert", "prompt_tuning"),
        ("gpt2", "compacter"),
        ("gpt2", "mam"),
        ("llama", "mam"),
        ("vit", "mam"),
        ("vit", "prompt_tuning"),
    ],
)
def test_shapes_stay_complete(tmp_path: Path, export: Callable[..., Any], bases: Bases, model: str, name: str) -> None:
    """Every new value has its shape, every node a name of its own; the checker is content."""
    report = export(model, tmp_path / "onnx", adapters=[GOLDEN / model / name], verify=False)
    before, after = (onnx.load(each.output, load_external_data=False).graph for each in (bases[model][1], report))
    onnx.checker.check_model(report.output, full_check=True)

    def untold(graph: Any) -> set[str]:
        known = {value.name for value in (*graph.value_info, *graph.output)}
        return {name.removesuffix("/prompt") for node in graph.node for name in node.output if name not in known}

    assert untold(after) <= untold(before)
    names = [node.name for node in after.node]
    assert len(names) == len(set(names))


class _Site:
    """A BERT's graph without weights, and sites in it."""

    SPECS = {  # noqa: RUF012
        name: TensorSpec(name, DType.F32, shape)
        for name, shape in {"down": (2, 8), "down_bias": (2,), "up": (8, 2), "up_bias": (8,), "keys": (3, 8)}.items()
    }

    @staticmethod
    def branch(**changes: Any) -> BranchGraft:
        given = {"module": "encoder.layer.0.output.dense", "layer": 0, "place": "output_adapter"}
        reads = {"reads": Value.OUTPUT, "adds_to": Value.OUTPUT, "norm": None, "non_linearity": "relu"}
        return BranchGraft(**{**given, **reads, **{n: n for n in ("down", "down_bias", "up", "up_bias")}, **changes})


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (_Site.branch(module="encoder.layer.9.output.dense"), "does not multiply"),
        (_Site.branch(module="embeddings.word_embeddings"), "only to multiply by it"),
        (_Site.branch(module="encoder.layer.0.intermediate.dense"), "is not built as the adapter expects"),
        (_Site.branch(module="encoder.layer.0.attention.self.query"), "is not built as the adapter expects"),
        (_Site.branch(reads=Value.NORMED, norm="encoder.layer.1.output.LayerNorm"), "is not built as the adapter expects"),
        (_Site.branch(reads=Value.INPUT), "is not built as the adapter expects"),  # 12 columns, not 8
        (_Site.branch(non_linearity="wild"), "unknown non-linearity"),
        (PrefixGraft("encoder.layer.0.output.dense", 0, False, "keys", "keys"), "attention is not built"),
        (PromptGraft(False, False, "down"), None),
        (PromptGraft(True, True, "up"), "prompt's width differs"),
    ],
)
def test_a_site_that_looks_otherwise_is_refused(bases: Bases, site: Any, message: str | None) -> None:
    """With what was found there."""
    model = onnx.load(bases["bert"][1].output, load_external_data=False)
    with open_checkpoint(bases["bert"][0]) as base:
        if message is None:
            graft_sites(model, [site], _Site.SPECS, base.specs, frozenset(), HALF)
            return
        with pytest.raises(Unsupported, match=message) as caught:
            graft_sites(model, [site], _Site.SPECS, base.specs, frozenset(), HALF)
    assert caught.value.details.get("found") or message == "does not multiply"


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (PromptGraft(False, False, "up"), "prompt's width differs"),
        (PromptGraft(True, False, "down"), "embeddings are not built"),  # there are no words to put it among
        (PrefixGraft("encoder.layer.0.output.dense", 0, False, "keys", "keys"), "attention is not built"),
        (PrefixGraft("encoder.layer.0.attention.output.dense", 0, True, "keys", "keys"), "shifts the input's positions"),
        (PrefixGraft("encoder.layer.0.attention.output.dense", 0, False, "up", "up"), "not as wide as the attention"),
    ],
)
def test_an_image_s_site_that_looks_otherwise_is_refused(bases: Bases, site: Any, message: str) -> None:
    """As one of words."""
    model = onnx.load(bases["vit"][1].output, load_external_data=False)
    with open_checkpoint(bases["vit"][0]) as base, pytest.raises(Unsupported, match=message):
        graft_sites(model, [site], _Site.SPECS, base.specs, frozenset(), HALF)


def edited(folder: Path, source: Path, **settings: Any) -> Path:
    """A copy of an adapter with other settings."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["config"] |= settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_bad_adapters_are_refused(tmp_path: Path, bases: Bases) -> None:
    """Before the graph is built; nothing is written."""
    bert, out = bases["bert"][0], tmp_path / "out"

    def refused(kind: type[ReportedError], message: str, *adapters: Path, way: str | None = None) -> None:
        with pytest.raises(kind, match=message):
            operation.export_onnx(bert, out / "model.onnx", adapters=adapters, adapters_as=way)
        assert not out.exists()

    houlsby, prompt = GOLDEN / "bert" / "double_seq_bn", GOLDEN / "bert" / "prompt_tuning"
    refused(ReportedError, "BERT-like|match", GOLDEN / "gpt2" / "double_seq_bn")
    refused(ReportedError, "does not fit", edited(tmp_path / "width", houlsby, reduction_factor=4))
    refused(ReportedError, "another depth", edited(tmp_path / "depth", houlsby, leave_out=[0]))
    refused(NotMergeable, "unknown non-linearity", edited(tmp_path / "wild", houlsby, non_linearity="wild"))
    refused(Unsupported, "no inputs", houlsby, way="inputs")
    refused(Unsupported, "one adapter", houlsby, prompt)
    longest = tmp_path / "prompt"
    longest.mkdir()
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 16, "task_type": "FEATURE_EXTRACTION"}
    (longest / "adapter_config.json").write_text(json.dumps(config))
    save_file({"prompt_embeddings": torch.randn(16, 8)}, longest / "adapter_model.safetensors")
    refused(Unsupported, "all positions", longest)


def test_grafts_of_another_model_are_refused(tmp_path: Path, bases: Bases) -> None:
    """A folder whose weights were exchanged."""
    folder = tmp_path / "folded"
    surgery.fold(bases["bert"][0], GOLDEN / "bert" / "seq_bn", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["pooler.dense.bias"] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptFile, match="another model"):
        operation.export_onnx(folder, tmp_path / "out/model.onnx")
    assert not (tmp_path / "out").exists()


def test_a_wrong_graph_is_found_out(
    tmp_path: Path, export: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias that is missing, and nothing is written: exit code 3."""
    right = export_grafts.Grafted._build
    wrong = lambda self, made, base: right(self, made, base) * (not made.spec.name.endswith("half_folded.bias"))  # noqa: E731
    monkeypatch.setattr(export_grafts.Grafted, "_build", wrong)
    with pytest.raises(VerificationFailed, match="with its adapter") as caught:
        export("bert", tmp_path / "out", adapters=[GOLDEN / "bert" / "double_seq_bn"])
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", sorted(_NODES))
def test_non_linearities_are_torch_s(named: str) -> None:
    """Over a range in which they bend."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]) for name in "xy")
    node = onnx.helper.make_node("Neg", ["x"], ["z"], "z")
    graph = Graph(
        onnx.helper.make_model(
            onnx.helper.make_graph([node], "g", [x], [y], value_info=[onnx.helper.make_tensor_value_info("z", 1, [9])]),
            opset_imports=[onnx.helper.make_opsetid("", 20)],
            ir_version=10,
        )
    )
    graph.add("Identity", [activate(graph, named, "z", "f")], "last", [("y", "z", ())])
    given = np.linspace(-4, 8, 50, dtype=np.float32)
    (found,) = onnxruntime.InferenceSession(graph.finish().SerializeToString()).run(None, {"x": given})
    expected = function(named)(torch.from_numpy(-given)).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=2e-6)
    known = activation(named)
    assert known is not None
    assert known.name == named
