"""fold against the library adapters: what tests/golden/make_bottleneck.py made is what the folded, widened, half-folded
and grafted models give in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bottleneck_models import CASES, GOLDEN, inputs, saved, sites
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from formats.grafts import BranchGraft, PrefixGraft, PromptGraft, Value, read_grafts
from formats.paths import open_checkpoint
from surgery.onnx.against_torch.sites import in_module
from surgery.onnx.against_torch.torch_hooks import attach_branch
from surgery.operations.fold.verdicts import Way

# What becomes of each config where the norms come behind (with gelu), and where they come before.
WAYS = {
    "compacter": (Way.HALF, Way.HALF),
    "compacter++": (Way.GRAPH, Way.GRAPH),
    "compacter_linear": (Way.FOLDED, Way.FOLDED),
    "double_seq_bn": (Way.HALF, Way.HALF),
    "double_seq_bn_linear": (Way.FOLDED, Way.FOLDED),
    "par_bn": (Way.GRAPH, Way.GRAPH),
    "par_bn_gelu": (Way.WIDENED, Way.GRAPH),
    "par_bn_linear": (Way.WIDENED, Way.GRAPH),
    "scaled_par_bn": (Way.GRAPH, Way.GRAPH),
    "seq_bn": (Way.GRAPH, Way.GRAPH),
    "mam": (Way.GRAPH, Way.GRAPH),
    "prefix_tuning": (Way.GRAPH, Way.GRAPH),
    "prefix_tuning_flat": (Way.GRAPH, Way.GRAPH),
    "prompt_tuning": (Way.GRAPH, Way.GRAPH),
}
BEFORE = ("gpt2", "llama", "vit")


def executed(folder: Path, given: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A folded model's last hidden state, with whatever it left for the graph put there."""
    from transformers import AutoModel, DynamicCache

    model = AutoModel.from_pretrained(folder).eval()
    more: dict[str, Any] = {}
    heads: list[tuple[torch.Tensor, torch.Tensor]] = []
    for site, tensors in sites(folder):
        if isinstance(site, BranchGraft):
            attach_branch(model, in_module(site, model), tensors)
        elif isinstance(site, PrefixGraft):
            assert not site.moves_positions
            keys, values = (tensors[role].unflatten(1, (-1, 4)).transpose(0, 1)[None] for role in ("keys", "values"))
            heads.append((keys, values))
        else:
            assert isinstance(site, PromptGraft)
            assert not site.among_words
            put_before(model, tensors["embedding"])
    if heads and folder.name.startswith(("gpt2", "llama")):
        more = {
            "past_key_values": DynamicCache(),
            "position_ids": torch.arange(given["input_ids"].shape[1]).view(1, -1),
        }
        for layer, pair in enumerate(heads):
            more["past_key_values"].update(*pair, layer)
    elif heads:
        attention, states = nn.functional.scaled_dot_product_attention, iter(heads)

        def prefixed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any) -> torch.Tensor:
            keys, values = next(states)
            return attention(q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), **how)

        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", prefixed)
    with torch.no_grad():
        found: torch.Tensor = model(**given, **more).last_hidden_state
    return found


def put_before(model: nn.Module, embedding: torch.Tensor) -> None:
    """A prompt behind everything that embeds."""
    model.get_submodule("embeddings").register_forward_hook(
        lambda module, args, h: torch.cat([embedding[None], h], dim=1)
    )


@pytest.mark.parametrize(("model", "name"), CASES)
def test_the_folded_model_gives_what_the_library_gives(
    tmp_path: Path, model: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every config that the library knows, within 1e-5 in float32."""
    adapter, golden = GOLDEN / model / name, load_file(GOLDEN / model / name / "outputs.st")
    report = surgery.fold(saved(model, tmp_path / "base"), adapter, tmp_path / f"{model}-folded")
    way = WAYS[name][model in BEFORE]
    assert {each.way for each in report.verdicts} == {way}
    assert (report.grafts is None) == (way in (Way.FOLDED, Way.WIDENED))
    found = executed(tmp_path / f"{model}-folded", inputs(golden), monkeypatch)
    torch.testing.assert_close(found, golden["last_hidden_state"], atol=1e-5, rtol=1e-5)


def test_what_is_half_folded_reads_what_the_projection_reads(tmp_path: Path) -> None:
    """Its rows can be appended to the projection's own; where x is wider than h it reads W x instead."""
    surgery.fold(saved("gpt2", tmp_path / "base"), GOLDEN / "gpt2" / "double_seq_bn", tmp_path / "out")
    found = [(site, tensors) for site, tensors in sites(tmp_path / "out") if isinstance(site, BranchGraft)]
    assert [(site.layer, site.place, site.reads, site.adds_to) for site, _ in found] == [
        (layer, place, reads, Value.OUTPUT)
        for layer in (0, 1)
        for place, reads in (("mh_adapter", Value.INPUT), ("output_adapter", Value.PRODUCT))
    ]
    assert [tuple(tensors["down"].shape) for _, tensors in found] == [(4, 8)] * 4


def test_grafts_name_the_model_that_they_belong_into(tmp_path: Path) -> None:
    """By the content digest that the report tells too."""
    report = surgery.fold(saved("bert", tmp_path / "base"), GOLDEN / "bert" / "seq_bn", tmp_path / "out")
    with open_checkpoint(tmp_path / "out" / "grafts.safetensors") as checkpoint:
        grafts = read_grafts(checkpoint)
    assert (grafts.model, grafts.adapter) == (report.digest, report.adapter)
    assert report.digest == report.base_digest  # no weight changes
    assert report.ledger["copied"] == len(load_file(tmp_path / "base" / "model.safetensors"))
    assert report.ledger["grafted"] == 8


def test_a_widened_model_says_its_width(tmp_path: Path) -> None:
    """As many neurons as the widest layer's bottleneck needs; the other layer's are zeros."""
    report = surgery.fold(saved("bert", tmp_path / "base"), GOLDEN / "bert" / "par_bn_linear", tmp_path / "out")
    assert report.settings == {"intermediate_size": 12 + 2 * 4}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 20
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not tensors["encoder.layer.0.output.dense.weight"][:, 12 + 4 :].any()  # of 2 · 2 neurons
    assert tensors["encoder.layer.1.output.dense.weight"][:, 12 + 4 :].any()  # of 2 · 4


def test_a_relu_bert_takes_a_relu_adapter(tmp_path: Path) -> None:
    """The same adapter that gelu refuses: the widened model and the grafted one agree."""
    base = saved("bert", tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"hidden_act": "relu"}
    (base / "config.json").write_text(json.dumps(config))
    report = surgery.fold(base, GOLDEN / "bert" / "par_bn", tmp_path / "widened")
    assert {each.way for each in report.verdicts} == {Way.WIDENED}
    (base / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    surgery.fold(base, GOLDEN / "bert" / "par_bn", tmp_path / "grafted")
    (tmp_path / "grafted" / "config.json").write_text(json.dumps(config))
    given, patch = {"input_ids": torch.tensor([[1, 5, 2, 9, 7]])}, pytest.MonkeyPatch()
    both = [executed(tmp_path / name, given, patch) for name in ("widened", "grafted")]
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-5)


def test_a_lone_file_without_a_config_is_not_widened(tmp_path: Path) -> None:
    """Nothing says what its MLP's activation is."""
    with pytest.raises(surgery.ReportedError, match="a single file cannot hold"):
        surgery.fold(GOLDEN / "bert" / "base.st", GOLDEN / "bert" / "par_bn_gelu", tmp_path / "out.st")
    report = surgery.fold(GOLDEN / "bert" / "base.st", GOLDEN / "bert" / "par_bn_gelu", tmp_path / "out")
    assert [each.reason for each in report.verdicts if "config.json" in each.reason]


def test_a_lone_file_is_folded_into_a_lone_file(tmp_path: Path) -> None:
    """Where nothing stays in the graph."""
    surgery.fold(GOLDEN / "bert" / "base.st", GOLDEN / "bert" / "double_seq_bn_linear", tmp_path / "out.st")
    base = load_file(GOLDEN / "bert" / "base.st")
    folded = load_file(tmp_path / "out.st")
    different = {name for name in base if not torch.equal(base[name], folded[name])}
    assert different == {
        f"encoder.layer.{layer}.{place}dense.{what}"
        for layer in (0, 1)
        for place in ("attention.output.", "output.")
        for what in ("weight", "bias")
    }


@pytest.mark.parametrize("name", ["adapter", "ia3"])
def test_an_adapter_that_is_a_change_of_weights_is_merged(tmp_path: Path, name: str) -> None:
    """AdapterHub's LoRA and (IA)³: the same bytes as merge's."""
    base = GOLDEN.parent / "adapterhub" / "gpt2" / ("ia3.st" if name == "ia3" else "base.st")
    report = surgery.fold(base, base.parent / name, tmp_path / "folded.st")
    merged = surgery.merge(base, base.parent / name, tmp_path / "merged.st")
    assert report.digest == merged.digest
    assert {each.way for each in report.verdicts} == {Way.FOLDED}
    assert (tmp_path / "folded.st").read_bytes() == (tmp_path / "merged.st").read_bytes()


def test_bits_do_not_depend_on_threads(tmp_path: Path) -> None:
    """One or four, and however little memory."""
    base, adapter = GOLDEN / "bert" / "base.st", GOLDEN / "bert" / "double_seq_bn"
    for jobs in (1, 4):
        surgery.fold(base, adapter, tmp_path / str(jobs), resources=surgery.Resources(jobs=jobs, memory=1 << 10))
    for name in ("model.safetensors", "grafts.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "4" / name).read_bytes()


def test_the_output_opens_as_a_model(tmp_path: Path) -> None:
    """What lies beside is not taken for weights."""
    surgery.fold(saved("bert", tmp_path / "base"), GOLDEN / "bert" / "mam", tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert Path(checkpoint.ref.path).name == "model.safetensors"
    save_file({"x": torch.zeros(1)}, tmp_path / "x.st")
    with pytest.raises(surgery.ReportedError, match="an earlier fold left parts"):
        surgery.fold(tmp_path / "out", GOLDEN / "bert" / "seq_bn", tmp_path / "again")
    lora = GOLDEN.parent / "adapterhub" / "bert" / "adapter"
    with pytest.raises(surgery.ReportedError, match="an earlier fold left parts"):
        surgery.merge(tmp_path / "out", lora, tmp_path / "again")
