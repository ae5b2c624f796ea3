"""Heads that the library adapters saves beside an adapter, as tests/golden/make_bottleneck.py made them: carried into
the folded or merged model where its class has that head, and told where it has not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bottleneck_models import GOLDEN, built, inputs, saved
from safetensors.torch import load_file, save_file

import surgery
from surgery.operations.fold.verdicts import Way

HEADS = GOLDEN / "heads"
CARRIED = {  # with the class whose head it is
    "bert_static": ("BertForSequenceClassification", 2),
    "bert_static_lora": ("BertForSequenceClassification", 2),
    "bert_classification": ("BertForSequenceClassification", 3),
    "bert_tagging": ("BertForTokenClassification", 3),
    "roberta_classification": ("RobertaForSequenceClassification", 3),
    "vit_image": ("ViTForImageClassification", 3),
}


def model(case: str, folder: Path, kind: str | None = None, labels: int | None = None) -> Path:
    """The golden model with a head of its own, whose weights are random."""
    named, count = CARRIED.get(case, ("BertForSequenceClassification", 3))
    auto = {"Image": "AutoModelForImageClassification", "Token": "AutoModelForTokenClassification"}
    kind = kind or named
    made = next((each for part, each in auto.items() if part in kind), "AutoModelForSequenceClassification")
    torch.manual_seed(0)
    built(case.partition("_")[0], made, num_labels=labels or count).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CARRIED)
def test_a_head_goes_along_where_the_class_has_it(tmp_path: Path, case: str) -> None:
    """The logits are those of the library's model, which no head of the base's own gives."""
    golden, base = load_file(HEADS / case / "outputs.st"), model(case, tmp_path / "base")
    report = surgery.fold(base, HEADS / case, tmp_path / "out")
    assert {each.way for each in report.verdicts} == {Way.FOLDED}
    assert "in full" in {each.what for each in report.verdicts}
    kind = getattr(transformers, CARRIED[case][0])
    logits = [kind.from_pretrained(folder).eval()(**inputs(golden)).logits for folder in (tmp_path / "out", base)]
    torch.testing.assert_close(logits[0], golden["logits"], atol=1e-5, rtol=1e-5)
    assert (logits[1] - golden["logits"]).abs().max() > 1e-2


LEFT: list[tuple[str, dict[str, Any], str]] = [
    ("bert_classification_two", {}, "has no such head: classification, layers = 2"),
    ("bert_classification", {"kind": "BertForTokenClassification"}, "BertForTokenClassification has no such head"),
    ("bert_static", {"kind": "BertForTokenClassification"}, "the base is a BertForTokenClassification"),
    ("bert_static_lora", {"kind": "BertForTokenClassification"}, "the base is a BertForTokenClassification"),
    ("bert_classification", {"labels": 5}, "give the base the same number of labels first"),
]


@pytest.mark.parametrize(("case", "base", "reason"), LEFT)
def test_a_head_that_the_class_has_not_is_told(tmp_path: Path, case: str, base: dict[str, Any], reason: str) -> None:
    """In the table, and in a note; the base keeps its own."""
    folder = model(case, tmp_path / "base", **base)
    report = surgery.fold(folder, HEADS / case, tmp_path / "out")
    assert [each.reason for each in report.verdicts if each.way is Way.LEFT and reason in each.reason]
    assert report.verdicts == surgery.prepare_fold(folder, HEADS / case, tmp_path / "again").verdicts
    assert any("is left" in note and reason in note for note in report.notes)
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "out"))
    assert torch.equal(before["classifier.weight"], after["classifier.weight"])


def test_a_base_without_a_head_keeps_none(tmp_path: Path) -> None:
    """Nor does a lone file, of which nothing says what class it is."""
    report = surgery.fold(saved("bert", tmp_path / "base"), HEADS / "bert_static", tmp_path / "out")
    assert [each.reason for each in report.verdicts if each.way is Way.LEFT] == ["the base is a BertModel"]
    report = surgery.fold(GOLDEN / "bert" / "base.st", HEADS / "bert_static_lora", tmp_path / "out.st")
    assert [each.reason for each in report.verdicts if each.way is Way.LEFT] == [
        "the base's class is unknown, because it has no config.json that names it"
    ]


def test_a_merged_head_comes_off_again(tmp_path: Path) -> None:
    """LoRA with a head: the receipt keeps the base's own."""
    base = model("bert_static_lora", tmp_path / "base")
    surgery.merge(base, HEADS / "bert_static_lora", tmp_path / "merged")
    surgery.unmerge(tmp_path / "merged", HEADS / "bert_static_lora", tmp_path / "back")
    before, back = (load_file(each / "model.safetensors") for each in (base, tmp_path / "back"))
    assert torch.equal(before["classifier.weight"], back["classifier.weight"])
    assert surgery.verify(tmp_path / "merged", base, HEADS / "bert_static_lora").verdict == "exact"
    report = surgery.convert(HEADS / "bert_static_lora", tmp_path / "peft", "peft", base=base)
    assert [note for note in report.notes if "the head stored with the adapter was not converted" in note]


def test_a_graph_does_not_leave_a_head_out(tmp_path: Path) -> None:
    """Of an adapter beside the weights: fold says how it goes in."""
    base = model("bert_static", tmp_path / "base")
    for case in ("bert_static", "bert_static_lora"):
        with pytest.raises(surgery.ReportedError, match=r"in full|full weights|beside"):
            surgery.export_onnx(base, tmp_path / "out.onnx", adapters=[HEADS / case])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def edited(folder: Path, case: str) -> Path:
    """A copy of an adapter with its head."""
    shutil.copytree(HEADS / case, folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize("missing", ["head_config.json", "model_head.safetensors"])
def test_half_a_head_is_refused(tmp_path: Path, missing: str) -> None:
    """Whichever half it is."""
    base, adapter = model("bert_classification", tmp_path / "base"), edited(tmp_path, "bert_classification")
    (adapter / missing).unlink()
    with pytest.raises(surgery.ReportedError, match="head saved next to the adapter"):
        surgery.fold(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_of_something_else_is_refused(tmp_path: Path) -> None:
    """Tensors that its config does not explain, a config that is none, or numbers that are none."""
    base, adapter = model("bert_classification", tmp_path / "base"), edited(tmp_path, "bert_classification")
    weights, config = adapter / "model_head.safetensors", adapter / "head_config.json"
    tensors = load_file(weights)
    for name, tensor in (("heads.style.7.weight", torch.zeros(3, 8)), ("pooler.weight", torch.zeros(3, 8))):
        save_file({**tensors, name: tensor}, weights)
        with pytest.raises(surgery.ReportedError, match="contradict its config"):
            surgery.fold(base, adapter, tmp_path / "out")
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, weights)
    with pytest.raises(surgery.ReportedError, match="NaN"):
        surgery.fold(base, adapter, tmp_path / "out")
    for text in ("[]", "{", json.dumps({"config": 1})):
        config.write_text(text)
        with pytest.raises(surgery.ReportedError, match="cannot be read"):
            surgery.fold(base, adapter, tmp_path / "out")


class Runs:
    """What a pickle may carry."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_a_head_s_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that holds more than tensors is refused."""
    base, adapter = model("bert_static", tmp_path / "base"), edited(tmp_path, "bert_static")
    torch.save({"classifier.weight": Runs()}, adapter / "pytorch_model_head.bin")
    with pytest.raises(surgery.ReportedError):
        surgery.fold(base, adapter, tmp_path / "out")
    assert "run" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
