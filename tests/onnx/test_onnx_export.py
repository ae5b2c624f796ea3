from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from blake3 import blake3
from safetensors.torch import load_file, save_file

from formats import open_checkpoint
from formats.errors import NotACheckpoint, OutputExists, PathNotFound, WriteFailed
from surgery.errors import MissingTensors, UnknownArchitecture, Unsupported, VerificationFailed
from surgery.onnx.files.payload import METADATA, PAYLOAD, payload_layout
from surgery.onnx.trace import template
from surgery.onnx.trace.template import Template
from surgery.operations.export import files as onnx_files
from surgery.operations.export.export_onnx import export_onnx

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def bert_template(twins: Callable[[str], Any]) -> Template:
    """The graph of the tiny BERT, without its location of the weights."""
    base = twins("bert")[0]
    model = onnx.load(base.onnx, load_external_data=False)
    with open_checkpoint(base.model) as checkpoint:
        return Template(model, tuple(sorted(checkpoint.specs.values(), key=lambda spec: spec.name)), ())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, bert_template: Template) -> None:
    """Spares tests that are about files the seconds that building a BERT's graph takes."""
    monkeypatch.setattr(template, "build_templates", lambda model, specs, dtype: (bert_template,))


@pytest.fixture
def model(tmp_path: Path, bert: Any) -> Path:
    """A copy of the BERT's folder."""
    return shutil.copytree(bert.model, tmp_path / "model")


def _left(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")} if folder.exists() else set()


def test_report_is_plain_and_complete(bert: Any) -> None:
    """The report goes through JSON and says what was made, how it compares and what was left out."""
    report = json.loads(json.dumps(dataclasses.asdict(bert.report)))
    assert report["operation"] == "export-onnx"
    assert report["output"] == str(bert.onnx)
    (graph,) = report["graphs"]
    assert graph["path"] == str(bert.onnx)
    assert graph["sha256"] == hashlib.sha256(bert.onnx.read_bytes()).hexdigest()
    assert report["payload_blake3"] == blake3(Path(report["payload"]).read_bytes()).hexdigest()
    assert graph["nodes"] == len(onnx.load(bert.onnx, load_external_data=False).graph.node)
    assert 0 < graph["nodes_run"] < graph["nodes"]
    assert 0 < report["max_rel_error"] < report["tolerance"] < 1e-4
    assert report["max_abs_error"] > 0
    assert {fate: count for fate, count in report["ledger"].items() if count} == {"copied": 39}
    assert graph["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert graph["outputs"] == ["last_hidden_state", "pooler_output"]
    assert report["worst"].split()[0] in graph["outputs"]
    assert report["model_class"] == "BertModel"
    assert report["seconds"] > 0
    assert report["peak_rss_bytes"] > 1 << 20


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_runs_like_torch(twins: Callable[[str], Any], loads_silently: Callable[..., Any], kind: str) -> None:
    """Loaded from disk by ONNX Runtime without a word, checked by onnx, equal to torch, with another shape."""
    for exported in twins(kind):
        onnx.checker.check_model(str(exported.onnx), full_check=True)
        session = loads_silently(exported.onnx)
        rng = np.random.default_rng(5)
        feed = {entry.name: np.ones((4, 11), np.int64) for entry in session.get_inputs()}
        feed["input_ids"] = rng.integers(0, 100, (4, 11))
        theirs = getattr(transformers, exported.report.model_class).from_pretrained(exported.model).eval()
        with torch.no_grad():
            expected = theirs(**{name: torch.from_numpy(array) for name, array in feed.items()})
        for output, array in zip(session.get_outputs(), session.run(None, feed), strict=True):
            np.testing.assert_allclose(array, expected[output.name].numpy(), rtol=1e-4, atol=1e-5)


def test_a_warning_would_be_seen(bert: Any, tmp_path: Path, loads_silently: Callable[..., Any]) -> None:
    """Of a weight that no node uses ONNX Runtime warns; or that nothing is said elsewhere would show nothing."""
    model = onnx.load(bert.onnx)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(4, np.float32), "nobody's"))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(AssertionError, match="nobody's"):
        loads_silently(tmp_path / "model.onnx")


def test_the_payload_is_canonical(bert: Any, model: Path, tmp_path: Path, quick: None) -> None:
    """Whatever metadata and order the source has, the payload is a function of its tensors alone."""
    tensors = load_file(model / PAYLOAD)
    save_file(dict(reversed(tensors.items())), model / PAYLOAD, metadata={"surgery.receipt": "x" * 999})
    export_onnx(model, tmp_path / "out/model.onnx", verify=False)
    assert (tmp_path / "out" / PAYLOAD).read_bytes() == (bert.onnx.parent / PAYLOAD).read_bytes()
    with open_checkpoint(tmp_path / "out" / PAYLOAD) as checkpoint:
        assert checkpoint.metadata == METADATA


def test_every_initialiser_points_at_its_tensor(bert: Any) -> None:
    """What onnx reads through the graph is what the checkpoint holds under the same name."""
    tensors = load_file(bert.model / PAYLOAD)
    loaded = onnx.load(bert.onnx)
    outside = {t.name: onnx.numpy_helper.to_array(t) for t in loaded.graph.initializer if t.name in tensors}
    assert outside.keys() == tensors.keys()
    for name, array in outside.items():
        np.testing.assert_array_equal(array, tensors[name].numpy())


def test_shards_give_the_same_files(bert: Any, tmp_path: Path, quick: None) -> None:
    """A sharded folder is one checkpoint."""
    sharded = tmp_path / "sharded"
    transformers.BertModel.from_pretrained(bert.model).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    report = export_onnx(sharded, tmp_path / "out/model.onnx")
    assert report.graphs[0].sha256 == bert.report.graphs[0].sha256
    assert report.payload_blake3 == bert.report.payload_blake3


def test_half_precision(tmp_path: Path, make_model: Make) -> None:
    """float16 checkpoints are exported and compared in float16, with the tolerance of its rounding."""
    report = export_onnx(make_model(tmp_path / "m", "bert", dtype="float16"), tmp_path / "out/model.onnx")
    assert report.dtype == "F16"
    assert 1e-6 < report.max_rel_error < report.tolerance < 0.05


@pytest.mark.parametrize("missing", ["config.json", "the folder", "the weights", "a tensor"])
def test_bad_models(model: Path, tmp_path: Path, missing: str) -> None:
    """Each is refused by its own error, and nothing is left at the output."""
    if missing == "config.json":
        (model / "config.json").unlink()
        expected: type[Exception] = UnknownArchitecture
    elif missing == "the folder":
        shutil.rmtree(model)
        expected = PathNotFound
    elif missing == "the weights":
        (model / PAYLOAD).unlink()
        expected = NotACheckpoint
    else:
        tensors = load_file(model / PAYLOAD)
        del tensors["encoder.layer.0.attention.self.key.weight"]
        save_file(tensors, model / PAYLOAD)
        expected = MissingTensors
    with pytest.raises(expected) as caught:
        export_onnx(model, tmp_path / "out/model.onnx")
    if missing == "a tensor":
        assert "encoder.layer.0.attention.self.key.weight" in str(caught.value)
    assert _left(tmp_path / "out") == set()


def test_a_file_is_no_model(model: Path, tmp_path: Path) -> None:
    """A weight file alone says nothing about the graph."""
    with pytest.raises(NotACheckpoint, match="folder"):
        export_onnx(model / PAYLOAD, tmp_path / "out/model.onnx")


def test_the_output_is_an_onnx_file(model: Path, tmp_path: Path) -> None:
    """A folder as output is refused by saying which file to name."""
    with pytest.raises(Unsupported) as caught:
        export_onnx(model, tmp_path / "out")
    assert caught.value.details["next"] == f"pass -o {tmp_path / 'out' / 'model.onnx'}"


def test_a_payload_of_another_model_is_not_replaced(model: Path, tmp_path: Path, quick: None) -> None:
    """Two exports into one folder would share one payload: refused, with the advice; --force replaces both files."""
    out = tmp_path / "out"
    export_onnx(model, out / "base.onnx", verify=False)
    first = (out / PAYLOAD).read_bytes()
    tensors = load_file(model / PAYLOAD)
    tensors["pooler.dense.bias"] += 1
    save_file(tensors, model / PAYLOAD)
    with pytest.raises(OutputExists, match="another model's weights") as caught:
        export_onnx(model, out / "merged.onnx", verify=False)
    assert "base/model.onnx, merged/model.onnx" in caught.value.details["next"]
    assert _left(out) == {"base.onnx", PAYLOAD}
    assert (out / PAYLOAD).read_bytes() == first
    export_onnx(model, out / "merged.onnx", verify=False, force=True)
    assert (out / PAYLOAD).read_bytes() != first


def test_the_same_payload_is_kept(model: Path, tmp_path: Path, quick: None) -> None:
    """The same weights again need no second copy and no --force; the graph's own name does."""
    out = tmp_path / "out"
    export_onnx(model, out / "one.onnx", verify=False)
    before = (out / PAYLOAD).stat()
    export_onnx(model, out / "two.onnx")
    assert (out / PAYLOAD).stat().st_ino == before.st_ino
    assert (out / "one.onnx").read_bytes() == (out / "two.onnx").read_bytes()
    with pytest.raises(OutputExists):
        export_onnx(model, out / "two.onnx", verify=False)
    export_onnx(model, out / "two.onnx", verify=False, force=True)


def test_into_a_folder_that_holds_other_things(model: Path, tmp_path: Path, quick: None) -> None:
    """What stands in the output's folder stays there."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text("{}")
    export_onnx(model, out / "model.onnx", verify=False)
    assert _left(out) == {"tokenizer.json", "model.onnx", PAYLOAD}


def test_a_linked_payload_is_no_payload(model: Path, tmp_path: Path, quick: None) -> None:
    """onnx refuses links; so a link to the right bytes is a conflict, and what it leads to is not touched."""
    out = tmp_path / "out"
    export_onnx(model, out / "model.onnx", verify=False)
    elsewhere = tmp_path / "elsewhere.safetensors"
    (out / PAYLOAD).rename(elsewhere)
    (out / PAYLOAD).symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    with pytest.raises(OutputExists) as caught:
        export_onnx(model, out / "again.onnx", verify=False)
    assert caught.value.details["found"] == "a link"
    export_onnx(model, out / "model.onnx", verify=False, force=True)
    assert not (out / PAYLOAD).is_symlink()
    assert elsewhere.read_bytes() == before


@pytest.mark.parametrize("fresh", [True, False])
def test_a_graph_that_disagrees_with_torch_is_not_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bert_template: Template, fresh: bool
) -> None:
    """Query and key swapped: same shapes, another model. The comparison says no, and nothing appears."""
    swapped = onnx.ModelProto()
    swapped.CopyFrom(bert_template.model)
    names = {"query.weight": "key.weight", "key.weight": "query.weight"}
    for node in swapped.graph.node:
        for index, name in enumerate(node.input):
            for mine, other in names.items():
                if name == f"encoder.layer.1.attention.self.{mine}":
                    node.input[index] = f"encoder.layer.1.attention.self.{other}"
    wrong = dataclasses.replace(bert_template, model=swapped)
    monkeypatch.setattr(template, "build_templates", lambda model, specs, dtype: (wrong,))
    out = tmp_path / "out"
    if not fresh:
        out.mkdir()
    with pytest.raises(VerificationFailed) as caught:
        export_onnx(model, out / "model.onnx")
    assert caught.value.exit_code == 3
    assert _left(out) == set()
    assert out.exists() is not fresh


def test_ties_stored_with_different_values(tmp_path: Path, make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would untie them by value; a graph that must not depend on values refuses and says what to set."""
    folder = make_model(tmp_path / "m", "gpt2")
    tensors = load_file(folder / PAYLOAD)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    save_file(tensors, folder / PAYLOAD)
    with open_checkpoint(folder) as checkpoint:
        weights = tuple(checkpoint.specs.values())
    tied = Template(onnx.ModelProto(), weights, (("transformer.wte.weight", "lm_head.weight"),))
    monkeypatch.setattr(template, "build_templates", lambda model, specs, dtype: (tied,))
    with pytest.raises(Unsupported) as caught:
        export_onnx(folder, tmp_path / "out/model.onnx")
    assert "tie_word_embeddings" in caught.value.details["next"]


def test_a_full_disk_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """An error while the payload is written leaves neither file."""

    def full(*args: object) -> None:
        raise WriteFailed("the disk is full")

    monkeypatch.setattr(onnx_files, "write_payload", full)
    with pytest.raises(WriteFailed):
        export_onnx(model, tmp_path / "out/model.onnx")
    assert _left(tmp_path / "out") == set()


def test_payload_layout_depends_on_specs_alone(bert_template: Template) -> None:
    """Any order of the specs gives the same header and offsets."""
    assert payload_layout(bert_template.weights) == payload_layout(reversed(bert_template.weights))
