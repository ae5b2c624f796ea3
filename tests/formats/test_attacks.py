"""Files that lie about themselves: one clear error each, and nothing allocated for what is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from formats import open_checkpoint
from formats.errors import CorruptFile, FormatError, NotACheckpoint, PathNotFound, UnknownTensor


def file_of(path: Path, header: object, payload: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + payload)
    return path


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    """One tensor's entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES = {
    "extent contradicts shape": ({"a": entry(shape=[2])}, b"1234"),
    "payload truncated": ({"a": entry()}, b"12"),
    "bytes after the end": ({"a": entry()}, b"123456"),
    "overlap": ({"a": entry(), "b": entry(offsets=[2, 6])}, b"123456"),
    "gap": ({"a": entry(), "b": entry(offsets=[6, 10])}, b"1234567890"),
    "negative shape": ({"a": entry(shape=[-1])}, b"1234"),
    "huge shape": ({"a": entry(shape=[1 << 40, 1 << 40])}, b"1234"),
    "offsets backwards": ({"a": entry(offsets=[4, 0])}, b"1234"),
    "boolean shape": ({"a": entry(shape=[True])}, b"1234"),
    "unknown dtype": ({"a": entry(dtype="F4096")}, b"1234"),
    "entry is a list": ({"a": [1, 2]}, b""),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, b""),
    "metadata not strings": ({"__metadata__": {"a": 1}}, b""),
    "broken JSON": (b'{"a": ', b""),
    "name twice": (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}', b""),
    "nested too deep": (b'{"a":' + b"[" * 100_000, b""),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused(tmp_path: Path, lie: str) -> None:
    """CorruptFile, naming the file."""
    path = file_of(tmp_path / "lie.safetensors", *LIES[lie])
    with pytest.raises(CorruptFile) as caught:
        open_checkpoint(path)
    assert "lie.safetensors" in str(caught.value)


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    """Both lengths are named."""
    path = file_of(tmp_path / "a.st", {"a": entry()}, length=5000)
    with pytest.raises(CorruptFile, match="claims more") as caught:
        open_checkpoint(path)
    assert "5008" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04" * 20, b"\xff" * 64])
def test_something_else_is_not_a_checkpoint(tmp_path: Path, content: bytes) -> None:
    """An empty file, a short one, a zip, noise."""
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(NotACheckpoint):
        open_checkpoint(tmp_path / "x.safetensors")


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    """So is a folder without weights."""
    with pytest.raises(PathNotFound, match="no such"):
        open_checkpoint(tmp_path / "none.st")
    with pytest.raises(NotACheckpoint, match="no safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(NotACheckpoint, match="torch"):
        open_checkpoint(tmp_path / "pytorch_model.bin")


def test_an_unknown_tensor_names_the_nearest(tmp_path: Path) -> None:
    """A typing error is answered with the name that was meant."""
    save_file({"encoder.layer.0.weight": torch.zeros(1)}, tmp_path / "a.st")
    with open_checkpoint(tmp_path / "a.st") as checkpoint, pytest.raises(UnknownTensor, match=r"layer\.0"):
        checkpoint.read("encoder.layers.0.weight")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """No short tensor comes out of it."""
    save_file({"a": torch.zeros(1000)}, tmp_path / "a.st")
    with open_checkpoint(tmp_path / "a.st") as checkpoint:
        with (tmp_path / "a.st").open("r+b") as file:
            file.truncate(200)
        with pytest.raises(CorruptFile, match="shorter"):
            checkpoint.read("a")


INDEXES = {
    "escapes upwards": {"a": "../outside.safetensors"},
    "absolute": {"a": "/etc/passwd"},
    "not text": {"a": 3},
    "shard missing": {"a": "none.safetensors"},
    "tensor missing": {"a": "one.safetensors", "b": "one.safetensors"},
    "tensor elsewhere": {"a": "two.safetensors", "c": "two.safetensors"},
}


@pytest.mark.parametrize("lie", INDEXES)
def test_a_lying_index_is_refused(tmp_path: Path, lie: str) -> None:
    """An index reaches nothing outside its folder and must agree with its shards."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, path in (("a", "model/one"), ("c", "model/two"), ("a", "outside")):
        save_file({name: torch.zeros(1)}, tmp_path / f"{path}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": INDEXES[lie]}))
    with pytest.raises(FormatError):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Whichever the index means; and an index that names one tensor twice, of which JSON would take the last."""
    for number in (1, 2):
        save_file(
            {"a": torch.full((2,), float(number)), f"b{number}": torch.ones(1)}, tmp_path / f"{number}.safetensors"
        )
    index = tmp_path / "model.safetensors.index.json"
    shards = {"a": "1.safetensors", "b1": "1.safetensors", "b2": "2.safetensors"}
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(CorruptFile, match="in two shards") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.details["where"].endswith(": a")
    index.write_text('{"weight_map": {"a": "1.safetensors", "b1": "1.safetensors", "a": "2.safetensors"}}')
    with pytest.raises(CorruptFile, match="names a tensor twice") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.details["found"] == "a"
