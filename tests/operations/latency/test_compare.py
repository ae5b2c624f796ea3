"""compare: adapters of the library and of peft on the golden BERT, as graphs beside its own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peft
import pytest
import torch
import transformers
from click.testing import Result
from places import GOLDEN
from safetensors.torch import load_file

import surgery
from formats.errors import OutputExists, PathNotFound, ReportedError
from surgery.errors import NothingToDo, ProviderUnavailable, UnknownArchitecture, Unsupported
from surgery.onnx.timing.compared import AdapterGraph, ComparedAdapter, CompareReport, read_comparison
from surgery.onnx.trace import template

WRITTEN = GOLDEN / "bottleneck"

BERT = WRITTEN / "bert"
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
# method, placement, f, how much folds, the forms of the graphs
TOLD = {
    "lora": ("LoRA", "parallel", "none", "yes", ["merged", "branch"]),
    "ia3": ("(IA)³", "sequential", "none", "yes", ["merged"]),
    "double_seq_bn": ("Houlsby", "sequential", "silu", "half", ["half-folded", "branch"]),
    "double_seq_bn_linear": ("Houlsby", "sequential", "none", "yes", ["folded", "branch"]),
    "seq_bn": ("Pfeiffer", "sequential", "relu", "no", ["branch"]),
    "par_bn_gelu": ("scaled parallel", "parallel", "gelu", "yes", ["widened", "branch"]),
    "compacter++": ("compacter++", "sequential", "gelu", "no", ["branch"]),
    "prefix_tuning": ("prefix", "parallel", "softmax", "no", ["constants"]),
    "prompt_tuning": ("prompt", "input", "none", "no", ["constants"]),
    "mam": ("prefix + scaled parallel", "parallel", "softmax + relu", "no", ["branch"]),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The golden BERT as a folder, with peft's adapters of it; each architecture is traced but once."""
    folder = tmp_path_factory.mktemp("compare")
    save_bert(folder / "model")
    lora = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    ia3 = peft.IA3Config(target_modules=["key"], feedforward_modules=[], init_ia3_weights=False)
    words = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)  # take positions
    for name, config in (("lora", lora), ("ia3", ia3), ("words", words)):
        torch.manual_seed(1)
        peft.get_peft_model(transformers.AutoModel.from_pretrained(folder / "model"), config).save_pretrained(
            folder / name
        )
    traced: dict[str, Any] = {}
    build = template.build_templates

    def once(model: Any, specs: Any, dtype: Any) -> Any:
        key = repr((model.name, sorted((name, spec.shape) for name, spec in specs.items())))
        return traced.setdefault(key, None) or traced.update({key: build(model, specs, dtype)}) or traced[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "build_templates", once)
        yield folder


def save_bert(folder: Path) -> None:
    """The golden model, with gelu in its MLPs."""
    model = transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=16, max_position_embeddings=16))
    model.load_state_dict(load_file(BERT / "base.st"))
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def compared(root: Path) -> CompareReport:
    """Ten adapters, without times; their graphs are kept."""
    paths = [root / name if (root / name).exists() else BERT / name for name in TOLD]
    return surgery.compare(root / "model", paths, out=root / "graphs", shapes=[(1, 5)], seconds=0)


def graphs(report: CompareReport) -> list[tuple[ComparedAdapter, AdapterGraph]]:
    """All of a report that has no times."""
    return [(adapter, graph) for adapter, graph, _ in report.rows()]


@pytest.mark.parametrize("name", TOLD)
def test_each_adapter_is_what_it_is(compared: CompareReport, name: str) -> None:
    """Method, placement, non-linearity, how much folds and why, and as what it is in graphs."""
    adapter = next(each for each in compared.adapters if each.name == name)
    method, placement, f, folds, forms = TOLD[name]
    assert (adapter.method, adapter.placement, adapter.non_linearity) == (method, placement, f)
    assert adapter.folds == folds
    assert [graph.form for graph in adapter.graphs] == forms
    assert all(each.reason for each in adapter.becomes)
    assert {each.way for each in adapter.becomes} == {
        "yes": {"widened"} if "widened" in forms else {"folded"},
        "half": {"half-folded"},
        "no": {"graph"},
    }[folds]


def test_trained_parameters_are_those_of_the_file(compared: CompareReport, root: Path) -> None:
    """But for what a file has twice: a prefix is held by the model and by every layer."""
    base = sum(tensor.numel() for tensor in load_file(root / "model" / "model.safetensors").values())
    assert compared.parameters == base
    for adapter in compared.adapters:
        file = next(each for each in Path(adapter.path).iterdir() if each.suffix in (".safetensors", ".bin"))
        tensors = torch.load(file, weights_only=True) if file.suffix == ".bin" else load_file(file)
        assert adapter.parameters == sum(each.numel() for key, each in tensors.items() if ".pool." not in key)
        assert adapter.share == adapter.parameters / base


def test_what_folds_runs_the_base_s_graph(compared: CompareReport) -> None:
    """Byte for byte where shapes stay; a widened one has as many nodes; all others have more."""
    for adapter, graph in graphs(compared):
        assert graph.same_graph == (graph.form in ("merged", "folded")), adapter.name
        assert (graph.added == 0) == (graph.form in ("merged", "folded", "widened")), adapter.name
        assert graph.added == graph.nodes - compared.nodes >= 0
        assert graph.error <= graph.tolerance
        same = Path(graph.path).read_bytes() == Path(compared.graph).read_bytes()
        assert same == graph.same_graph
    halves = next(each.graphs for each in compared.adapters if each.name == "double_seq_bn")
    assert halves[0].added < halves[1].added


@pytest.mark.parametrize("name", [name for name in TOLD if (BERT / name).exists()])
def test_every_graph_gives_what_the_library_gives(compared: CompareReport, name: str) -> None:
    """In whichever form."""
    golden = load_file(BERT / name / "outputs.st")
    for adapter, graph in graphs(compared):
        if adapter.name == name:
            session = onnxruntime.InferenceSession(graph.path, providers=["CPUExecutionProvider"])
            ids = golden["input_ids"].numpy()
            feed = {e.name: np.full(ids.shape, int(e.name == "attention_mask")) for e in session.get_inputs()}
            found = torch.from_numpy(session.run(None, feed | {"input_ids": ids})[0])
            torch.testing.assert_close(found, golden["last_hidden_state"], atol=1e-5, rtol=1e-5)


def test_what_the_reader_must_know_is_noted(compared: CompareReport) -> None:
    """A prompt's tokens are computed; what has no graph as a branch says why."""
    assert [note.partition(":")[0] for note in compared.notes] == ["ia3 cannot be a branch", "prompt_tuning"]
    assert "3 tokens more" in compared.notes[1]
    assert [each.tokens for each in compared.adapters if each.tokens] == [3]


def test_all_are_timed_and_kept(root: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Through the command line: a row for each graph, a record that can be printed and drawn again."""
    record, page, picture = tmp_path / "record.json", tmp_path / "costs.html", tmp_path / "costs.svg"
    adapters = ("--adapter", root / "lora", "--adapter", f"Houlsby's={BERT / 'double_seq_bn'}")
    how = ("--shape", "1x4", "--shape", "2x3", "--seconds", "12", "--margin", "0.5", "--threads", "1", "--no-branch")
    done = cli("compare", root / "model", *adapters, *how, "--record", record, "--report", page)
    assert done.exit_code == 0, done.stderr
    report = read_comparison(record)
    assert report.bench is not None
    rows = list(report.rows())
    assert [(adapter.name, found.shape) for adapter, _, found in rows if found is not None] == [
        (name, shape) for name in ("lora", "Houlsby's") for shape in ((1, 4), (2, 3))
    ]
    assert all(found is not None and found.graph == graph.path for _, graph, found in rows)
    assert report.bench.same_graph[rows[0][1].path]
    for said in ("lora, merged", "Houlsby's, half-folded", "sequential", f"record: {record}", f"report: {page}"):
        assert said in done.stdout.replace("\n", "")
    assert not Path(report.graph).exists()
    again = cli("compare", "--replay", record, "--report", picture)
    assert again.stdout.splitlines()[:-2] == done.stdout.splitlines()[:-2]
    assert picture.read_text(encoding="utf-8").startswith("<svg")
    assert json.loads(cli("compare", "--replay", record, "--json").stdout) == json.loads(record.read_text())
    assert "<table" in page.read_text(encoding="utf-8")


def test_a_record_of_bench_is_none_of_compare(tmp_path: Path) -> None:
    """Nor is anything else."""
    (tmp_path / "r.json").write_text('{"operation": "bench"}')
    with pytest.raises(ReportedError, match="not a record of surgery compare"):
        read_comparison(tmp_path / "r.json")


def test_a_report_is_frozen(compared: CompareReport) -> None:
    """As all are."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        compared.nodes = 1  # type: ignore[misc]


def refused(root: Path, out: Path, *adapters: Any, model: str = "model", **how: Any) -> ReportedError:
    """What compare says, before it times anything or leaves anything."""
    with pytest.raises(ReportedError) as caught:
        surgery.compare(root / model, adapters, out=out, **{"seconds": 0.0, "shapes": [(1, 5)], **how})
    assert not out.exists()
    return caught.value


def test_bad_input_is_refused_in_a_sentence(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No adapter, one that is not there, two of one name, another model's, settings that make no sense."""
    out, lora = tmp_path / "out", root / "lora"
    monkeypatch.setattr(
        "surgery.operations.latency.compare.new_graphs", None
    )  # nothing is traced before these are found
    assert isinstance(refused(root, out), NothingToDo)
    assert isinstance(refused(root, out, root / "nowhere"), PathNotFound)
    twice = refused(root, out, lora, ("lora", BERT / "seq_bn"))
    assert isinstance(twice, Unsupported)
    assert "NAME=" in str(twice)
    for name in ("base", "a/b", ".."):
        assert "cannot be called that" in str(refused(root, out, (name, lora)))
    other = refused(root, out, lora, WRITTEN / "gpt2" / "seq_bn")
    assert other.details["adapter"] == f"seq_bn ({WRITTEN / 'gpt2' / 'seq_bn'})"
    assert "positive shapes" in str(refused(root, out, lora, shapes=[]))
    assert "cannot measure" in str(refused(root, out, lora, margin=2.0))
    assert isinstance(refused(root, out, lora, provider="abacus"), ProviderUnavailable)
    composed = tmp_path / "composed"
    composed.mkdir()
    (composed / "adapter_fusion_config.json").write_text("{}")
    assert "AdapterFusion" in str(refused(root, out, composed))


def test_models_that_are_no_single_graph_are_refused(root: Path, tmp_path: Path) -> None:
    """A class that transformers does not have; an encoder and a decoder."""
    save_bert(root / "strange")
    config = root / "strange" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["BertOfMine"]}))
    assert isinstance(refused(root, tmp_path / "out", BERT / "seq_bn", model="strange"), UnknownArchitecture)
    t5 = transformers.T5Config(vocab_size=16, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
    model = transformers.T5ForConditionalGeneration(t5)
    model.save_pretrained(root / "t5")
    config_of_t5 = peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)
    peft.get_peft_model(model, config_of_t5).save_pretrained(root / "t5-lora")
    assert "this model is several" in str(refused(root, tmp_path / "out", root / "t5-lora", model="t5"))


def test_what_cannot_run_leaves_nothing(root: Path, tmp_path: Path) -> None:
    """A shape longer than the model's positions, too little time for a verdict: found before anything is timed."""
    lora = root / "lora"
    assert "at this shape" in str(refused(root, tmp_path / "out", lora, shapes=[(1, 17)]))
    longer = refused(root, tmp_path / "out", BERT / "seq_bn", ("words", root / "words"), shapes=[(1, 15)])
    assert "at this shape" in str(longer)
    assert longer.details["adapter"].startswith("words (")
    assert "too little time" in str(refused(root, tmp_path / "out", lora, seconds=1e-6))


def test_graphs_and_record_need_places_of_their_own(root: Path, tmp_path: Path) -> None:
    """What stands there stays."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputExists):
        surgery.compare(root / "model", [root / "lora"], out=tmp_path / "out", seconds=0)
    with pytest.raises(OutputExists):
        surgery.compare(root / "model", [root / "lora"], record=tmp_path / "out" / "mine", seconds=0)
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "arguments",
    ["model", "--adapter a", "model --replay r", "model --adapter a --seconds 0 --report p.svg"],
    ids=["no adapter", "no model", "replay and model", "a picture of no times"],
)
def test_usage(cli: Callable[..., Result], arguments: str) -> None:
    """Asked wrongly is exit code 2."""
    assert cli("compare", *arguments.split()).exit_code == 2
