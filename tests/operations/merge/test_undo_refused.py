"""What does not belong to an undo is one clear error, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from lora_by_hand import lora, up
from miniature import weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import AlreadyMerged
from surgery.receipts.undo_file import UNDO

Files = dict[str, Path]


@pytest.fixture
def merged(tmp_path: Path) -> Files:
    """A merge with its undo file: base, adapter, merged and undo."""
    files = {name: tmp_path / f"{name}.st" for name in ("base", "merged", "undo", "out")}
    save_file(weights(dtype=torch.bfloat16), files["base"], metadata={"format": "pt"})
    files["adapter"] = lora(tmp_path / "a", up())
    surgery.merge(files["base"], files["adapter"], files["merged"], undo=files["undo"])
    return files


def metadata(path: Path) -> dict[str, str]:
    """Of a safetensors file."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def truncated(files: Files) -> None:
    """Half of it, as a copy that was interrupted leaves it."""
    files["undo"].write_bytes(files["undo"].read_bytes()[: files["undo"].stat().st_size // 2])


def last_bytes_lost(files: Files) -> None:
    """The header is whole."""
    files["undo"].write_bytes(files["undo"].read_bytes()[:-7])


def text(files: Files) -> None:
    """Another program's file."""
    files["undo"].write_text("not a safetensors file at all")


def empty(files: Files) -> None:
    """Nothing in it."""
    files["undo"].write_bytes(b"")


def missing(files: Files) -> None:
    """Not there."""
    files["undo"].unlink()


def no_record(files: Files) -> None:
    """Saved again by a program that drops metadata."""
    save_file(load_file(files["undo"]), files["undo"])


def strange_record(files: Files) -> None:
    """A record of no sense."""
    save_file(load_file(files["undo"]), files["undo"], metadata={UNDO: "[1, 2"})


def newer_version(files: Files) -> None:
    """One that this program does not know."""
    record = json.loads(metadata(files["undo"])[UNDO]) | {"version": 99}
    save_file(load_file(files["undo"]), files["undo"], metadata={UNDO: json.dumps(record)})


def no_corrections(files: Files) -> None:
    """The record without what it speaks of."""
    save_file({}, files["undo"], metadata=metadata(files["undo"]))


def another_correction(files: Files) -> None:
    """One of another tensor's or merge's."""
    wrong = {name: tensor.flip(0) for name, tensor in load_file(files["undo"]).items()}
    save_file(wrong, files["undo"], metadata=metadata(files["undo"]))


def of_another_base(files: Files) -> None:
    """The same adapter, merged into other weights."""
    save_file(weights(1, torch.bfloat16), files["base"].with_name("other.st"), metadata={"format": "pt"})
    other = files["base"].with_name("other.st")
    surgery.merge(other, files["adapter"], other.with_name("m.st"), undo=files["undo"], force=True)


def unmerged_before(files: Files) -> None:
    """The base itself in the place of the merged file."""
    files["merged"] = files["base"]


WRONG: list[Callable[[Files], None]] = [
    truncated, last_bytes_lost, text, empty, missing, no_record, strange_record, newer_version, no_corrections,
    another_correction, of_another_base, unmerged_before,
]  # fmt: skip


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
def test_what_does_not_belong_is_one_error(merged: Files, spoil: Callable[[Files], None], cli: Any) -> None:
    """Exit code 1, one message that names a file or a tensor, no traceback, no output."""
    spoil(merged)
    arguments = ("unmerge", merged["merged"], merged["adapter"], "-o", merged["out"], "--undo", merged["undo"])
    result: Result = cli(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert "where:" in result.stderr
    assert not merged["out"].exists()


def test_merging_a_merged_file_again_writes_no_undo_file(merged: Files) -> None:
    """Refused before either output begins."""
    again = merged["out"].with_name("again.st")
    with pytest.raises(AlreadyMerged):
        surgery.merge(merged["merged"], merged["adapter"], merged["out"], undo=again)
    assert not merged["out"].exists()
    assert not again.exists()


@pytest.mark.parametrize("verb", ["merge", "unmerge"])
def test_an_interrupt_leaves_nothing(merged: Files, verb: str) -> None:
    """Ctrl-C at any step: no output, no undo file, nothing hidden."""
    before = set(merged["base"].parent.iterdir())

    def interrupted(done: int, total: int, name: str) -> None:
        if done >= total // 2:
            raise KeyboardInterrupt

    first, undo = ("base", "again") if verb == "merge" else ("merged", "undo")
    resources = surgery.Resources(2, progress=interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(surgery, verb)(
            merged[first], merged["adapter"], merged["out"], undo=merged["undo"].with_stem(undo), resources=resources
        )
    assert set(merged["base"].parent.iterdir()) == before
