"""What a path means: which container stands there, and how an output is shaped after its input.

The one place that turns paths into checkpoints and writers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from formats.checkpoint import Checkpoint, CheckpointWriter
from formats.errors import FormatError, NotACheckpoint, PathNotFound
from formats.layout import shards_by_size
from formats.safetensors_file import SafetensorsFile, SafetensorsWriter
from formats.sharded import ShardedCheckpoint, ShardedWriter
from formats.spec import TensorSpec
from formats.staging import Staging, disk_errors, write_at

SUFFIXES = (".safetensors", ".st")
INDEX_SUFFIX = ".safetensors.index.json"
WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# Files of a model's folder that hold weights, in whatever container: never copied along as "the rest".
_WEIGHT_PATTERNS = (
    "*.safetensors", "*.st", f"*{INDEX_SUFFIX}", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.h5", "*.msgpack",
    "*.onnx", "*.onnx_data", "*.ot", "*.gguf", ADAPTER_CONFIG,
)  # fmt: skip


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a safetensors file, an index of shards, or a folder that holds either.

    Reads headers only. In a folder the index is preferred, then `model.safetensors`, then the only safetensors
    file there is.

    Raises:
        PathNotFound: nothing there.
        NotACheckpoint: nothing there that we read.
        CorruptFile: header and bytes contradict each other.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_of(path)
    if not path.exists():
        raise PathNotFound("no such file or folder", where=path)
    if path.name.endswith(INDEX_SUFFIX):
        return ShardedCheckpoint(path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise NotACheckpoint(
            "torch's own container is not read yet",
            where=path,
            expected="a .safetensors or .st file, or a folder with one",
            then="save it with safetensors.torch.save_file and pass that file",
        )
    if path.suffix == ".gguf":
        raise NotACheckpoint(
            "a GGUF file holds weights quantised for llama.cpp",
            where=path,
            expected="a .safetensors or .st file, or a folder with one",
            then="use the model that it was converted from, and convert the result again",
        )
    return SafetensorsFile(path)


def _weights_of(folder: Path) -> Path:
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indexes) == 1:
        return indexes[0]
    preferred = [folder / f"{WEIGHTS}.index.json", folder / WEIGHTS, folder / ADAPTER_WEIGHTS]
    for candidate in preferred:
        if candidate.exists():
            return candidate
    files = sorted(file for suffix in SUFFIXES for file in folder.glob(f"*{suffix}"))
    if len(files) == 1:
        return files[0]
    raise NotACheckpoint(
        "which weights of this folder?" if files else "no safetensors weights in this folder",
        where=folder,
        expected=f"{WEIGHTS}, an index of shards, or a single safetensors file",
        found=", ".join(file.name for file in (files or sorted(folder.iterdir()))[:6]) or "an empty folder",
        then="name the file itself" if files else None,
    )


def names_file(path: str | Path) -> bool:
    """Whether an output path means one safetensors file rather than a folder."""
    return Path(path).suffix in SUFFIXES


@dataclass(frozen=True)
class Destination:
    """An output: where, in which shape, and what comes along.

    Attributes:
        path: a `.safetensors` or `.st` file, or a folder.
        weights: the name of the weights' file or index in a folder.
        shards: tensor → shard's filename, for a sharded folder.
        companions: files copied along into a folder as they are (config, tokenizer, …).
        inputs: paths that the output must not replace.
        force: whether what stands at `path` may be replaced.
    """

    path: Path
    weights: str = WEIGHTS
    shards: Mapping[str, str] | None = None
    companions: tuple[Path, ...] = ()
    inputs: tuple[Path, ...] = ()
    force: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder."""
        return not names_file(self.path)

    def check(self) -> None:
        """Refuses what `create_checkpoint` would refuse, before long work. Raises OutputExists."""
        Staging(self.path, folder=self.is_folder, inputs=self.inputs, force=self.force)


def destination_like(
    source: str | Path,
    out: str | Path,
    specs: Iterable[TensorSpec],
    *,
    inputs: Iterable[str | Path],
    force: bool,
    max_shard: int | None = None,
) -> Destination:
    """An output shaped like its source: a file for a file, a folder with the same shards and companions for a folder.

    Tensors of `specs` that the source's shards do not know go into its last shard. With `max_shard` the folder gets
    shards of at most so many bytes instead of the source's. Raises FormatError for shards of a single file.
    """
    source, out = Path(source), Path(out)
    specs = tuple(specs)
    guarded = tuple(Path(path) for path in inputs)
    if names_file(out) and max_shard is not None:
        raise FormatError(
            "a single file has no shards",
            where=out,
            expected="a folder",
            then="name a folder with -o, or leave it whole",
        )
    if names_file(out):
        return Destination(out, inputs=guarded, force=force)
    folder = source if source.is_dir() else source.parent if source.name.endswith(INDEX_SUFFIX) else None
    companions = () if folder is None else _companions(folder)
    if max_shard is not None:
        own = shards_by_size(specs, max_shard)
        return Destination(out, f"{WEIGHTS}.index.json" if own else WEIGHTS, own or None, companions, guarded, force)
    if folder is None:
        return Destination(out, inputs=guarded, force=force)
    with open_checkpoint(source) as checkpoint:
        if not isinstance(checkpoint, ShardedCheckpoint):
            return Destination(out, companions=companions, inputs=guarded, force=force)
        last = max(checkpoint.shards.values())
        shards = {spec.name: checkpoint.shards.get(spec.name, last) for spec in specs}
        return Destination(out, checkpoint.path.name, shards, companions, guarded, force)


def _companions(folder: Path) -> tuple[Path, ...]:
    """A model folder's files that hold no weights."""
    files = [file for file in folder.iterdir() if file.is_file()]
    return tuple(sorted(file for file in files if not any(file.match(pattern) for pattern in _WEIGHT_PATTERNS)))


class _Output:
    """A CheckpointWriter over one staged destination: passes tensors to the container, adds the files beside it."""

    def __init__(
        self, destination: Destination, specs: Iterable[TensorSpec], metadata: Mapping[str, str], reserve: bool
    ) -> None:
        self._staging = Staging(
            destination.path, folder=destination.is_folder, inputs=destination.inputs, force=destination.force
        )
        self._settled = False
        self._container: SafetensorsWriter | ShardedWriter
        try:
            if destination.shards is not None:
                self._container = ShardedWriter(
                    self._staging, destination.weights, destination.shards, specs, metadata, reserve=reserve
                )
            else:
                filename = destination.weights if destination.is_folder else ""
                self._container = SafetensorsWriter(self._staging, filename, specs, metadata, reserve=reserve)
            if destination.is_folder:
                for companion in destination.companions:
                    self._staging.copy(companion.name, companion)
        except BaseException:
            self._staging.discard()
            raise
        self.write = self._container.write
        self.write_bytes = self._container.write_bytes
        self.parts = self._container.parts
        self.omit = self._container.omit
        self.seal = self._container.seal

    def attach(self, filename: str, content: bytes) -> None:
        if not self._staging.folder:
            raise FormatError("a single file has no room for another file beside it", where=filename)
        with disk_errors(self._staging.target):
            write_at(self._staging.create(filename, len(content)), content, 0)

    def settle(self) -> None:
        self._complete()
        self._staging.sync()

    def finish(self) -> None:
        self._complete()
        self._staging.commit()

    def _complete(self) -> None:
        if not self._settled:
            self._container.finish()
            self._settled = True

    def discard(self) -> None:
        self._staging.discard()


@contextlib.contextmanager
def create_checkpoint(
    destination: Destination | str | Path,
    specs: Iterable[TensorSpec],
    metadata: Mapping[str, str],
    *,
    reserve: bool = True,
) -> Iterator[CheckpointWriter]:
    """Opens an output for writing. It appears whole when the context is left normally, and not at all otherwise.

    `reserve` takes the disk space of all the specs at once; without it they are upper bounds.

    Raises:
        OutputExists: the output is there already, or is an input.
        WriteFailed: the disk is full (its space is reserved before work begins) or refuses.
        IncompleteOutput: a declared tensor was neither written nor omitted.
    """
    if not isinstance(destination, Destination):
        destination = Destination(Path(destination))
    output = _Output(destination, specs, metadata, reserve)
    try:
        yield output
        output.finish()
    finally:
        output.discard()
