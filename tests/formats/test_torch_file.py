"""Torch's container, read and written; the oracle is torch itself."""

from __future__ import annotations

import errno
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from formats import Destination, create_checkpoint, open_checkpoint
from formats.containers import Container
from formats.errors import IncompleteOutput, NotACheckpoint, UnsupportedDType, WriteFailed
from formats.spec import DType, TensorSpec
from formats.tensors import bytes_from_tensor, torch_dtype
from formats.torch_file import TorchFile
from formats.torch_writer import lay_out

FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])


def save(state: object, path: Path, zipped: bool = True) -> Path:
    """Writes it with torch.save, in either of its forms."""
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    return path


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """The same dtype, shape and bytes."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    return np.array_equal(bytes_from_tensor(ours), bytes_from_tensor(theirs))


def rewrite(source: Path, out: Path) -> Path:
    """Copies a checkpoint into torch's container."""
    with (
        open_checkpoint(source) as checkpoint,
        create_checkpoint(Destination(out, container=Container.TORCH), checkpoint.specs.values(), {}) as writer,
    ):
        for name in checkpoint.specs:
            writer.write_bytes(name, checkpoint.read_bytes(name))
    return out


def everything() -> dict[str, torch.Tensor]:
    """Each dtype, and each way of lying in a storage."""
    generator = torch.Generator().manual_seed(0)
    state = {dtype.label: torch.randint(0, 100, (3, 5), generator=generator).to(torch_dtype(dtype)) for dtype in DType}
    matrix = torch.randn(6, 7, generator=generator)
    return state | {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "whole": matrix,
        "transposed": matrix.T,
        "strided": matrix[1:6:2, 2::3],
        "row": matrix[2],
        "tied": matrix,
        "expanded": torch.randn(3, 1, generator=generator).expand(3, 4),
        "parameter": torch.nn.Parameter(torch.randn(2, 2, generator=generator).to(torch.bfloat16)),
        "of_four": torch.randn(2, 3, 4, 5, generator=generator).permute(3, 1, 0, 2),
    }


@FORMS
def test_every_dtype_and_layout_reads_as_torch_reads_it(tmp_path: Path, zipped: bool) -> None:
    """Names in their order; contiguous copies of what may have been views. Of the older form with dtypes that are newer
    torch can load nothing any more."""
    path = save(everything(), tmp_path / "a.pt", zipped)
    expected = torch.load(path, weights_only=True) if zipped else everything()
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.specs) == list(expected)
        for name, tensor in expected.items():
            assert alike(checkpoint.read(name), tensor), name
            assert checkpoint.specs[name].shape == tuple(tensor.shape)


@FORMS
def test_what_we_write_torch_loads_the_same(tmp_path: Path, zipped: bool) -> None:
    """With weights_only, mapped or not; members are aligned, their checksums right."""
    source = save(everything(), tmp_path / "a.pt", zipped)
    out = rewrite(source, tmp_path / "b.bin")
    for mapped in (False, True):
        loaded = torch.load(out, weights_only=True, mmap=mapped)
        assert all(alike(loaded[name], tensor) for name, tensor in everything().items())
        assert list(loaded) == list(everything())
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
    reader = torch._C.PyTorchFileReader(str(out))
    assert all(reader.get_record_offset(f"data/{key}") % 64 == 0 for key in range(len(everything())))
    assert rewrite(out, tmp_path / "again.bin").read_bytes() == out.read_bytes()


def test_safetensors_to_torch_and_back_gives_the_same_bytes(tmp_path: Path) -> None:
    """The law of the round trip."""
    state = {name: tensor.detach().clone().contiguous() for name, tensor in everything().items()}
    save_file(state, tmp_path / "a.st", metadata={"format": "pt"})
    with (
        open_checkpoint(rewrite(tmp_path / "a.st", tmp_path / "b.pth")) as checkpoint,
        create_checkpoint(tmp_path / "c.st", checkpoint.specs.values(), checkpoint.metadata) as writer,
    ):
        for name in checkpoint.specs:
            writer.write_bytes(name, checkpoint.read_bytes(name))
    assert (tmp_path / "c.st").read_bytes() == (tmp_path / "a.st").read_bytes()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_strided_view_reads_piece_by_piece(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any slice and order of dimensions, from any byte, in pieces of any length."""
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float64]))
    tensor = torch.arange(int(np.prod(shape))).to(dtype).reshape(shape)
    cuts = tuple(slice(data.draw(st.integers(0, n - 1)), None, data.draw(st.integers(1, 3))) for n in shape)
    view = tensor[cuts].permute(*data.draw(st.permutations(range(len(shape)))))
    path = save({"a": view}, tmp_path_factory.mktemp("views") / "a.pt")
    with open_checkpoint(path) as checkpoint:
        payload, step = checkpoint.read_bytes("a"), data.draw(st.integers(1, 17))
        assert alike(checkpoint.read("a"), view)
        for begin in range(0, payload.nbytes, step):
            piece = np.empty(min(step, payload.nbytes - begin), np.uint8)
            checkpoint.read_into("a", begin, piece)
            assert np.array_equal(piece, payload[begin : begin + step])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e5m2fnuz])
@FORMS
def test_what_safetensors_cannot_hold_is_refused_by_name(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    """Complex numbers, and float8 of another kind."""
    path = save({"fine": torch.zeros(2), "freqs": torch.zeros(2).to(dtype)}, tmp_path / "a.pt", zipped)
    with pytest.raises(UnsupportedDType, match="freqs"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("state", "left"),
    [
        ({"state_dict": {"w": torch.ones(2)}, "epoch": 3, "lr": [0.1]}, "epoch, lr"),
        ({"model": {"state_dict": {"w": torch.ones(2)}}, "optimizer": {"state": {0: torch.zeros(3)}}}, "optimizer"),
        ({"w": torch.ones(2), "version": "1"}, "version"),
    ],
    ids=["lightning", "nested", "beside"],
)
def test_a_training_checkpoint_is_unwrapped_and_says_so(tmp_path: Path, state: object, left: str) -> None:
    """What is left behind is named."""
    with open_checkpoint(save(state, tmp_path / "a.ckpt")) as checkpoint:
        assert list(checkpoint.specs) == ["w"]
        assert any(left in note for note in checkpoint.notes)


def test_prefixes_stay(tmp_path: Path) -> None:
    """DataParallel's names are the file's names."""
    with open_checkpoint(save({"module.w": torch.ones(2)}, tmp_path / "a.pt")) as checkpoint:
        assert list(checkpoint.specs) == ["module.w"]
        assert checkpoint.notes == ()


@pytest.mark.parametrize(
    "state", [torch.ones(2), [torch.ones(2)], {"epoch": 3}, 7], ids=["tensor", "list", "none", "7"]
)
def test_a_file_without_a_state_dict_is_told_for_what_it_is(tmp_path: Path, state: object) -> None:
    """Tensors need names."""
    with pytest.raises(NotACheckpoint, match="no state dict"):
        open_checkpoint(save(state, tmp_path / "a.pt"))


def test_a_state_dict_of_a_module_reads(tmp_path: Path) -> None:
    """An OrderedDict with attributes."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    with open_checkpoint(save(module.state_dict(), tmp_path / "a.pt")) as checkpoint:
        assert list(checkpoint.specs) == list(module.state_dict())
        assert checkpoint.specs["1.num_batches_tracked"] == TensorSpec("1.num_batches_tracked", DType.I64, ())


def test_tied_names_stand_once_where_config_ties_them(tmp_path: Path) -> None:
    """Only the very same view counts, only the embedding's name stays, and only a config's word leaves others out."""
    weight = torch.randn(5, 3)
    state = {"lm_head.weight": weight, "transformer.wte.weight": weight, "other": weight.T, "h.bias": weight[0]}
    path = save(state, tmp_path / "pytorch_model.bin")
    with TorchFile(path) as checkpoint:
        assert list(checkpoint.specs) == list(state)
        assert checkpoint.shared == (("lm_head.weight", "transformer.wte.weight"),)
        assert "are one tensor" in checkpoint.notes[0]
    for said, kept in (({"tie_word_embeddings": False}, 4), ({}, 3), ({"tie_word_embeddings": True}, 3)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **said}))
        with TorchFile(path) as checkpoint:
            assert len(checkpoint.specs) == kept
            assert "transformer.wte.weight" in checkpoint.specs
            assert kept == 4 or "config.json ties them" in checkpoint.notes[0]


def test_shards_in_torch_containers_are_one_checkpoint(tmp_path: Path) -> None:
    """By their index; a tied name that the index lists may be left out."""
    weight = torch.randn(5, 3)
    save({"lm_head.weight": weight, "embed_tokens.weight": weight}, tmp_path / "pytorch_model-00001-of-00002.bin")
    save({"b": torch.ones(2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    shards = dict.fromkeys(("lm_head.weight", "embed_tokens.weight"), "pytorch_model-00001-of-00002.bin")
    index = {"metadata": {"total_size": 68}, "weight_map": {**shards, "b": "pytorch_model-00002-of-00002.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["X"]}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.specs) == {"embed_tokens.weight", "b"}
        assert torch.equal(checkpoint.read("embed_tokens.weight"), weight)


def test_safetensors_come_first_in_a_folder_and_the_trainers_files_never(tmp_path: Path) -> None:
    """optimizer.pt and training_args.bin are no weights."""
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth"):
        save({"o": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(NotACheckpoint):
        open_checkpoint(tmp_path)
    save({"b": torch.zeros(1)}, tmp_path / "weights.pt")
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.specs) == ["b"]
    save_file({"s": torch.zeros(1)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.specs) == ["s"]


def test_pieces_out_of_order_give_the_same_file(tmp_path: Path) -> None:
    """Checksums too."""
    spec, payload = TensorSpec("a", DType.F32, (4,)), np.arange(16, dtype=np.uint8)
    for name, order in (("x.pt", (0, 8)), ("y.pt", (8, 0))):
        with (
            create_checkpoint(Destination(tmp_path / name, container=Container.TORCH), [spec], {}) as writer,
            writer.parts("a") as put,
        ):
            for begin in order:
                put(begin, payload[begin : begin + 8].data)
    assert (tmp_path / "x.pt").read_bytes() == (tmp_path / "y.pt").read_bytes()


def test_an_incomplete_output_never_appears(tmp_path: Path) -> None:
    """A tensor missing, written twice, left out, of another shape."""
    spec = TensorSpec("a", DType.F32, (4,))
    for fault in (
        lambda writer: None,
        lambda writer: writer.omit("a"),
        lambda writer: writer.write("a", torch.zeros(3)),
        lambda writer: writer.write_bytes("a", np.zeros(12, np.uint8)),
        lambda writer: [writer.write("a", torch.zeros(4)) for _ in range(2)],
        lambda writer: writer.write("b", torch.zeros(4)),
    ):
        destination = Destination(tmp_path / "a.bin", container=Container.TORCH)
        with pytest.raises(IncompleteOutput), create_checkpoint(destination, [spec], {}) as writer:
            fault(writer)
        assert not list(tmp_path.iterdir())


def test_what_the_disk_says_while_torch_saves_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what torch's writer makes of it; nothing appears."""

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("formats.torch_writer.write_at", full)
    destination, tensor = Destination(tmp_path / "a.bin", container=Container.TORCH), torch.ones(4)
    with (
        pytest.raises(WriteFailed, match="the disk is full"),
        create_checkpoint(destination, [TensorSpec("a", DType.F32, (4,))], {}) as writer,
    ):
        writer.write("a", tensor)
    assert not list(tmp_path.iterdir())


def test_a_large_tensor_is_described_in_64_bits(tmp_path: Path) -> None:
    """Sizes and offsets beyond 4 GiB, where torch.save puts them; nothing of that size is written."""
    state = {
        "big": torch.empty(1 << 20, 9 << 10, dtype=torch.float8_e4m3fn),
        "wide": torch.empty(3_000_000_000, dtype=torch.bfloat16),
        "last": torch.ones(2),
    }
    with torch.serialization.skip_data(), (tmp_path / "a.pt").open("wb") as file:
        torch.save(state, file)
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert {name: spec.shape for name, spec in checkpoint.specs.items()} == {n: t.shape for n, t in state.items()}
        found = lay_out(checkpoint.specs.values(), {})
        places = {name: checkpoint.place(name) for name in state}
    assert found.offsets == {name: place.offset for name, place in places.items() if place is not None}
    assert found.offsets["last"] > 14 * 10**9
    assert found.size == (tmp_path / "a.pt").stat().st_size


def test_loaded_files_agree(tmp_path: Path) -> None:
    """safetensors' own reader sees what torch saved."""
    path = save({"a": torch.randn(3, 4).T}, tmp_path / "a.pt")
    with (
        open_checkpoint(path) as checkpoint,
        create_checkpoint(tmp_path / "a.st", checkpoint.specs.values(), checkpoint.metadata) as writer,
    ):
        writer.write("a", checkpoint.read("a"))
    assert torch.equal(load_file(tmp_path / "a.st")["a"], torch.load(path)["a"])
