"""The undo file: the base bit for bit, whatever merge did; and one clear error for whatever does not belong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from lora_by_hand import lora, up
from miniature import weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from formats.errors import CorruptFile, OutputExists
from formats.spec import DType, TensorSpec
from formats.tensors import bytes_from_tensor, torch_dtype
from surgery.errors import NotMerged, UndoMismatch
from surgery.exact.correction import Coarsened, correct_from, corrected
from surgery.exact.rounded_sum import add_rounded
from surgery.exact.rounding import exact_product
from surgery.operations.merge import rows as merge_rows


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The miniature in bfloat16."""
    save_file(weights(dtype=torch.bfloat16), tmp_path / "base.st", metadata={"format": "pt"})
    return tmp_path / "base.st"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """LoRA of the first linear layer, and a norm in full."""
    norm = {"layers.0.norm.weight": torch.full((16,), 2.0)}
    return lora(tmp_path / "a", up() | norm, modules_to_save=["norm"])


def test_the_base_comes_back_byte_for_byte(base: Path, adapter: Path, tmp_path: Path, cli_json: Any) -> None:
    """The file itself, metadata included; merge reports the undo file's size, unmerge that it is bit-exact."""
    merged = cli_json("merge", base, adapter, "-o", tmp_path / "m.st", "--undo", tmp_path / "u.st")
    assert merged["undo"]["nbytes"] == (tmp_path / "u.st").stat().st_size
    back = cli_json("unmerge", tmp_path / "m.st", adapter, "-o", tmp_path / "b.st", "--undo", tmp_path / "u.st")
    assert (tmp_path / "b.st").read_bytes() == base.read_bytes()
    assert back["bit_exact"] is True
    assert back["digest"] == merged["base_digest"]


def test_the_output_is_the_same_with_and_without(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Writing an undo file changes no byte of the merge; the undo file is the same for any threads and memory."""
    surgery.merge(base, adapter, tmp_path / "plain.st")
    for index, (jobs, memory) in enumerate([(1, 1 << 30), (3, 1)]):
        resources = surgery.Resources(jobs, memory)
        surgery.merge(base, adapter, tmp_path / f"m{index}.st", undo=tmp_path / f"u{index}.st", resources=resources)
    assert (tmp_path / "m0.st").read_bytes() == (tmp_path / "plain.st").read_bytes()
    assert (tmp_path / "u0.st").read_bytes() == (tmp_path / "u1.st").read_bytes()


@pytest.mark.parametrize("scale", [2e-3, 2e-2])
def test_a_typical_lora_costs_three_percent_at_most(tmp_path: Path, cli: Callable[..., Result], scale: float) -> None:
    """A bfloat16 weight of 1024 × 1024, deltas of a hundredth and a twelfth of its size, the header included."""
    generator = torch.Generator().manual_seed(0)
    w0 = torch.randn(1024, 1024, generator=generator).mul(0.03).bfloat16()
    save_file({"proj.weight": w0}, tmp_path / "base.st")
    factors = {
        "proj.lora_A.weight": torch.randn(16, 1024, generator=generator) / 32,
        "proj.lora_B.weight": torch.randn(1024, 16, generator=generator) * scale,
    }
    adapter = lora(tmp_path / "a", factors, r=16, lora_alpha=16)
    result = cli("merge", tmp_path / "base.st", adapter, "-o", tmp_path / "m.st", "--undo", tmp_path / "u.st")
    assert result.exit_code == 0, result.output
    assert "undo file" in result.stdout
    nbytes = (tmp_path / "u.st").stat().st_size
    assert 0.002 < nbytes / (2 * w0.numel()) <= 0.03
    plain = surgery.unmerge(tmp_path / "m.st", adapter, tmp_path / "plain.st")
    assert plain.bit_exact is False
    surgery.unmerge(tmp_path / "m.st", adapter, tmp_path / "b.st", undo=tmp_path / "u.st")
    assert torch.equal(load_file(tmp_path / "b.st")["proj.weight"], w0)


def test_without_it_the_report_says_what_came_back(base: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Which unmerged tensors equal the base's, which do not and in how many elements at most, and what would help; a
    tensor that was changed since the merge is told apart."""
    tiny = {name.replace("up", "down"): tensor * 1e-3 for name, tensor in up(into=48, out=16).items()}
    adapter = lora(tmp_path / "a", up() | tiny)
    surgery.merge(base, adapter, tmp_path / "m.st")
    report = surgery.unmerge(tmp_path / "m.st", adapter, tmp_path / "b.st")
    up_name, down_name = "layers.0.up.weight", "layers.0.down.weight"
    assert (report.bit_exact, report.equal, report.changed) == (False, (down_name,), ())
    before, after = load_file(base)[up_name], load_file(tmp_path / "b.st")[up_name]
    wrong = int((before != after).sum())
    assert wrong > 0
    assert list(report.differing) == [up_name]
    assert wrong <= report.differing[up_name] < before.numel()
    said = cli("unmerge", tmp_path / "m.st", adapter, "-o", tmp_path / "c.st").stdout.replace("\n", " ")
    assert "1 of 2 unmerged tensors equal the base bit for bit, 1 differ by rounding" in said
    assert "hint: an undo file" in said
    tensors = load_file(tmp_path / "m.st")
    tensors["layers.0.norm.bias"][0] += 1
    with safe_open(tmp_path / "m.st", "pt") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "m.st", metadata=metadata)
    report = surgery.unmerge(tmp_path / "m.st", adapter, tmp_path / "d.st")
    assert report.changed == ("layers.0.norm.bias",)
    said = cli("unmerge", tmp_path / "m.st", adapter, "-o", tmp_path / "e.st").stdout
    assert "1 tensors were changed since the merge: layers.0.norm.bias" in said


def test_dora_can_be_undone(base: Path, tmp_path: Path) -> None:
    """It has no delta to subtract: without the undo file it is refused, with it the base comes back."""
    dora = up() | {"layers.0.up.lora_magnitude_vector": torch.rand(48)}
    adapter = lora(tmp_path / "a", dora, use_dora=True, target_modules=["up"])
    surgery.merge(base, adapter, tmp_path / "m.st", undo=tmp_path / "u.st")
    with pytest.raises(NotMerged, match="cannot be taken off"):
        surgery.unmerge(tmp_path / "m.st", adapter, tmp_path / "b.st")
    assert surgery.unmerge(tmp_path / "m.st", adapter, tmp_path / "b.st", undo=tmp_path / "u.st").bit_exact
    assert (tmp_path / "b.st").read_bytes() == base.read_bytes()


def test_what_is_lost_without_it_is_there_with_it(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced tensors too large for the receipt; merge says that the undo file is needed."""
    monkeypatch.setattr("surgery.operations.merge.plan.ORIGINALS_LIMIT", 10)
    report = surgery.merge(base, adapter, tmp_path / "m.st", undo=tmp_path / "u.st")
    assert any("needs the undo file" in note for note in report.notes)
    surgery.unmerge(tmp_path / "m.st", adapter, tmp_path / "b.st", undo=tmp_path / "u.st")
    assert (tmp_path / "b.st").read_bytes() == base.read_bytes()


def test_a_vocabulary_shrinks_again(tmp_path: Path) -> None:
    """A folder whose embedding grew: rows and vocab_size as they were."""
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(weights(dtype=torch.float16), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"vocab_size": 50}))
    grown = {"embed.token_embeddings.weight": torch.rand(53, 16)}
    adapter = lora(tmp_path / "a", up() | grown, modules_to_save=["token_embeddings"])
    surgery.merge(folder, adapter, tmp_path / "m", undo=tmp_path / "u.st")
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == {"vocab_size": 53}
    surgery.unmerge(tmp_path / "m", adapter, tmp_path / "b", undo=tmp_path / "u.st")
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == {"vocab_size": 50}
    name = "model.safetensors"
    assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes()


def test_a_lost_receipt_does_not_matter(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The undo file knows the merge: a file saved again by another program, with the same tensors, will do."""
    surgery.merge(base, adapter, tmp_path / "m.st", undo=tmp_path / "u.st")
    save_file(load_file(tmp_path / "m.st"), tmp_path / "saved.st")
    surgery.unmerge(tmp_path / "saved.st", adapter, tmp_path / "b.st", undo=tmp_path / "u.st")
    assert (tmp_path / "b.st").read_bytes() == base.read_bytes()


@pytest.mark.parametrize("name", ["layers.0.up.weight", "layers.0.norm.weight", "layers.0.down.weight"])
def test_a_tampered_merged_file_is_refused(base: Path, adapter: Path, tmp_path: Path, name: str) -> None:
    """One bit in a merged, a replaced or a copied tensor: named, and nothing is written."""
    surgery.merge(base, adapter, tmp_path / "m.st", undo=tmp_path / "u.st")
    tensors = load_file(tmp_path / "m.st")
    tensors[name].view(torch.int16).view(-1)[3] ^= 1
    with safe_open(tmp_path / "m.st", "pt") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "m.st", metadata=metadata)
    with pytest.raises(UndoMismatch, match="changed since") as caught:
        surgery.unmerge(tmp_path / "m.st", adapter, tmp_path / "b.st", undo=tmp_path / "u.st")
    assert caught.value.details["where"] == name
    assert not (tmp_path / "b.st").exists()


@pytest.mark.parametrize("name", ["layers.0.norm.weight", "layers.0.norm.bias"])
def test_a_tensor_of_another_shape_is_refused(base: Path, adapter: Path, tmp_path: Path, name: str) -> None:
    """A replaced and a copied one; the payload's hash would not tell."""
    surgery.merge(base, adapter, tmp_path / "m.st", undo=tmp_path / "u.st")
    tensors = load_file(tmp_path / "m.st")
    tensors[name] = tensors[name].reshape(4, 4)
    save_file(tensors, tmp_path / "saved.st")
    with pytest.raises(surgery.ReportedError):
        surgery.unmerge(tmp_path / "saved.st", adapter, tmp_path / "b.st", undo=tmp_path / "u.st")
    assert not (tmp_path / "b.st").exists()


def test_an_undo_file_of_another_merge_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Of another adapter, of another weight, of another base, or none at all."""
    surgery.merge(base, adapter, tmp_path / "m.st", undo=tmp_path / "u.st")
    other = lora(tmp_path / "other", {name: -tensor for name, tensor in up().items()})
    save_file(weights(1, torch.bfloat16), tmp_path / "base2.st")
    surgery.merge(base, other, tmp_path / "m1.st", undo=tmp_path / "u1.st")
    surgery.merge(base, adapter, tmp_path / "m2.st", weight=0.5, undo=tmp_path / "u2.st")
    surgery.merge(tmp_path / "base2.st", adapter, tmp_path / "m3.st", undo=tmp_path / "u3.st")
    for number in (1, 2, 3):
        with pytest.raises(UndoMismatch, match="belongs to another merge"):
            surgery.unmerge(tmp_path / "m.st", adapter, tmp_path / "b.st", undo=tmp_path / f"u{number}.st")
    with pytest.raises(NotMerged, match="another adapter"):
        surgery.unmerge(tmp_path / "m.st", other, tmp_path / "b.st", undo=tmp_path / "u.st")
    with pytest.raises(UndoMismatch, match="not an undo file"):
        surgery.unmerge(tmp_path / "m.st", adapter, tmp_path / "b.st", undo=tmp_path / "m1.st")
    save_file(load_file(tmp_path / "m3.st"), tmp_path / "bare.st")
    with pytest.raises(UndoMismatch, match="changed since"):
        surgery.unmerge(tmp_path / "bare.st", adapter, tmp_path / "b.st", undo=tmp_path / "u.st")
    assert not (tmp_path / "b.st").exists()


def test_damage_to_an_undo_file_is_found_before_anything_is_written(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A bit flipped in a correction: the format or the hash of what it leads to tells, unless the bit meant nothing."""
    surgery.merge(base, adapter, tmp_path / "m.st", undo=tmp_path / "u.st")
    whole = (tmp_path / "u.st").read_bytes()
    found = 0
    for place in range(-1, -150, -11):
        content = bytearray(whole)
        content[place] ^= 16
        (tmp_path / "u.st").write_bytes(content)
        try:
            surgery.unmerge(tmp_path / "m.st", adapter, tmp_path / "b.st", undo=tmp_path / "u.st")
        except CorruptFile as error:
            assert "correction" in str(error)  # noqa: PT017
            assert not (tmp_path / "b.st").exists()
            found += 1
        else:
            assert (tmp_path / "b.st").read_bytes() == base.read_bytes()
            (tmp_path / "b.st").unlink()
    assert found >= 8


def test_an_undo_file_never_replaces_or_enters_anything(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Not an input, not the output, not a folder of either, not what stands there; before any work."""
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(base, model / "model.safetensors")
    (tmp_path / "there.st").write_text("mine")
    wrong = [base, adapter / "u.st", model / "u.st", tmp_path / "m" / "u.st", tmp_path / "there.st", tmp_path / "u.bin"]
    for undo in wrong:
        with pytest.raises(OutputExists):
            surgery.merge(base if undo == base else model, adapter, tmp_path / "m", undo=undo)
    assert (tmp_path / "there.st").read_text() == "mine"
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "u.bin").exists()


def test_an_output_that_fails_takes_its_undo_file_along(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both appear or neither: also if the very last renaming fails, or the disk is full before."""
    from formats.destination import _Output

    finish = _Output.finish

    def failing(output: _Output) -> None:
        if output._staging.target.name == "m.st":
            raise OSError("no")
        finish(output)

    monkeypatch.setattr(_Output, "finish", failing)
    with pytest.raises(OSError, match="no"):
        surgery.merge(base, adapter, tmp_path / "m.st", undo=tmp_path / "u.st")
    assert not (tmp_path / "u.st").exists()
    assert not (tmp_path / "m.st").exists()


def test_both_are_on_disk_before_either_has_a_name(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that next to no time passes between the undo file and the output, however large."""
    from formats.staging import Staging

    steps = []
    for name in ("sync", "_publish"):
        work = getattr(Staging, name)

        def watched(staging: Staging, *rest: Path, work: Any = work, name: str = name) -> None:
            steps.append((name, staging.target.name))
            work(staging, *rest)

        monkeypatch.setattr(Staging, name, watched)
    surgery.merge(base, adapter, tmp_path / "m.st", undo=tmp_path / "u.st")
    first = steps.index(("_publish", "u.st"))
    assert {("sync", "m.st"), ("sync", "u.st")} <= set(steps[:first])
    assert steps[-1] == ("_publish", "m.st")


def test_a_plan_with_undo_can_be_shown(base: Path, adapter: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    """--dry-run of both verbs; nothing is written."""
    surgery.merge(base, adapter, tmp_path / "m.st", undo=tmp_path / "u.st")
    for verb, first, undo in (("merge", base, "new.st"), ("unmerge", tmp_path / "m.st", "u.st")):
        result = cli(verb, first, adapter, "-o", tmp_path / "x.st", "--undo", tmp_path / undo, "--dry-run")
        assert result.exit_code == 0, result.output
        assert "nothing written" in result.stdout
    assert not (tmp_path / "x.st").exists()


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize("share", [0.0, 1e-6, 0.001, 0.04, 1.0])
def test_corrections_lead_back_whatever_the_width_and_the_share(itemsize: int, share: float) -> None:
    """Over several chunks, with wraparound differences, and from a prediction that is too short or too long."""
    generator = np.random.default_rng(1)
    elements = (1 << 19) + 12345
    actual = generator.integers(0, 256, elements * itemsize, dtype=np.uint8)
    wrong = generator.random(elements) < share
    wrong[-1] = wrong[0] = share > 0
    predicted = actual.copy()
    predicted.reshape(-1, itemsize)[wrong] = generator.integers(0, 256, (int(wrong.sum()), itemsize))
    correction = correct_from(actual, predicted, itemsize)
    assert (correction is None) == np.array_equal(actual, predicted)
    for guess in (predicted, predicted[: 1000 * itemsize], np.concatenate([predicted, actual[: 8 * itemsize]])):
        correction = correct_from(actual, guess, itemsize)
        if correction is not None:
            stored = np.frombuffer(correction, np.uint8)
            assert np.array_equal(corrected(guess, stored, actual.nbytes, itemsize, "here"), actual)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
@pytest.mark.parametrize("size", [1e-7, 1e-3, 0.1, 10.0])
def test_a_correction_by_rows_leads_from_the_whole_prediction_to_the_base(
    dtype: DType, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where merging looks only at the elements that can be missed, unmerging predicts them all: zeros of either sign,
    powers of two, deltas of any size, two products."""
    torch.manual_seed(3)
    weight = (torch.randn(600, 1024) * 0.02).to(torch_dtype(dtype))
    weight[3], weight[4, ::2], weight[5], weight[6] = 0, -0.0, 2.0**-5, -(2.0**-14)
    pairs = [(torch.randn(600, 8), torch.randn(8, 1024) * 0.02 * size / 3, scale) for scale in (0.5, -0.3)]
    monkeypatch.setattr(
        merge_rows, "deltas_of", lambda sign, _: [exact_product(b, a, sign * scale) for b, a, scale in pairs]
    )
    monkeypatch.setattr(merge_rows, "negated", lambda sign: -sign)
    op = merge_rows.MergeRows(TensorSpec("w", dtype, (600, 1024)), dtype, 1, True)  # type: ignore[arg-type]
    outcome = op(weight)
    (merged,), (correction,) = outcome.tensors, outcome.asides
    assert merged is not None
    assert correction is not None
    guess = add_rounded(merged, [exact_product(b, a, -scale) for b, a, scale in pairs], dtype)
    hints = Coarsened(bytes_from_tensor(merged), merge_rows.FRACTION_BITS[dtype])
    back = corrected(bytes_from_tensor(guess), bytes_from_tensor(correction), weight.nbytes, 2, "w", hints)
    assert back.tobytes() == bytes_from_tensor(weight).tobytes()


def test_the_keys_of_the_metadata_are_part_of_the_format(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Whatever the modules are called: files of earlier versions must open."""
    surgery.merge(base, adapter, tmp_path / "m.st", undo=tmp_path / "u.st")
    for name, key in (("m.st", "surgery.receipt"), ("u.st", "surgery.undo")):
        with safe_open(tmp_path / name, "pt") as opened:
            assert key in opened.metadata()
