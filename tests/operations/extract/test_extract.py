"""extract: what changed becomes factors or goes along in full; the ledger adds up; mistakes surface early."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from miniature import perturbed, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from formats.open_files import OpenFiles
from surgery.errors import NotFinite, NothingToDo, ReportedError

pytestmark = pytest.mark.processor


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Saves a checkpoint."""
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_every_tensor_has_a_fate(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Matrices become factors, vectors go in full, an unchanged buffer is identical: nothing is missing."""
    report = surgery.extract(*pair, tmp_path / "adapter", rank=4)
    counts = {fate: count for fate, count in report.ledger.items() if count}
    assert counts == {"low_rank": 3, "full": 4, "identical": 1}
    assert sum(counts.values()) == len(weights())
    assert [module.rank for module in report.modules] == [4, 4, 4]
    assert all(0 < module.energy < 1 and 0 < module.residual < 1 for module in report.modules)


def test_the_command_as_the_manual_writes_it(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Result]
) -> None:
    """`surgery extract --rank 8 base.st tuned.st` names its output after tuned, in the working directory."""
    monkeypatch.chdir(tmp_path)
    result = cli("extract", "--rank", 8, "base.st", "tuned.st")
    assert result.exit_code == 0, result.output
    assert "layers.0.up.weight" in result.stdout
    assert {path.name for path in (tmp_path / "tuned-lora-r8").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_enough_rank_gives_tuned_back(tmp_path: Path) -> None:
    """extract at the change's own rank, then merge: tuned within float32 rounding, full tensors exactly."""
    start = weights()
    tuned = perturbed(start)
    tuned["embed.token_embeddings.weight"] = start["embed.token_embeddings.weight"] + torch.ones(50, 1) @ torch.randn(
        1, 16
    )
    tuned["layers.0.up.weight"] = start["layers.0.up.weight"] + torch.randn(48, 2) @ torch.randn(2, 16)
    base, after = save(tmp_path / "b.st", start), save(tmp_path / "t.st", tuned)
    report = surgery.extract(base, after, tmp_path / "adapter", rank=8)
    assert {module.name for module in report.modules if module.residual < 1e-5} == {
        "embed.token_embeddings.weight",
        "layers.0.up.weight",
    }
    surgery.merge(base, tmp_path / "adapter", tmp_path / "merged.st")
    merged = load_file(tmp_path / "merged.st")
    assert set(merged) == set(tuned)
    for name in set(tuned) - {"layers.0.down.weight"}:
        torch.testing.assert_close(merged[name], tuned[name], rtol=0, atol=1e-6 * float(tuned[name].abs().max()))


def test_a_weight_smaller_than_its_factors_goes_in_full(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """At rank 20 the factors of a 48 × 16 weight would be larger than it: carried whole, exactly, and said so."""
    report = surgery.extract(*pair, tmp_path / "adapter", rank=20)
    assert not report.modules
    assert any("smaller than the factors" in note for note in report.notes)
    surgery.merge(pair[0], tmp_path / "adapter", tmp_path / "merged.st")
    merged, tuned = load_file(tmp_path / "merged.st"), load_file(pair[1])
    assert all(torch.equal(merged[name], tensor) for name, tensor in tuned.items())
    mixed = weights() | {"head.weight": torch.randn(3, 16)}
    base, after = save(tmp_path / "b.st", mixed), save(tmp_path / "t.st", perturbed(mixed))
    surgery.extract(base, after, tmp_path / "mixed", rank=8)
    config = json.loads((tmp_path / "mixed" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (8, {})
    assert "base_model.model.head.weight" in load_file(tmp_path / "mixed" / "adapter_model.safetensors")


def test_a_single_file_carries_its_config(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """An adapter written as one file merges to the same bytes as one written as a folder."""
    surgery.extract(*pair, tmp_path / "adapter.safetensors", rank=4)
    surgery.extract(*pair, tmp_path / "adapter", rank=4)
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert json.loads(file.metadata()["adapter_config"])["r"] == 4
    one = surgery.merge(pair[0], tmp_path / "adapter.safetensors", tmp_path / "one.st")
    two = surgery.merge(pair[0], tmp_path / "adapter", tmp_path / "two.st")
    assert one.digest == two.digest
    assert (tmp_path / "one.st").read_bytes() == (tmp_path / "two.st").read_bytes()


def test_the_same_inputs_give_the_same_bytes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Twice, with one thread and with two."""
    for name, jobs in (("a", 1), ("b", 2), ("c", 2)):
        surgery.extract(*pair, tmp_path / f"{name}.st", rank=4, resources=surgery.Resources(jobs=jobs))
    assert len({(tmp_path / f"{name}.st").read_bytes() for name in "abc"}) == 1


def test_new_heads_are_carried_by_modules_to_save(tmp_path: Path) -> None:
    """A module that base lacks goes along in full, and merge adds it."""
    head = {"classifier.weight": torch.randn(3, 16), "classifier.bias": torch.randn(3)}
    base, tuned = save(tmp_path / "b.st", weights()), save(tmp_path / "t.st", perturbed(weights()) | head)
    report = surgery.extract(base, tuned, tmp_path / "adapter", rank=4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "classifier" in config["modules_to_save"]
    assert report.ledger["full"] == 6
    merged = surgery.merge(base, tmp_path / "adapter", tmp_path / "m.st")
    assert any("new to the base" in note for note in merged.notes)
    assert torch.equal(load_file(tmp_path / "m.st")["classifier.weight"], head["classifier.weight"])
    surgery.unmerge(tmp_path / "m.st", tmp_path / "adapter", tmp_path / "back.st")
    assert set(load_file(tmp_path / "back.st")) == set(weights())


def test_a_norm_that_peft_would_confuse_is_carried_under_its_own_name(tmp_path: Path) -> None:
    """peft compares ends of names: a module `norm` would catch `input_layernorm`, so it is not a module to save."""
    tensors = {"norm.weight": torch.ones(4), "layers.0.input_layernorm.weight": torch.ones(4)}
    base, tuned = save(tmp_path / "b.st", tensors), save(tmp_path / "t.st", perturbed(tensors))
    surgery.extract(base, tuned, tmp_path / "adapter", rank=4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["layers.0.input_layernorm"]
    assert "base_model.model.norm.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    surgery.merge(base, tmp_path / "adapter", tmp_path / "m.st")
    assert torch.equal(load_file(tmp_path / "m.st")["norm.weight"], load_file(tuned)["norm.weight"])


def test_a_name_that_is_another_modules_tail_is_written_as_a_pattern(tmp_path: Path) -> None:
    """A target `q` beside an unchanged `enc.q`: peft must adapt the one and not the other."""
    tensors = {"q.weight": torch.randn(8, 8), "enc.q.weight": torch.randn(8, 8)}
    base = save(tmp_path / "b.st", tensors)
    tuned = save(tmp_path / "t.st", tensors | {"q.weight": torch.randn(8, 8)})
    surgery.extract(base, tuned, tmp_path / "adapter", rank=2)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"] == "q"


def test_json_is_one_document(pair: tuple[Path, Path], tmp_path: Path, cli_json: Callable[..., Any]) -> None:
    """With the promised keys."""
    report = cli_json("extract", "--rank", 4, *pair, "-o", tmp_path / "adapter")
    assert report["operation"] == "extract"
    assert report["output"] == str(tmp_path / "adapter")
    assert report["seconds"] > 0
    assert report["peak_rss_bytes"] > 1e7
    assert set(report["modules"][0]) >= {"name", "shape", "rank", "energy", "residual"}
    assert set(report["ledger"]) >= {"low_rank", "merged", "full", "copied", "identical", "refused"}


def test_dry_run_reads_headers_and_writes_nothing(
    pair: tuple[Path, Path], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    """The plan is printed; nothing appears."""
    before = set(tmp_path.iterdir())
    result = cli("extract", "--rank", 4, *pair, "-o", tmp_path / "adapter", "--dry-run")
    assert result.exit_code == 0
    assert "factorise" in result.stdout
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_one_is_refused(pair: tuple[Path, Path], tmp_path: Path, rank: int) -> None:
    """With the rank named."""
    with pytest.raises(ReportedError, match="at least 1"):
        surgery.extract(*pair, tmp_path / "adapter", rank=rank)


def test_identical_models_are_an_error(pair: tuple[Path, Path], tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Nothing to do, exit code 1, no output."""
    (tmp_path / "twin.st").write_bytes(pair[0].read_bytes())
    result = cli("extract", "--rank", 4, pair[0], tmp_path / "twin.st", "-o", tmp_path / "adapter")
    assert result.exit_code == 1
    assert "identical" in result.stderr
    assert not (tmp_path / "adapter").exists()


def test_nan_that_is_in_both_is_no_less_wrong(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Equal bits are compared by chunks before anything is loaded; that does not hide them."""
    paths = []
    for path in pair:
        tensors = load_file(path)
        tensors["layers.0.up.weight"] = torch.full_like(tensors["layers.0.up.weight"], float("nan"))
        paths.append(save(tmp_path / path.name, tensors))
    with pytest.raises(NotFinite, match=r"layers\.0\.up\.weight"):
        surgery.extract(*paths, tmp_path / "adapter", rank=4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["layers.0.up.weight", "layers.0.norm.weight", "layers.0.up.bias"])
def test_nan_and_inf_are_named(pair: tuple[Path, Path], tmp_path: Path, poison: float, name: str) -> None:
    """The tensor, and which of the two files."""
    bad = perturbed(weights())
    bad[name].view(-1)[3] = poison
    with pytest.raises(NotFinite, match=f"{name} of tuned"):
        surgery.extract(pair[0], save(tmp_path / "bad.st", bad), tmp_path / "adapter", rank=4)
    assert not (tmp_path / "adapter").exists()


def test_all_differing_shapes_are_listed_at_once(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Both shapes of each, before anything is computed."""
    grown = perturbed(weights())
    grown["embed.token_embeddings.weight"] = torch.randn(52, 16)
    grown["layers.0.up.bias"] = torch.randn(49)
    with pytest.raises(ReportedError, match="2 tensors differ in shape") as caught:
        surgery.extract(pair[0], save(tmp_path / "t.st", grown), tmp_path / "adapter", rank=4)
    assert "base 50 × 16, tuned 52 × 16" in str(caught.value)
    assert "base 48, tuned 49" in str(caught.value)


def test_removed_tensors_need_permission(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """An adapter cannot take a tensor away; with --allow-removed it is counted as refused."""
    less = perturbed(weights())
    del less["layers.0.norm.weight"], less["layers.0.norm.bias"]
    tuned = save(tmp_path / "t.st", less)
    with pytest.raises(ReportedError, match="no adapter can remove"):
        surgery.extract(pair[0], tuned, tmp_path / "adapter", rank=4)
    report = surgery.extract(pair[0], tuned, tmp_path / "adapter", rank=4, allow_removed=True)
    assert report.ledger["refused"] == 2


def test_models_without_a_name_in_common_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Both sides' names are shown."""
    other = save(tmp_path / "o.st", {"something.else.weight": torch.randn(2, 2)})
    with pytest.raises(NothingToDo, match="no tensor names in common"):
        surgery.extract(pair[0], other, tmp_path / "adapter", rank=4)


@pytest.mark.parametrize("which", [0, 1])
def test_an_input_is_never_overwritten(pair: tuple[Path, Path], cli: Callable[..., Result], which: int) -> None:
    """Even with --force."""
    before = pair[which].read_bytes()
    result = cli("extract", "--rank", 4, *pair, "-o", pair[which], "--force")
    assert result.exit_code == 1
    assert "overwrite an input" in result.stderr
    assert pair[which].read_bytes() == before


def test_a_full_output_folder_needs_force(pair: tuple[Path, Path], tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Refused without, replaced with."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "precious.txt").write_text("mine")
    assert cli("extract", "--rank", 4, *pair, "-o", tmp_path / "adapter").exit_code == 1
    assert (tmp_path / "adapter" / "precious.txt").read_text() == "mine"
    assert cli("extract", "--rank", 4, *pair, "-o", tmp_path / "adapter", "--force").exit_code == 0


def test_half_precision_factors_report_their_rounding(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Of a change of rank 1 the factors' rounding is all that is left, and larger in bfloat16 than in float32."""
    moved = weights()
    moved["layers.0.up.weight"] += torch.randn(48, 1) @ torch.randn(1, 16)
    tuned = save(tmp_path / "one.st", moved)
    fine = surgery.extract(pair[0], tuned, tmp_path / "f32", rank=4, dtype="float32")
    coarse = surgery.extract(pair[0], tuned, tmp_path / "bf16", rank=4, dtype="bfloat16")
    assert fine.residual < 1e-5 < 1e-4 < coarse.residual
    assert (
        load_file(tmp_path / "bf16" / "adapter_model.safetensors")["base_model.model.layers.0.up.lora_A.weight"].dtype
        == torch.bfloat16
    )


def test_shards_do_not_matter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The same adapter, byte for byte, whatever file a tensor lies in."""
    folders = []
    for path, count in ((pair[0], 2), (pair[1], 3)):
        tensors = load_file(path)
        folder = tmp_path / f"{path.stem}-sharded"
        folder.mkdir()
        shards = {name: f"model-{1 + index % count}.safetensors" for index, name in enumerate(sorted(tensors))}
        for shard in set(shards.values()):
            save(folder / shard, {name: tensors[name] for name in tensors if shards[name] == shard})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
        folders.append(folder)
    surgery.extract(*pair, tmp_path / "single.st", rank=4)
    surgery.extract(*folders, tmp_path / "sharded.st", rank=4)
    with safe_open(tmp_path / "sharded.st", "pt") as sharded, safe_open(tmp_path / "single.st", "pt") as single:
        assert sharded.keys() == single.keys()
        assert all(torch.equal(sharded.get_tensor(key), single.get_tensor(key)) for key in single.keys())  # noqa: SIM118


def test_a_device_that_is_not_there_is_refused(
    pair: tuple[Path, Path], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    """Before any work, with what torch says."""
    for device in ("cuda:99", "abacus"):
        result = cli("extract", "--rank", 4, *pair, "-o", tmp_path / "adapter", "--device", device)
        assert result.exit_code == 1
        assert "cannot compute on this device" in result.stderr
        assert not (tmp_path / "adapter").exists()


def test_a_curve_is_drawn_from_what_was_extracted(
    pair: tuple[Path, Path], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    """Beside the adapter; an unknown kind of picture is refused before anything is computed."""
    assert cli("extract", "--rank", 4, *pair, "-o", tmp_path / "a", "--curve", tmp_path / "c.svg").exit_code == 0
    assert "<svg" in (tmp_path / "c.svg").read_text()
    result = cli("extract", "--rank", 4, *pair, "-o", tmp_path / "b", "--curve", tmp_path / "c.png")
    assert result.exit_code == 1
    assert not (tmp_path / "b").exists()


def test_without_factors_there_is_an_adapter_and_no_curve(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Everything went in full: said in a note, and nothing is lost over a picture of nothing."""
    report = surgery.extract(*pair, tmp_path / "a", rank=1000, curve=tmp_path / "c.svg")
    assert any("no curve to draw" in note for note in report.notes)
    assert (tmp_path / "a" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "c.svg").exists()


@pytest.mark.parametrize("curve", ["there.svg", "c.png", "base.st", "adapter", "file/c.svg"])
def test_a_picture_that_cannot_be_is_refused_with_the_plan(
    pair: tuple[Path, Path], tmp_path: Path, cli: Callable[..., Result], curve: str
) -> None:
    """It stands already, is of no known kind, an input, the adapter itself, below a file; a dry run says the same."""
    for name in ("there.svg", "file"):
        (tmp_path / name).write_text("precious")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    words = ("extract", "--rank", 4, *pair, "-o", tmp_path / "adapter", "--curve", tmp_path / curve)
    real, dry = cli(*words), cli(*words, "--dry-run")
    assert (real.exit_code, dry.exit_code) == (1, 1)
    assert real.stderr == dry.stderr != ""
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_budget_is_spent_when_the_job_runs(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preparing reads headers only; the plan has room for whatever the budget comes to."""
    with monkeypatch.context() as patched:
        patched.setattr(OpenFiles, "read", lambda *_: pytest.fail("a weight was read"))
        patched.setattr(OpenFiles, "of", lambda *_: pytest.fail("a weight was read"))
        job = surgery.prepare_extract(*pair, tmp_path / "a", rank=surgery.Budget(9000))
        planned = job.summary
    assert planned.outputs == (str(tmp_path / "a"),)
    report = job.run()
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size <= min(9000, planned.bytes_written)
    assert report.rule == "the best ranks for 9,000 bytes"
