"""Outputs appear whole or not at all, and their bytes depend on nothing but their content."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats import Destination, create_checkpoint, destination_like, open_checkpoint
from formats.errors import IncompleteOutput, OutputExists
from formats.open_files import OpenFiles
from formats.spec import DType, TensorSpec
from formats.staging import Staging
from formats.tensors import spec_of

TENSORS = {"w": torch.randn(5, 7), "b": torch.arange(3), "h": torch.randn(4).to(torch.bfloat16)}
SPECS = [spec_of(name, tensor) for name, tensor in TENSORS.items()]


def write(path: Path | Destination, order: str = "wbh") -> None:
    """Writes the three tensors in some order."""
    with create_checkpoint(path, SPECS, {"format": "pt"}) as writer:
        for name in order:
            writer.write(name, TENSORS[name])


def test_order_and_threads_do_not_show(tmp_path: Path) -> None:
    """Any order, and three threads at once: the same bytes as the reference writer's."""
    write(tmp_path / "one.st", "wbh")
    write(tmp_path / "two.st", "hbw")
    with create_checkpoint(tmp_path / "three.st", SPECS, {"format": "pt"}) as writer:
        threads = [threading.Thread(target=writer.write, args=item) for item in TENSORS.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    save_file(TENSORS, tmp_path / "reference.st", metadata={"format": "pt"})
    reference = (tmp_path / "reference.st").read_bytes()
    assert all((tmp_path / f"{name}.st").read_bytes() == reference for name in ("one", "two", "three"))


def test_omitting_and_sealing_lay_the_file_out_again(tmp_path: Path) -> None:
    """The file is the one that would have been written without the omitted tensor and with the later metadata."""
    with create_checkpoint(tmp_path / "a.st", SPECS, {"format": "pt"}) as writer:
        writer.write("w", TENSORS["w"])
        writer.omit("b")
        writer.write("h", TENSORS["h"])
        writer.seal({"note": "x" * 1000})
    kept = {name: TENSORS[name] for name in "wh"}
    save_file(kept, tmp_path / "reference.st", metadata={"note": "x" * 1000})
    assert (tmp_path / "a.st").read_bytes() == (tmp_path / "reference.st").read_bytes()


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    """Neither the output nor a temporary file, for a file and for a folder."""
    for target in (tmp_path / "a.st", tmp_path / "folder"):
        with pytest.raises(RuntimeError, match="halfway"), create_checkpoint(target, SPECS, {}) as writer:
            writer.write("w", TENSORS["w"])
            raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []


def test_without_unnamed_files_an_exception_leaves_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hidden temporary file of other systems is removed; the output's bytes are the same."""
    write(tmp_path / "usual.st")
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    with pytest.raises(RuntimeError), create_checkpoint(tmp_path / "a.st", SPECS, {}):
        raise RuntimeError
    write(tmp_path / "b.st")
    write(Destination(tmp_path / "folder"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.st", "folder", "usual.st"]
    assert (tmp_path / "b.st").read_bytes() == (tmp_path / "usual.st").read_bytes()


@pytest.mark.parametrize("fault", ["missing", "twice", "undeclared", "shape", "dtype"])
def test_a_writer_is_held_to_its_declaration(tmp_path: Path, fault: str) -> None:
    """A tensor missing, written twice, never declared, or of another shape or dtype publishes nothing."""
    with pytest.raises(IncompleteOutput), create_checkpoint(tmp_path / "a.st", SPECS, {}) as writer:
        writer.write("b", TENSORS["b"])
        writer.write("h", TENSORS["h"])
        if fault == "twice":
            writer.write("b", TENSORS["b"])
        if fault == "undeclared":
            writer.write("x", TENSORS["b"])
        if fault == "shape":
            writer.write("w", torch.randn(7, 5))
        if fault == "dtype":
            writer.write("w", TENSORS["w"].double())
    assert not (tmp_path / "a.st").exists()


def test_an_existing_output_is_kept_unless_forced(tmp_path: Path) -> None:
    """A file, a full folder; an empty folder is taken."""
    write(tmp_path / "a.st")
    before = (tmp_path / "a.st").read_bytes()
    with pytest.raises(OutputExists, match="--force"):
        write(tmp_path / "a.st", "")
    assert (tmp_path / "a.st").read_bytes() == before
    (tmp_path / "empty").mkdir()
    write(Destination(tmp_path / "empty"))
    with pytest.raises(OutputExists, match="not empty"):
        write(Destination(tmp_path / "empty"))
    (tmp_path / "empty" / "stale").write_text("from before")
    write(Destination(tmp_path / "empty", force=True))
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["model.safetensors"]


def test_an_input_is_never_an_output(tmp_path: Path) -> None:
    """Not by the same path, not through a link, not as the folder that holds it; force or not."""
    folder = tmp_path / "base"
    write(Destination(folder))
    (tmp_path / "link").symlink_to(folder)
    for target in (folder, tmp_path / "link", tmp_path / "x" / ".." / "base", tmp_path):
        with pytest.raises(OutputExists, match="overwrite an input"):
            Staging(target, folder=True, inputs=[folder], force=True)


def test_a_folder_comes_out_shaped_like_its_source(tmp_path: Path) -> None:
    """Same shards and companions, a total_size in bytes; no other weights, no adapter config."""
    source = tmp_path / "source"
    source.mkdir()
    save_file({"w": TENSORS["w"]}, source / "model-1.safetensors")
    save_file({"b": TENSORS["b"], "h": TENSORS["h"]}, source / "model-2.safetensors")
    weight_map = {"w": "model-1.safetensors", "b": "model-2.safetensors", "h": "model-2.safetensors"}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "config.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("stale weights")
    files = OpenFiles()
    write(destination_like(source, tmp_path / "out", SPECS, inputs=[source], force=False, files=files))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "config.json"}
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == weight_map
    assert written["metadata"]["total_size"] == sum(spec.nbytes for spec in SPECS)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in TENSORS.items())
    write(destination_like(source, tmp_path / "single.st", SPECS, inputs=[source], force=False, files=files))
    assert set(load_file(tmp_path / "single.st")) == set(TENSORS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_tensor_without_elements_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    """Its shape and dtype are all there is."""
    save_file({"a": torch.empty(0, 2, dtype=dtype), "b": torch.ones(3)}, tmp_path / "a.st")
    with open_checkpoint(tmp_path / "a.st") as checkpoint:
        found = checkpoint.read("a")
        assert (tuple(found.shape), found.dtype) == ((0, 2), dtype)
        with create_checkpoint(tmp_path / "b.st", checkpoint.specs.values(), {}) as writer:
            for name in checkpoint.specs:
                writer.write(name, checkpoint.read(name))
    assert load_file(tmp_path / "b.st")["a"].shape == (0, 2)


def test_smaller_tensors_lay_the_file_out_again(tmp_path: Path) -> None:
    """Declared as upper bounds: the bytes are those of a writer who had known; more than declared is refused."""
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2, 5), "c": torch.randn(7)}
    bounds = [spec_of("a", torch.empty(9, 4)), spec_of("b", torch.empty(5, 5)), spec_of("c", torch.empty(7))]
    with create_checkpoint(tmp_path / "bounds.st", bounds, {"k": "v"}, reserve=False) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor, smaller=True)
    exact = [spec_of(name, tensor) for name, tensor in tensors.items()]
    with create_checkpoint(tmp_path / "exact.st", exact, {"k": "v"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert (tmp_path / "bounds.st").read_bytes() == (tmp_path / "exact.st").read_bytes()
    with (
        pytest.raises(IncompleteOutput, match="differs from its declaration"),
        create_checkpoint(tmp_path / "more.st", exact, {}) as writer,
    ):
        writer.write("a", torch.randn(4, 4), smaller=True)


def test_a_file_of_an_input_folder_is_never_replaced(tmp_path: Path) -> None:
    """Not by force either; a new file in that folder is no harm."""
    folder = tmp_path / "base"
    write(folder)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(OutputExists, match="overwrite an input"):
        write(Destination(folder / "model.safetensors", inputs=(folder,), force=True))
    assert (folder / "model.safetensors").read_bytes() == before
    write(Destination(folder / "other.st", inputs=(folder,), force=True))
    assert (folder / "other.st").exists()


def test_a_lone_element_is_stored_whatever_its_stride(tmp_path: Path) -> None:
    """torch calls it contiguous, and yet does not see its bytes."""
    tensor = torch.arange(3.0)[1::2]
    assert tensor.stride() == (2,)
    with create_checkpoint(tmp_path / "a.st", [TensorSpec("a", DType.F32, (1,))], {}) as writer:
        writer.write("a", tensor)
    assert load_file(tmp_path / "a.st")["a"].item() == 1.0
