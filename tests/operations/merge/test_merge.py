"""merge and unmerge: the same bytes always, receipts, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from lora_by_hand import lora, up
from miniature import perturbed, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from formats import DType
from formats.errors import AdapterFormatError, ShapeMismatch, UnmatchedKeys
from surgery.errors import AlreadyMerged, NotFinite, NothingToDo, NotMerged
from surgery.exact.rounding import round_once
from surgery.receipts.receipt import RECEIPT


@pytest.fixture
def adapter(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A rank-4 adapter of the pair."""
    surgery.extract(*pair, tmp_path / "adapter", rank=4)
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_threads_and_budget_do_not_show(tmp_path: Path, dtype: torch.dtype) -> None:
    """Twice, with 1, 2 and 4 threads, with a budget of one byte: identical bytes."""
    base = tmp_path / "base.st"
    save_file(weights(dtype=dtype), base)
    adapter = lora(tmp_path / "a", up())
    outputs = []
    for index, (jobs, memory) in enumerate([(1, 1 << 30), (1, 1 << 30), (2, 1 << 30), (4, 1)]):
        surgery.merge(base, adapter, tmp_path / f"{index}.st", resources=surgery.Resources(jobs, memory))
        outputs.append((tmp_path / f"{index}.st").read_bytes())
    assert len(set(outputs)) == 1


def test_merge_is_w0_plus_s_b_a_rounded_once(tmp_path: Path) -> None:
    """Against float64, to the last bit of the stored dtype for all but the odd element."""
    save_file(weights(dtype=torch.bfloat16), tmp_path / "base.st")
    factors = up()
    surgery.merge(tmp_path / "base.st", lora(tmp_path / "a", factors), tmp_path / "m.st", weight=0.5)
    a, b = (factors[f"layers.0.up.lora_{role}.weight"].double() for role in "AB")
    w0 = weights(dtype=torch.bfloat16)["layers.0.up.weight"].double()
    exact = w0 + 0.5 * (4 / 2) * b @ a
    merged = load_file(tmp_path / "m.st")["layers.0.up.weight"]
    assert int((merged != round_once(exact, DType.BF16)).sum()) <= 1
    assert ((merged.double() - exact).abs() <= 2.0**-8 * exact.abs()).all()


def test_sharded_and_single_give_one_digest(pair: tuple[Path, Path], adapter: Path, tmp_path: Path) -> None:
    """The digest is over tensors, not files; a sharded folder stays sharded and carries its receipt in the index."""
    tensors = load_file(pair[0])
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = sorted(tensors)
    shards = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for file in set(shards.values()):
        save_file({name: tensors[name] for name in names if shards[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (folder / "config.json").write_text("{}")
    one = surgery.merge(pair[0], adapter, tmp_path / "one.st")
    many = surgery.merge(folder, adapter, tmp_path / "many")
    assert one.digest == many.digest
    assert (tmp_path / "many" / "config.json").exists()
    back = surgery.unmerge(tmp_path / "many", adapter, tmp_path / "back")
    assert back.bit_exact is not None
    with pytest.raises(AlreadyMerged):
        surgery.merge(tmp_path / "many", adapter, tmp_path / "again")


def test_the_receipt_names_every_input(pair: tuple[Path, Path], adapter: Path, tmp_path: Path) -> None:
    """Tool, operation, a BLAKE3 for every tensor of base and adapter."""
    surgery.merge(pair[0], adapter, tmp_path / "m.st")
    with safe_open(tmp_path / "m.st", "pt") as file:
        receipt = json.loads(file.metadata()[RECEIPT])
    assert receipt["operation"] == "merge"
    assert receipt["tool"].startswith("surgery ")
    assert set(receipt["base_tensors"]) == set(weights())
    assert set(receipt["adapters"][0]["tensors"]) == set(load_file(adapter / "adapter_model.safetensors"))
    assert all(len(text) == 64 and set(text) != {"0"} for text in receipt["base_tensors"].values())


def test_unmerge_restores_what_was_replaced_and_says_what_rounding_kept(
    pair: tuple[Path, Path], adapter: Path, tmp_path: Path, cli_json: Callable[..., Any]
) -> None:
    """Full tensors come back exactly, out of the receipt; matrices to rounding; the metadata as it was."""
    merged = cli_json("merge", pair[0], adapter, "-o", tmp_path / "m.st")
    back = cli_json("unmerge", tmp_path / "m.st", adapter, "-o", tmp_path / "back.st")
    base, again = load_file(pair[0]), load_file(tmp_path / "back.st")
    differing = {name for name in base if not torch.equal(base[name], again[name])}
    assert set(back["differing"]) == differing
    assert back["bit_exact"] is (not differing)
    assert all(base[name].dim() == 2 for name in differing)
    for name in base:
        torch.testing.assert_close(again[name], base[name], rtol=1e-6, atol=1e-8)
    assert (back["digest"] == merged["base_digest"]) is back["bit_exact"]
    with safe_open(tmp_path / "back.st", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_unmerge_can_be_bit_exact(tmp_path: Path) -> None:
    """Where nothing was lost by rounding the output is the base's file, byte for byte."""
    tensors = {"layers.0.up.weight": torch.randint(-8, 8, (48, 16)).float()}
    save_file(tensors, tmp_path / "base.st", metadata={"format": "pt"})
    factors = {name: tensor.round() for name, tensor in up().items()}
    adapter = lora(tmp_path / "a", factors)
    surgery.merge(tmp_path / "base.st", adapter, tmp_path / "m.st")
    report = surgery.unmerge(tmp_path / "m.st", adapter, tmp_path / "back.st")
    assert report.bit_exact is True
    assert (tmp_path / "back.st").read_bytes() == (tmp_path / "base.st").read_bytes()


def test_unmerge_without_a_receipt_cannot_tell(tmp_path: Path) -> None:
    """A file merged by somebody else: the delta is taken off, bit_exact is null."""
    save_file(weights(), tmp_path / "merged.st")
    report = surgery.unmerge(tmp_path / "merged.st", lora(tmp_path / "a", up()), tmp_path / "back.st")
    assert report.bit_exact is None
    assert any("no receipt" in note for note in report.notes)


def test_what_cannot_be_restored_is_refused(
    pair: tuple[Path, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced tensors without receipt, or too large for it: unmerge writes nothing, and merge had said so."""
    with pytest.raises(NotMerged, match="replaced 4 tensors"):
        surgery.unmerge(pair[1], adapter, tmp_path / "back.st")
    monkeypatch.setattr("surgery.operations.merge.plan.ORIGINALS_LIMIT", 10)
    report = surgery.merge(pair[0], adapter, tmp_path / "m.st")
    assert any("unmerge will refuse" in note for note in report.notes)
    with pytest.raises(NotMerged, match="replaced 4 tensors"):
        surgery.unmerge(tmp_path / "m.st", adapter, tmp_path / "back.st")
    assert not (tmp_path / "back.st").exists()


def test_a_second_merge_of_the_same_adapter_is_refused(pair: tuple[Path, Path], adapter: Path, tmp_path: Path) -> None:
    """Also under another name, and beneath a later merge."""
    surgery.merge(pair[0], adapter, tmp_path / "m.st")
    shutil.copytree(adapter, tmp_path / "renamed")
    with pytest.raises(AlreadyMerged):
        surgery.merge(tmp_path / "m.st", tmp_path / "renamed", tmp_path / "again.st")
    other = lora(tmp_path / "other", up())
    surgery.merge(tmp_path / "m.st", other, tmp_path / "mm.st")
    with pytest.raises(AlreadyMerged):
        surgery.merge(tmp_path / "mm.st", adapter, tmp_path / "again.st")
    with pytest.raises(NotMerged, match="another adapter"):
        surgery.unmerge(tmp_path / "mm.st", adapter, tmp_path / "back.st")


def test_an_adapter_for_another_model_names_the_nearest(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Nothing matched: an error with the names that were perhaps meant, never a warning."""
    stray = {name.replace("up", "upp"): tensor for name, tensor in up().items()}
    with pytest.raises(UnmatchedKeys, match="match nothing") as caught:
        surgery.merge(pair[0], lora(tmp_path / "a", stray), tmp_path / "m.st")
    assert "layers.0.up.weight" in str(caught.value)


def test_one_unmatched_key_among_many_is_an_error(tmp_path: Path, pair: tuple[Path, Path], adapter: Path) -> None:
    """Also a full tensor that no module to save explains."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.layers.7.up.bias"] = torch.zeros(3)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UnmatchedKeys, match=r"layers\.7"):
        surgery.merge(pair[0], adapter, tmp_path / "m.st")


CONTRADICTIONS = {
    "half a pair": ({"layers.0.up.lora_A.weight": torch.zeros(2, 16)}, {}, AdapterFormatError, "factor of a pair"),
    "the other half": ({"layers.0.up.lora_B.weight": torch.zeros(48, 2)}, {}, AdapterFormatError, "factor of a pair"),
    "half an embedding": (
        {"embed.token_embeddings.lora_embedding_B": torch.zeros(16, 2)}, {}, AdapterFormatError, "factor of a pair",
    ),
    "half of one pair among whole ones": (
        up() | {"layers.0.down.lora_A.weight": torch.zeros(2, 48)}, {}, AdapterFormatError, "layers.0.down",
    ),
    "rank of A against that of B": (
        up() | {"layers.0.up.lora_B.weight": torch.zeros(48, 3)}, {}, AdapterFormatError, "rank contradicts",
    ),
    "rank pattern against the factors": (
        up(), {"rank_pattern": {"up": 5}}, AdapterFormatError, "rank contradicts",
    ),
    "another architecture": (
        {f"model.decoder.block.{n}.attn.wq.lora_{r}.weight": torch.zeros(2, 2) for n in range(9) for r in "AB"}, {},
        UnmatchedKeys, "9 of 9 adapter targets match nothing",
    ),
    "rank against config": (up(3), {}, AdapterFormatError, "rank contradicts"),
    "wrong width": (up(into=17), {}, ShapeMismatch, "48 × 16"),
    "dora": (up(), {"use_dora": True}, AdapterFormatError, "use_dora"),
    "pissa": (up(), {"init_lora_weights": "pissa_niter_4"}, AdapterFormatError, "initialisation"),
    "another method": (up(), {"peft_type": "XLORA"}, AdapterFormatError, "depend on the input"),
    "full tensor of another shape": (
        up() | {"layers.0.norm.weight": torch.zeros(17)}, {"modules_to_save": ["layers.0.norm"]}, ShapeMismatch, "17",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused_before_any_work(tmp_path: Path, pair: tuple[Path, Path], case: str) -> None:
    """Each names what it found; nothing is written."""
    tensors, settings, error, message = CONTRADICTIONS[case]
    with pytest.raises(error) as caught:
        surgery.merge(pair[0], lora(tmp_path / "a", tensors, **settings), tmp_path / "m.st")
    assert message in str(caught.value)
    assert not (tmp_path / "m.st").exists()


def test_nan_in_adapter_or_base_is_named(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """As is a sum that the stored dtype cannot hold."""
    poisoned = up()
    poisoned["layers.0.up.lora_A.weight"][1, 2] = float("nan")
    with pytest.raises(NotFinite, match="lora_A"):
        surgery.merge(pair[0], lora(tmp_path / "a", poisoned), tmp_path / "m.st")
    bad = weights()
    bad["layers.0.up.weight"][0, 0] = float("inf")
    save_file(bad, tmp_path / "bad.st")
    adapter = lora(tmp_path / "b", up())
    with pytest.raises(NotFinite, match=r"layers\.0\.up\.weight"):
        surgery.merge(tmp_path / "bad.st", adapter, tmp_path / "m.st")
    save_file(weights(dtype=torch.float16), tmp_path / "half.st")
    with pytest.raises(NotFinite, match="exceeds the range"):
        surgery.merge(tmp_path / "half.st", adapter, tmp_path / "m.st", weight=1e6)


def test_a_merge_that_changes_nothing_is_an_error(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Zero factors, or a weight of zero."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in up().items()}
    with pytest.raises(NothingToDo, match="changes nothing"):
        surgery.merge(pair[0], lora(tmp_path / "z", zeros), tmp_path / "m.st")
    with pytest.raises(NothingToDo):
        surgery.merge(pair[0], lora(tmp_path / "a", up()), tmp_path / "m.st", weight=0)


def test_a_quantised_base_is_refused_with_a_reason(tmp_path: Path) -> None:
    """Nothing can be added to integers."""
    quantised = weights() | {"layers.0.up.weight": torch.zeros(48, 16, dtype=torch.int8)}
    save_file(quantised, tmp_path / "q.st")
    with pytest.raises(surgery.SurgeryError, match="nothing can be added"):
        surgery.merge(tmp_path / "q.st", lora(tmp_path / "a", up()), tmp_path / "m.st")


def test_an_adapter_without_config_is_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """alpha is never guessed."""
    adapter = lora(tmp_path / "a", up())
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(AdapterFormatError, match="alpha is unknown"):
        surgery.merge(pair[0], adapter, tmp_path / "m.st")


def test_a_folder_comes_out_loadable(tmp_path: Path, pair: tuple[Path, Path], adapter: Path) -> None:
    """Config, tokenizer and the rest are copied; weights in other containers are not."""
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(pair[0], base / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "merges.txt"):
        (base / name).write_text("{}")
    (base / "pytorch_model.bin").write_text("old weights")
    surgery.merge(base, adapter, tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "merges.txt"}


def test_shards_of_the_size_asked_for(
    pair: tuple[Path, Path], adapter: Path, tmp_path: Path, cli_json: Callable[..., Any]
) -> None:
    """None larger but for a tensor that is so by itself; an index with the bytes of all; the digest is the same."""
    one = surgery.merge(pair[0], adapter, tmp_path / "one.st")
    report = cli_json("merge", pair[0], adapter, "-o", tmp_path / "many", "--max-shard-size", "3kB")
    assert report["digest"] == one.digest
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    merged = load_file(tmp_path / "one.st")
    assert set(index["weight_map"]) == set(merged)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())
    for name in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "many" / name)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 3000
    assert surgery.unmerge(tmp_path / "many", adapter, tmp_path / "back").bit_exact is not None
    surgery.merge(pair[0], adapter, tmp_path / "fits", max_shard_size=1 << 20)
    assert [path.name for path in (tmp_path / "fits").iterdir()] == ["model.safetensors"]
    with pytest.raises(surgery.FormatError, match="no shards"):
        surgery.merge(pair[0], adapter, tmp_path / "m.st", max_shard_size=1 << 20)


def test_errors_are_documents_too(tmp_path: Path, pair: tuple[Path, Path], cli: Callable[..., Result]) -> None:
    """With --json a failure prints one document, a message on stderr, and exit code 1."""
    result = cli("merge", pair[0], tmp_path / "none", "-o", tmp_path / "m.st", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "PathNotFound"
    assert "no such adapter" in result.stderr


@pytest.mark.parametrize("seed", range(3))
def test_merging_then_unmerging_drifts_by_rounding_only(tmp_path: Path, seed: int) -> None:
    """In bfloat16, for deltas from tiny to larger than W0: within a unit in the last place of the larger of both."""
    base = perturbed(weights(dtype=torch.bfloat16), seed=seed)
    save_file(base, tmp_path / "base.st")
    factors = {name: tensor * 10.0 ** (seed - 2) for name, tensor in up().items()}
    adapter = lora(tmp_path / "a", factors)
    surgery.merge(tmp_path / "base.st", adapter, tmp_path / "m.st")
    surgery.unmerge(tmp_path / "m.st", adapter, tmp_path / "back.st")
    name = "layers.0.up.weight"
    merged, back = load_file(tmp_path / "m.st")[name].double(), load_file(tmp_path / "back.st")[name].double()
    bound = 2.0**-8 * torch.maximum(merged.abs(), base[name].double().abs())
    assert ((back - base[name].double()).abs() <= bound).all()
