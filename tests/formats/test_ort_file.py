"""ONNX Runtime's file of an adapter: theirs is read, ours is read by them, and none is believed."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import Destination, create_checkpoint, open_checkpoint
from formats.containers import Container
from formats.errors import CorruptFile, FormatError, NotACheckpoint, UnsupportedDType
from formats.ort_file import ORT
from formats.spec import DType, TensorSpec
from formats.tensors import spec_of

TENSORS = {
    "b.lora_A": torch.arange(6, dtype=torch.float32).reshape(3, 2),
    "a.lora_B": torch.arange(8, dtype=torch.float16).reshape(2, 4),
    "größe": torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
    "none": torch.empty(3, 0),
}


def written(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Writes an adapter's file."""
    specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
    with create_checkpoint(Destination(path, container=Container.ORT), specs, {}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return path


def by_onnxruntime(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Has ONNX Runtime write one."""
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(7)
    adapter.set_model_version(9)
    adapter.set_parameters({n: onnxruntime.OrtValue.ortvalue_from_numpy(t.numpy()) for n, t in tensors.items()})
    adapter.export_adapter(str(path))
    return path


def test_onnxruntime_reads_ours(tmp_path: Path) -> None:
    """Names, dtypes, shapes and values, at addresses that are aligned in the file."""
    path = written(tmp_path / "a.onnx_adapter", TENSORS)
    theirs = onnxruntime.AdapterFormat.read_adapter(str(path))
    assert theirs.get_format_version() == 1
    found = theirs.get_parameters()
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tuple(found[name].shape()) == tuple(tensor.shape)
        if tensor.dtype != torch.bfloat16:
            np.testing.assert_array_equal(found[name].numpy(), tensor.numpy())
    onnxruntime.LoraAdapter().Load(str(path))


def test_we_read_onnxruntimes(tmp_path: Path) -> None:
    """Whatever order it writes in."""
    tensors = {name: tensor for name, tensor in TENSORS.items() if tensor.dtype != torch.bfloat16}
    with open_checkpoint(by_onnxruntime(tmp_path / "a.onnx_adapter", tensors)) as checkpoint:
        assert checkpoint.metadata == {"adapter_version": "7", "model_version": "9"}
        assert checkpoint.specs.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name), tensor)
            assert checkpoint.specs[name] == spec_of(name, tensor)


def test_the_bytes_are_a_function_of_the_tensors(tmp_path: Path) -> None:
    """Any order of declaring and writing gives the same file; this one to the byte."""
    one = written(tmp_path / "a.onnx_adapter", TENSORS).read_bytes()
    assert written(tmp_path / "b.onnx_adapter", dict(reversed(TENSORS.items()))).read_bytes() == one
    small = written(tmp_path / "c.onnx_adapter", {"w": torch.tensor([[1.0, 2.0]])}).read_bytes()
    head = struct.pack("<I4s6H", 20, b"TORT", 12, 20, 4, 8, 12, 16) + struct.pack("<4iI", 12, 1, 1, 1, 4)
    vector = struct.pack("<2I", 1, 4)
    parameter = struct.pack("<i2IiI", 40, 16, 20, 1, 60)
    text = struct.pack("<I4s", 1, b"w") + struct.pack("<I2q", 2, 1, 2)
    payload = struct.pack("<I2f", 8, 1.0, 2.0)
    made = head + vector + parameter + text
    assert small == made.ljust(124, b"\0") + payload
    with open_checkpoint(tmp_path / "a.onnx_adapter") as checkpoint:
        assert list(checkpoint.specs) == sorted(TENSORS)


def test_what_is_no_such_file(tmp_path: Path) -> None:
    """Anything else under the name, and another version of the format."""
    path = tmp_path / "a.onnx_adapter"
    for content in (b"", b"short", b"\x08\0\0\0\0\0\0\0ONNX" * 9):
        path.write_bytes(content)
        with pytest.raises(NotACheckpoint, match="not an adapter"):
            open_checkpoint(path)
    good = bytearray(written(tmp_path / "good.onnx_adapter", TENSORS).read_bytes())
    good[24:28] = struct.pack("<i", 2)
    path.write_bytes(good)
    with pytest.raises(NotACheckpoint, match="version"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("place", "value", "kind", "message"),
    [
        (0, 1 << 30, CorruptFile, "outside the file"),
        (20, -(1 << 30), CorruptFile, "outside the file"),
        (40, 1 << 30, CorruptFile, "longer than the file"),
        (60, 99, UnsupportedDType, "dtype"),
        (68, 0, CorruptFile, "empty or too long"),
        (72, 0xFF, CorruptFile, "not text"),
        (76, -1, CorruptFile, "longer than the file"),
        (84, 7, CorruptFile, "extent"),
        (124, 1 << 28, CorruptFile, "longer than the file"),
        (124, 4, CorruptFile, "extent"),
    ],
)
def test_lies_are_found(tmp_path: Path, place: int, value: int, kind: type[FormatError], message: str) -> None:
    """An offset, a length, a type, a dimension that is not so: one error, nothing allocated for it."""
    path = written(tmp_path / "a.onnx_adapter", {"w": torch.tensor([[1.0, 2.0]])})
    content = bytearray(path.read_bytes())
    content[place : place + 4] = struct.pack("<i", value)
    path.write_bytes(content)
    with pytest.raises(kind, match=message):
        open_checkpoint(path)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=8), st.booleans())
def test_no_damage_goes_further_than_an_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, damage: bytes, cut: bool
) -> None:
    """Any bytes anywhere, or the file cut off: it opens with payloads inside of the file, or is refused."""
    folder = tmp_path_factory.mktemp("damage")
    content = bytearray(written(folder / "good.onnx_adapter", TENSORS).read_bytes())
    place %= len(content)
    content = content[:place] if cut else content[:place] + damage + content[place + len(damage) :]
    (folder / "bad.onnx_adapter").write_bytes(content)
    try:
        with open_checkpoint(folder / "bad.onnx_adapter") as checkpoint:
            for name in checkpoint.specs:
                checkpoint.read_bytes(name)
    except FormatError:
        pass


def test_too_large_for_the_format() -> None:
    """Its offsets have 32 bits: found before a byte is written."""
    specs = [TensorSpec(f"{name}.lora_A", DType.F32, (1 << 14, 1 << 14)) for name in "ab"]
    with pytest.raises(FormatError, match="2 GiB"):
        ORT.lay_out(specs, {})
