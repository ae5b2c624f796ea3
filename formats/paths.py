"""Opens the checkpoint at a path: finds the container of a file, and the weights in a folder.

This is the only module that turns paths into checkpoints.
"""

from __future__ import annotations

from pathlib import Path

from formats.checkpoint import Checkpoint
from formats.containers import Container, container_named
from formats.errors import NotACheckpoint, PathNotFound
from formats.forms import FORMS
from formats.model_config import Read
from formats.plain_file import PlainFile
from formats.sharded import ShardedCheckpoint
from formats.torch_file import TorchFile

INDEX_SUFFIX, TORCH_INDEX_SUFFIX = ".safetensors.index.json", ".bin.index.json"
WEIGHTS, TORCH_WEIGHTS = "model.safetensors", "pytorch_model.bin"
ADAPTER_WEIGHTS, TORCH_ADAPTER_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
ADAPTER_CONFIG = "adapter_config.json"
# Files in torch's container that transformers' Trainer writes next to the weights.
_TRAINING = ("training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*")


def open_checkpoint(path: str | Path, read: Read = Path.read_bytes) -> Checkpoint:
    """Opens a safetensors or torch file, an index of shards, or a folder that holds any of them; or an adapter in
    llama.cpp's or ONNX Runtime's own file.

    Reads headers only. In a folder safetensors comes before torch's container; of either the index is preferred, then
    the file that is called as transformers and peft call it, then the only one there is.
    `read` reads the config beside a torch file, which tells which tensors are tied.

    Raises:
        PathNotFound: nothing exists at the path.
        NotACheckpoint: the path holds no container that we read.
        CorruptFile: the header and the bytes contradict each other.
        UnsafeFile: the pickle of a torch file names something that no state dict contains.
        UnsupportedDType: a GGUF adapter has quantised factors.
    """
    path = weights_of(path)
    if path.name.endswith((INDEX_SUFFIX, TORCH_INDEX_SUFFIX)):
        return ShardedCheckpoint(path, read)
    container = container_named(path) or Container.SAFETENSORS
    return TorchFile(path, read) if container is Container.TORCH else PlainFile(path, FORMS[container])


def weights_of(path: str | Path) -> Path:
    """The file that a path means: itself, or of a folder its file of weights. Raises as `open_checkpoint`."""
    path = Path(path)
    if path.is_dir():
        return _weights_in(path)
    if not path.exists():
        raise PathNotFound("no such file or folder", where=path, then="check the path")
    return path


def container_of(checkpoint: Checkpoint) -> str:
    """The container as shown to users: `safetensors`, `torch`, `torch, 2 shards`, `gguf`, `onnx_adapter`."""
    shards = set(checkpoint.shards.values()) if isinstance(checkpoint, ShardedCheckpoint) else set()
    first, *others = {container_named(file) for file in shards or {checkpoint.ref.path}}
    name = Container.SAFETENSORS if others or first is None else first
    return f"{name}, {len(shards)} shards" if shards else str(name)


def _weights_in(folder: Path) -> Path:
    found: list[Path] = []
    for suffixes, index, names in (
        (Container.SAFETENSORS.suffixes, INDEX_SUFFIX, (WEIGHTS, ADAPTER_WEIGHTS)),
        (Container.TORCH.suffixes, TORCH_INDEX_SUFFIX, (TORCH_WEIGHTS, TORCH_ADAPTER_WEIGHTS)),
    ):
        indexes = sorted(folder.glob(f"*{index}"))
        if len(indexes) == 1:
            return indexes[0]
        for candidate in (f"{names[0].rpartition('.')[0]}{index}", *names):
            if (folder / candidate).exists():
                return folder / candidate
        files = sorted(file for suffix in suffixes for file in folder.glob(f"*{suffix}"))
        found = [file for file in files if not any(file.match(pattern) for pattern in _TRAINING)]
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise NotACheckpoint(
        "this folder has several files of weights" if found else "no safetensors or torch weights in this folder",
        where=folder,
        expected=f"{WEIGHTS}, {TORCH_WEIGHTS}, an index of shards, or a single file of weights",
        found=", ".join(file.name for file in (found or sorted(folder.iterdir()))[:6]) or "an empty folder",
        then="give the path of one file" if found else "give the folder or file that holds the weights",
    )
