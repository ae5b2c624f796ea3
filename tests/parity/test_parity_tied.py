"""Adapters of a head that the base ties to its embedding, and of layers that peft repeats: peft is the judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models as models
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import NotMergeable, NotMerged

pytestmark = pytest.mark.filterwarnings("ignore")


def made_by_peft(folder: Path, kind: str = "llama", **settings: Any) -> torch.Tensor:
    """Saves a base and an adapter that peft made for it, every trained tensor random; the adapted model's logits."""
    tied = {"tie_word_embeddings": True} if kind == "llama" else {}
    models.build(kind, **tied).save_pretrained(folder / "base")
    adapted = peft.get_peft_model(
        models.load(kind, folder / "base"), peft.LoraConfig(r=2, lora_alpha=3, **settings)
    ).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder / "adapter")
    return models.logits(adapted)


def config_of(folder: Path) -> dict[str, Any]:
    """A folder's config.json."""
    return json.loads((folder / "config.json").read_text())


HEADS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head alone": {"target_modules": ["lm_head"]},
    "head of GPT-2": {"kind": "gpt2", "target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True},
    "head and embedding": {"target_modules": ["embed_tokens", "lm_head"]},
    "head in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head by DoRA": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
}


@pytest.mark.parametrize("case", HEADS)
def test_a_tied_head_is_refused_and_untied_when_asked(tmp_path: Path, case: str) -> None:
    """Untied it has a tensor of its own, config.json says so, and the logits are those of the model peft trained."""
    expected = made_by_peft(tmp_path, **HEADS[case])
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    with pytest.raises(NotMergeable, match="ties to its embedding") as caught:
        surgery.merge(base, adapter, merged)
    assert "--untie" in caught.value.details["next"]
    assert not merged.exists()
    report = surgery.merge(base, adapter, merged, untie=True)
    assert any("tie_word_embeddings = false" in note for note in report.notes)
    assert sum(report.ledger.values()) == len(load_file(base / "model.safetensors")) + 1
    assert config_of(merged) == config_of(base) | {"tie_word_embeddings": False}
    model = models.load(HEADS[case].get("kind", "llama"), merged)
    torch.testing.assert_close(models.logits(model), expected, atol=2e-5, rtol=1e-4)
    assert surgery.verify(merged, base, adapter).verdict == "exact"


@pytest.mark.parametrize("case", ["head", "head and embedding", "head in full", "head of GPT-2"])
@pytest.mark.parametrize("undo", [False, True])
def test_unmerge_gives_the_tied_base_back(tmp_path: Path, case: str, undo: bool) -> None:
    """Without the head, with the config as it was; bit for bit with an undo file, else within rounding."""
    made_by_peft(tmp_path, **HEADS[case])
    base, adapter, merged, back = (tmp_path / name for name in ("base", "adapter", "merged", "back"))
    file = tmp_path / "undo.st" if undo else None
    surgery.merge(base, adapter, merged, untie=True, undo=file)
    report = surgery.unmerge(merged, adapter, back, undo=file)
    if undo:
        assert report.bit_exact
        assert (back / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, back))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=1e-6)
    assert (back / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_an_adapted_embedding_alone_stays_tied_unless_asked(tmp_path: Path) -> None:
    """peft's forward leaves the head as it was, its merge changes both, which share one tensor: ours is the merge;
    untied it is the forward."""
    expected = made_by_peft(tmp_path, target_modules=["embed_tokens"])
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    surgery.merge(base, adapter, tmp_path / "tied")
    assert config_of(tmp_path / "tied") == config_of(base)
    theirs = peft.PeftModel.from_pretrained(models.load("llama", base), adapter).merge_and_unload()
    torch.testing.assert_close(models.logits(models.load("llama", tmp_path / "tied")), models.logits(theirs))
    assert not torch.allclose(models.logits(theirs), expected, atol=1e-2)
    surgery.merge(base, adapter, tmp_path / "untied", untie=True)
    torch.testing.assert_close(models.logits(models.load("llama", tmp_path / "untied")), expected, atol=2e-5, rtol=1e-4)


def test_peft_merges_the_delta_of_a_tied_head_into_the_embedding_too(tmp_path: Path) -> None:
    """Which is not the model it trained: here peft's merge is no judge."""
    expected = made_by_peft(tmp_path, target_modules=["lm_head"])
    merged = peft.PeftModel.from_pretrained(
        models.load("llama", tmp_path / "base"), tmp_path / "adapter"
    ).merge_and_unload()
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    assert not torch.allclose(models.logits(merged), expected, atol=1e-2)


def test_there_must_be_a_head_to_untie(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """A base with a head of its own, or a file without a config, ties none."""
    made_by_peft(tmp_path, target_modules=["q_proj", "lm_head"])
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    assert cli("merge", base, adapter, "-o", merged).exit_code == 1
    assert cli("merge", base, adapter, "-o", merged, "--untie", "--dry-run").exit_code == 0
    assert cli("merge", base, adapter, "-o", merged, "--untie").exit_code == 0
    with pytest.raises(NotMergeable, match="ties no head"):
        surgery.merge(merged, adapter, tmp_path / "again", untie=True)


REPLICATED = {"target_modules": ["q_proj", "down_proj"], "layer_replication": [[0, 2], [0, 1], [1, 2]]}


def test_repeated_layers_merge_into_the_model_that_peft_trained(tmp_path: Path) -> None:
    """Each copy with its own delta, the depth in config.json; the replay agrees. peft's merge is no judge: its copies
    share one tensor, to which it adds the deltas of all."""
    expected = made_by_peft(tmp_path, **REPLICATED)
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    report = surgery.merge(base, adapter, merged)
    tensors = load_file(merged / "model.safetensors")
    assert sum(report.ledger.values()) == len(tensors)
    assert config_of(merged)["num_hidden_layers"] == 4
    theirs = peft.PeftModel.from_pretrained(models.load("llama", base), adapter)
    for name, module in theirs.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = module.base_layer.weight + module.get_delta_weight("default")
            assert (tensors[f"{name}.weight"] - weight).abs().max() <= 1e-6 * weight.abs().max(), name
    shared = [layer.mlp.down_proj.weight.data_ptr() for layer in theirs.merge_and_unload().model.layers]
    assert len(shared) == 4
    assert len(set(shared)) == 2
    torch.testing.assert_close(models.logits(models.load("llama", merged)), expected, atol=2e-5, rtol=1e-4)
    assert surgery.verify(merged, base, adapter).verdict == "exact"


@pytest.mark.parametrize("ranges", [[[0, 2], [0, 1], [1, 2]], [[1, 2], [0, 2]]])
@pytest.mark.parametrize("undo", [False, True])
def test_repeated_layers_come_off_again(tmp_path: Path, ranges: list[list[int]], undo: bool) -> None:
    """Also where a layer of the base has another place in the result; without a receipt nothing tells the copies."""
    made_by_peft(tmp_path, **(REPLICATED | {"layer_replication": ranges}))
    base, adapter, merged, back = (tmp_path / name for name in ("base", "adapter", "merged", "back"))
    file = tmp_path / "undo.st" if undo else None
    surgery.merge(base, adapter, merged, undo=file)
    report = surgery.unmerge(merged, adapter, back, undo=file)
    assert report.bit_exact or not undo
    before, after = (load_file(folder / "model.safetensors") for folder in (base, back))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=0 if undo else 1e-6, rtol=0 if undo else 1e-6)
    assert config_of(back) == config_of(base)
    weights = merged / "model.safetensors"
    save_file(load_file(weights), weights)
    if not undo:
        with pytest.raises(NotMerged, match="repeats layers"):
            surgery.unmerge(merged, adapter, tmp_path / "other")


def test_shards_take_what_is_new(tmp_path: Path) -> None:
    """The untied head and the copies of layers go into the last of the base's shards, or into shards as asked."""
    made_by_peft(tmp_path, **(REPLICATED | {"target_modules": ["q_proj", "lm_head"]}))
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    (base / "model.safetensors").unlink()
    models.build("llama", tie_word_embeddings=True).save_pretrained(base, max_shard_size="30kB")
    assert len(list(base.glob("*.safetensors"))) > 2
    surgery.merge(base, adapter, tmp_path / "merged", untie=True, undo=tmp_path / "undo.st")
    surgery.merge(base, adapter, tmp_path / "sized", untie=True, max_shard_size=40_000)
    ours, sized = (models.logits(models.load("llama", tmp_path / name)) for name in ("merged", "sized"))
    assert torch.equal(ours, sized)
    report = surgery.unmerge(tmp_path / "merged", adapter, tmp_path / "back", undo=tmp_path / "undo.st")
    assert report.bit_exact
    before, after = (models.load("llama", folder).state_dict() for folder in (base, tmp_path / "back"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_replication_that_drops_layers_is_refused(tmp_path: Path) -> None:
    """Nothing could bring them back; and adapters for different depths do not go together."""
    made_by_peft(tmp_path, **(REPLICATED | {"layer_replication": [[0, 1], [0, 1]]}))
    file = tmp_path / "adapter/adapter_config.json"
    config = json.loads(file.read_text())
    for ranges in ([[0, 1], [0, 1]], [[0, 2], [1, 10**15]], [[-1, 2]], [0, 2], {"0": 2}, [["0", "2"]]):
        file.write_text(json.dumps(config | {"layer_replication": ranges}))
        with pytest.raises(NotMergeable, match="leaves out layers"):
            surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    made_by_peft(tmp_path / "plain", target_modules=["q_proj"])
    with pytest.raises(NotMergeable, match="different depth"):
        surgery.merge(tmp_path / "base", [tmp_path / "adapter", tmp_path / "plain/adapter"], tmp_path / "merged")


def test_repeated_layers_at_another_rank(tmp_path: Path) -> None:
    """With the base, whose layers the keys do not name; peft computes what the merged model does."""
    made_by_peft(tmp_path, **REPLICATED)
    base, adapter, small = tmp_path / "base", tmp_path / "adapter", tmp_path / "small"
    with pytest.raises(surgery.FormatError, match="name the base"):
        surgery.resize(adapter, small, rank=1)
    surgery.resize(adapter, small, rank=1, base=base)
    surgery.merge(base, small, tmp_path / "merged")
    theirs = peft.PeftModel.from_pretrained(models.load("llama", base), small).eval()
    ours = models.load("llama", tmp_path / "merged")
    torch.testing.assert_close(models.logits(ours), models.logits(theirs), atol=2e-5, rtol=1e-4)


def test_a_tied_head_needs_no_base_for_another_rank(tmp_path: Path) -> None:
    """Its factors are its own, whatever the base does with its weight."""
    expected = made_by_peft(tmp_path, target_modules=["lm_head"])
    surgery.resize(tmp_path / "adapter", tmp_path / "same", rank=2)
    theirs = peft.PeftModel.from_pretrained(models.load("llama", tmp_path / "base"), tmp_path / "same").eval()
    torch.testing.assert_close(models.logits(theirs), expected, atol=2e-5, rtol=1e-4)
