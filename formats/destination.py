"""Output destinations: laid out like the input, and written whole or not at all.

This is the only module that turns a destination into writers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from formats.checkpoint import CheckpointWriter, TensorWriter
from formats.containers import Container, container_named
from formats.errors import FormatError
from formats.forms import FORMS
from formats.layout import shards_by_size
from formats.open_files import OpenFiles
from formats.paths import (
    ADAPTER_CONFIG,
    INDEX_SUFFIX,
    TORCH_INDEX_SUFFIX,
    TORCH_WEIGHTS,
    WEIGHTS,
)
from formats.plain_file import PlainWriter
from formats.safetensors_file import SAFETENSORS
from formats.sharded import ShardedCheckpoint, ShardedWriter
from formats.spec import TensorSpec
from formats.staging import Staging, disk_errors, write_at
from formats.torch_writer import TorchWriter

# Files in a model's folder that hold weights, in any container: these are never copied to the output folder.
_WEIGHT_PATTERNS = (
    *(f"*{suffix}" for container in Container for suffix in container.suffixes),
    f"*{INDEX_SUFFIX}", f"*{TORCH_INDEX_SUFFIX}", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", ADAPTER_CONFIG,
)  # fmt: skip


@dataclass(frozen=True)
class Destination:
    """Where an output goes, how it is sharded, and which other files are copied with it.

    Attributes:
        path: a folder, or a file whose name tells the container; an adapter for llama.cpp is no folder.
        weights: the name of the weights' file or index in a folder.
        shards: tensor → shard's filename, for a sharded folder.
        companions: files copied along into a folder as they are (tokenizer, model card, …).
        attachments: files that are written into a folder with this content (config.json), by name.
        inputs: paths that the output must not replace.
        force: whether an existing file or folder at `path` may be replaced.
        container: container of the weights. Torch's container holds no metadata and so no receipt.
    """

    path: Path
    weights: str = WEIGHTS
    shards: Mapping[str, str] | None = None
    companions: tuple[Path, ...] = ()
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    inputs: tuple[Path, ...] = ()
    force: bool = False
    container: Container = Container.SAFETENSORS

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder."""
        return container_named(self.path) is None

    def check(self, nbytes: int = 0) -> None:
        """Refuses what `create_checkpoint` would refuse, before long work.

        Args:
            nbytes: that the output takes at least.

        Raises OutputExists, FormatError, or WriteFailed where there is no room for it.
        """
        self.staging().check_room(nbytes)

    def staging(self) -> Staging:
        """Starts the output. Raises OutputExists, or FormatError if the path's suffix names another container."""
        named = container_named(self.path)
        if named is not self.container and (named is not None or self.container is Container.GGUF):
            raise _another(self.path, self.container)
        return Staging(self.path, folder=self.is_folder, inputs=self.inputs, force=self.force)


def _another(path: Path, container: Container) -> FormatError:
    """The error for a path whose suffix names another container than the one that is written."""
    plain = ", ".join(Container.SAFETENSORS.suffixes).replace(", ", " or ")
    named = container_named(path)
    if container is Container.GGUF:
        return FormatError(
            "an adapter for llama.cpp is one GGUF file",
            where=path,
            expected="a .gguf file",
            then="name a .gguf file with -o",
        )
    if Container.ORT in (container, named):
        return FormatError(
            "only convert --to ort writes .onnx_adapter files, and it writes no other",
            where=path,
            expected="a .onnx_adapter file, or a folder" if container is Container.ORT else "another name",
            then="choose another output with -o",
        )
    if named is Container.GGUF:
        return FormatError(
            "only convert --to gguf writes GGUF",
            where=path,
            expected=f"a folder, or a {plain} file",
            then="choose another output with -o",
        )
    return FormatError(
        "torch's container has no place for this output's metadata, so only convert without --to writes it",
        where=path,
        expected=f"a folder, or a {plain} file",
        then="write that, then convert it with surgery convert, without --to",
    )


def destination_like(
    source: str | Path,
    out: str | Path,
    specs: Iterable[TensorSpec],
    *,
    inputs: Iterable[str | Path],
    force: bool,
    files: OpenFiles,
    max_shard: int | None = None,
    container: Container = Container.SAFETENSORS,
) -> Destination:
    """A destination laid out like its source: a file for a file, a folder with the same shards and companions for a
    folder.

    Args:
        source: a file, an index of shards, or a folder.
        out: where to write.
        specs: the output's tensors; those that the source's shards do not know go into its last shard.
        inputs: paths that the output must not replace.
        force: whether what stands at `out` may be replaced.
        files: that are open already.
        max_shard: bytes of each shard of an output folder, instead of the source's shards.
        container: what the weights are stored in.

    Raises FormatError for shards of a single file.
    """
    source, out = Path(source), Path(out)
    specs = tuple(specs)
    whole = WEIGHTS if container is Container.SAFETENSORS else TORCH_WEIGHTS
    plain = Destination(out, whole, inputs=tuple(map(Path, inputs)), force=force, container=container)
    if not plain.is_folder:
        if max_shard is not None:
            raise FormatError(
                "a single file has no shards",
                where=out,
                expected="a folder",
                then="name a folder with -o, or omit --max-shard-size",
            )
        return plain
    indexes = (INDEX_SUFFIX, TORCH_INDEX_SUFFIX)
    folder = source if source.is_dir() else source.parent if source.name.endswith(indexes) else None
    if folder is not None:
        plain = replace(plain, companions=_companions(folder))
    if max_shard is not None:
        own = shards_by_size(specs, max_shard, whole)
        return replace(plain, weights=f"{whole}.index.json", shards=own) if own else plain
    opened = None if folder is None else files.checkpoint(source)
    if not isinstance(opened, ShardedCheckpoint):
        return plain
    last = max(opened.shards.values())
    shards = {spec.name: named_in(opened.shards.get(spec.name, last), container) for spec in specs}
    return replace(plain, weights=named_in(opened.path.name, container), shards=shards)


def named_in(name: str, container: Container) -> str:
    """The name of a weights file, or of an index of shards, in safetensors or in torch's container.

    A name that fits the container is kept. `model.safetensors` becomes `pytorch_model.bin` and back: these are the
    names that transformers uses.
    """
    ours, theirs = Container.SAFETENSORS, Container.TORCH
    index, other = (INDEX_SUFFIX, TORCH_INDEX_SUFFIX) if container is ours else (TORCH_INDEX_SUFFIX, INDEX_SUFFIX)
    stem, tail = name.removesuffix(other), index
    if stem == name:
        if container_named(name) is not (theirs if container is ours else ours):
            return name
        stem, tail = Path(name).stem, container.suffixes[0]
    if container is theirs:
        return (f"pytorch_{stem}" if stem.startswith("model") else stem) + tail
    return (stem.replace("pytorch_", "", 1) if stem.startswith("pytorch_model") else stem) + tail


def _companions(folder: Path) -> tuple[Path, ...]:
    """The files of a model's folder that hold no weights."""
    files = [file for file in folder.iterdir() if file.is_file()]
    return tuple(sorted(file for file in files if not any(file.match(pattern) for pattern in _WEIGHT_PATTERNS)))


class _Output:
    """A CheckpointWriter for one staged destination: passes tensors to the container and adds the other files."""

    def __init__(
        self, destination: Destination, specs: Iterable[TensorSpec], metadata: Mapping[str, str], reserve: bool
    ) -> None:
        self._staging = destination.staging()
        self._settled = False
        self._besides: list[PlainWriter] = []
        self._container: PlainWriter | ShardedWriter | TorchWriter
        filename, container = destination.weights if destination.is_folder else "", destination.container
        try:
            if destination.shards is not None:
                self._container = ShardedWriter(
                    self._staging, filename, destination.shards, specs, metadata, reserve=reserve
                )
            elif container is Container.TORCH:
                self._container = TorchWriter(self._staging, filename, specs)
            else:
                self._container = PlainWriter(
                    self._staging, filename, specs, metadata, FORMS[container], reserve=reserve
                )
            if destination.is_folder:
                for companion in destination.companions:
                    self._staging.copy(companion.name, companion)
                for name, content in destination.attachments.items():
                    self.attach(name, content)
        except BaseException:
            self._staging.discard()
            raise
        self.write = self._container.write
        self.write_bytes = self._container.write_bytes
        self.parts = self._container.parts
        self.omit = self._container.omit
        self.seal = self._container.seal
        self.shared = self._container.shared
        self.written = self._container.written

    def attach(self, filename: str, content: bytes) -> None:
        self._refuse_file(filename)
        with disk_errors(self._staging.target):
            write_at(self._staging.create(filename, len(content)), content, 0)

    def beside(self, filename: str, specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> TensorWriter:
        self._refuse_file(filename)
        self._besides.append(PlainWriter(self._staging, filename, specs, metadata, SAFETENSORS))
        return self._besides[-1]

    def _refuse_file(self, filename: str) -> None:
        if not self._staging.folder:
            raise FormatError(
                "an output that is a single file cannot hold another file", where=filename, then="name a folder with -o"
            )

    def settle(self) -> None:
        self._complete()
        self._staging.sync()

    def finish(self) -> None:
        self._complete()
        self._staging.commit()

    def _complete(self) -> None:
        if not self._settled:
            for each in (self._container, *self._besides):
                each.finish()
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
    """Opens an output for writing. It appears whole if the context ends normally, and not at all otherwise.

    `reserve` allocates the disk space of all `specs` at once. Without it, the specs are upper bounds.

    Raises:
        OutputExists: the output exists already, or is an input.
        WriteFailed: the disk is full (its space is reserved before work begins), or cannot be written to.
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
