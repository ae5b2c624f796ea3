"""Torch files made to harm: each is refused by one clear error, and nothing in it runs."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from formats import open_checkpoint
from formats.errors import CorruptFile, FormatError, NotACheckpoint, UnsafeFile

TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def archive(path: Path, content: bytes, members: dict[str, bytes] | None = None, how: int = zipfile.ZIP_STORED) -> Path:
    """A zip archive with this data.pkl and these members."""
    with zipfile.ZipFile(path, "w", how) as file:
        file.writestr("archive/data.pkl", content)
        for name, payload in (members or {"data/0": b"\0" * 16}).items():
            file.writestr(f"archive/{name}", payload)
        file.writestr("archive/version", b"3\n")
    return path


def number(value: int) -> bytes:
    """A pickled int."""
    return pickle.dumps(value, 2)[2:-1]


def text(value: str) -> bytes:
    """A pickled string, not memoised."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def numbers(values: tuple[int, ...]) -> bytes:
    """A pickled tuple."""
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    shape: tuple[int, ...] = (4,), strides: tuple[int, ...] = (1,), offset: int = 0, key: str = "0", count: int = 4
) -> bytes:
    """The pickle of {"w": tensor}, with whatever numbers."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(count) + b"tQ"
    body = b"(" + storage + number(offset) + numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}" + text("w") + TENSOR + body + b"s."


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch {self.target}",)


def test_the_attacks_start_from_a_sound_file(tmp_path: Path) -> None:
    """What the others spoil."""
    with open_checkpoint(archive(tmp_path / "a.pt", tensor())) as checkpoint:
        assert torch.equal(checkpoint.read("w"), torch.zeros(4))


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_that_would_run_something_is_refused_by_name(tmp_path: Path, protocol: int, nested: bool) -> None:
    """os.system, deep in a list, in any protocol; the name stands in the error, the file is not created."""
    state: object = {"w": [[Runs(tmp_path / "harm")]] if nested else Runs(tmp_path / "harm")}
    with pytest.raises(UnsafeFile, match=r"(posix|nt)\.system") as caught:
        open_checkpoint(archive(tmp_path / "a.pt", pickle.dumps(state, protocol)))
    assert "nothing of it was run" in str(caught.value)
    assert not (tmp_path / "harm").exists()


def test_the_older_form_runs_nothing_either(tmp_path: Path) -> None:
    """Each of its five pickles is followed by the same machine."""
    torch.save({"w": torch.zeros(4)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    sound = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(sound[:15] + pickle.dumps(Runs(tmp_path / "harm"), 2) + sound[15:])
    with pytest.raises(UnsafeFile, match="system"):
        open_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02cbuiltins\neval\n" + text("1") + b"\x85R.",
        b"\x80\x02cbuiltins\ngetattr\n.",
        b"\x80\x02cposix\nsystem\n.",
        b"\x80\x02ctorch\nload\n.",
        b"\x80\x02ctorch.serialization\nload\n.",
        b"\x80\x02ctorch._utils\n_rebuild_device_tensor_from_numpy\n.",
        b"\x80\x04" + text("os") + text("system") + b"\x93.",
        b"\x80\x02ccollections\nOrderedDict.__init__\n.",
    ],
)
def test_no_other_name_is_let_in(tmp_path: Path, content: bytes) -> None:
    """Not even torch's own, but for those of a state dict."""
    with pytest.raises(UnsafeFile):
        open_checkpoint(archive(tmp_path / "a.pt", content))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}\x81.",
        b"\x80\x02(i__main__\nX\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02(cos\nsystem\no.",
        b"\x80\x04\x8f.",
    ],
    ids=["newobj", "inst", "extension", "obj", "set"],
)
def test_opcodes_beyond_plain_containers_are_refused(tmp_path: Path, content: bytes) -> None:
    """Objects made in other ways than by a call."""
    with pytest.raises(UnsafeFile):
        open_checkpoint(archive(tmp_path / "a.pt", content))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x02NN.",
        b"\x80\x02(.",
        b"\x80\x02t.",
        b"\x80\x02\x87.",
        b"\x80\x02h\x07.",
        b"\x80\x02Ns.",
        b"\x80\x02]NNs.",
        b"\x80\x02}(Nu.",
        b"\x80\x02NNR.",
        b"\x80\x02}NR.",
        b"\x80\x02NNb.",
        b"\x80\x02NQ.",
        b"\x80\x02)Q.",
        b"\x80\x02X\xff\xff\xff\x7fabc",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc",
        b"\x80\x02\x8b\xff\xff\xff\x7f1",
        b"\x80\x02}]Ns.",
        b"\x80\x02}" + b"\x85" * 3 + b"Ns.",
        b"\x80\x02}N" + b"\x85" * 200_000 + b"Ns.",
        b"\x80\x02" + TENSOR + b")R.",
        b"\x80\x02" + TENSOR + b"(NNNNNNtR.",
        b"\xff" * 40,
    ],
)
def test_malformed_pickles_are_corrupt(tmp_path: Path, content: bytes) -> None:
    """Cut short, with an empty stack, with lengths that are not there, with keys that are no names."""
    with pytest.raises(CorruptFile):
        open_checkpoint(archive(tmp_path / "a.pt", content))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tensor(shape=(5,)), "beyond its storage"),
        (tensor(offset=1), "beyond its storage"),
        (tensor(shape=(2, 2), strides=(3, 1)), "beyond its storage"),
        (tensor(shape=(1 << 40,)), "beyond its storage"),
        (tensor(shape=(1 << 40,), strides=(0,)), "with repeated elements"),
        (tensor(shape=(1 << 30,) * 8, strides=(0,) * 8), "with repeated elements"),
        (tensor(shape=(-4,)), "out of range"),
        (tensor(strides=(-1,)), "out of range"),
        (tensor(offset=-1), "out of range"),
        (tensor(shape=(0, 1 << 80), strides=(1, 1)), "out of range"),
        (tensor(shape=(2, 2)), "dimensions"),
        (tensor(shape=(1,) * 65, strides=(1,) * 65), "dimensions"),
        (tensor(key="1"), "not in the file"),
        (tensor(key="../data.pkl"), "not in the file"),
        (tensor(key="/etc/passwd"), "not in the file"),
        (tensor(count=1 << 50), "not in the file"),
        (tensor(count=2), "not in the file"),
        (tensor().replace(b"w", b"\xed"), "malformed"),
    ],
)
def test_sizes_and_offsets_are_checked_before_anything_is_allocated(tmp_path: Path, content: bytes, said: str) -> None:
    """Against the archive, whatever the pickle claims."""
    with pytest.raises(CorruptFile, match=said):
        open_checkpoint(archive(tmp_path / "a.pt", content))


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """Half a surrogate pair, or a number."""
    for key in (b"X\x03\x00\x00\x00\xed\xa0\x80", number(3)):
        with pytest.raises(CorruptFile, match="name is not text"):
            open_checkpoint(archive(tmp_path / "a.pt", tensor().replace(text("w"), key)))


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_an_error(tmp_path: Path, kept: float, zipped: bool) -> None:
    """Of either form, wherever it ends."""
    torch.save({f"w{n}": torch.randn(50) for n in range(4)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(CorruptFile):
        open_checkpoint(tmp_path / "a.pt")


def test_a_pickle_may_not_grow_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by its length nor by the number of its objects."""
    monkeypatch.setattr("formats.torch_pickle.MAX_STEPS", 1000)
    with pytest.raises(CorruptFile, match="opcodes"):
        open_checkpoint(archive(tmp_path / "a.pt", b"\x80\x02" + b"]" * 2000 + b"."))
    monkeypatch.setattr("formats.torch_archive.MAX_PICKLE", 1000)
    with pytest.raises(CorruptFile, match="too large"):
        open_checkpoint(archive(tmp_path / "a.pt", b"\x80\x02" + b"]" * 2000 + b"."))


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    """torch stores them; a bomb would not."""
    with pytest.raises(CorruptFile, match="compressed"):
        open_checkpoint(archive(tmp_path / "a.pt", tensor(), how=zipfile.ZIP_DEFLATED))


def test_names_in_the_archive_reach_nowhere(tmp_path: Path) -> None:
    """Nothing is unpacked: a member called ../../x is a name that no storage has."""
    members = {"data/0": b"\0" * 16, "../../escaped": b"x", "/etc/escaped": b"x"}
    with open_checkpoint(archive(tmp_path / "a.pt", tensor(), members)) as checkpoint:
        assert list(checkpoint.specs) == ["w"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_members_that_overlap_or_share_a_name_are_refused(tmp_path: Path) -> None:
    """A small file must not become a large one."""
    path = archive(tmp_path / "a.pt", tensor(), {"data/0": b"\0" * 16, "data/1": b"\0" * 16})
    content = bytearray(path.read_bytes())
    first, second = (content.rfind(b"archive/data/%d" % key) for key in (0, 1))
    content[second - 4 : second] = content[first - 4 : first]  # the offset of its header
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match="overlap"):
        open_checkpoint(path)
    content[second + len("archive/data/")] = ord("0")
    path.write_bytes(content)
    with pytest.raises(CorruptFile):
        open_checkpoint(path)


def test_a_directory_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    """Into a member, or beyond the file."""
    path = archive(tmp_path / "a.pt", tensor())
    sound = path.read_bytes()
    entry = sound.rfind(b"archive/data/0")
    for offset in (7, len(sound), 0xFFFFFFF0):
        spoilt = bytearray(sound)
        spoilt[entry - 4 : entry] = offset.to_bytes(4, "little")
        path.write_bytes(spoilt)
        with pytest.raises(CorruptFile):
            open_checkpoint(path)


def test_other_files_are_told_for_what_they_are(tmp_path: Path) -> None:
    """TorchScript, another zip, tar, nothing, noise; big-endian numbers."""
    archive(tmp_path / "script.pt", b"", {"code/__torch__.py": b"", "constants.pkl": b""}, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "docs.pt", "w") as file:
        file.writestr("letter.txt", "hello")
    (tmp_path / "tar.pt").write_bytes(b"a" * 257 + b"ustar" + b"\0" * 200)
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "noise.pt").write_bytes(b"\x00\x01" * 100)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Runs(tmp_path / "harm")))
    for name, said in (
        ("script", "TorchScript"),
        ("docs", "did not write"),
        ("tar", "tar archive"),
        ("empty", "not a file"),
        ("noise", "not a file"),
        ("pickle", "not a file"),
    ):
        with pytest.raises(NotACheckpoint, match=said):
            open_checkpoint(tmp_path / f"{name}.pt")
    assert not (tmp_path / "harm").exists()
    with pytest.raises(CorruptFile, match="little-endian"):
        open_checkpoint(archive(tmp_path / "b.pt", tensor(), {"data/0": b"\0" * 16, "byteorder": b"big"}))


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """Contiguous or not."""
    torch.save({"a": torch.zeros(4000), "b": torch.zeros(64, 64).T}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        checkpoint.read("b")
        os.truncate(tmp_path / "a.pt", 2000)
        for name in ("a", "b"):
            with pytest.raises(CorruptFile, match="shorter"):
                checkpoint.read(name)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_flipped_byte_does_more_than_raise(tmp_path: Path, zipped: bool) -> None:
    """Every byte before the payload, in turn: a FormatError or a readable file, never anything else."""
    torch.save(
        {"w": torch.zeros(4), "x": torch.zeros(2, 3).T}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped
    )
    sound = (tmp_path / "a.pt").read_bytes()
    for position in range(0, len(sound), 3):
        spoilt = bytearray(sound)
        spoilt[position] ^= 0x15
        (tmp_path / "a.pt").write_bytes(spoilt)
        try:
            with open_checkpoint(tmp_path / "a.pt") as checkpoint:
                for name, spec in checkpoint.specs.items():
                    assert checkpoint.read_bytes(name).nbytes == spec.nbytes
        except FormatError:
            pass
