"""The files of an export: graphs and the weights next to them. They appear together or not at all.

A graph that is written into the model's own folder uses the weight files there unchanged, without reading a byte of
them. Otherwise one canonical payload is written next to the graphs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from formats import TensorSpec
from formats.errors import OutputExists
from formats.layout import Layout
from formats.staging import Staging, disk_errors, write_at
from surgery.errors import Unsupported
from surgery.onnx.files.graph_file import External
from surgery.onnx.files.payload import (
    PAYLOAD,
    Payloads,
    Unusable,
    has_layout,
    holds_payload,
    payload_layout,
    places_in_files,
    places_in_payload,
    write_payload,
)

_OWN_FOLDER = "give each export a folder of its own: base/model.onnx, merged/model.onnx"


@dataclass(frozen=True)
class Placed:
    """Where the graphs find their weights.

    Attributes:
        places: each weight's place in a file, by name.
        layout: layout of the payload to write; None if the model's own files are used.
    """

    places: Mapping[str, External]
    layout: Layout | None


def placed(weights: Sequence[TensorSpec], source: Payloads, model: Path, target: Path) -> Placed:
    """Where graphs at `target` find their weights.

    Args:
        weights: all weights of the graphs.
        source: where their payloads are read.
        model: the folder or file that they come from.
        target: an `.onnx` file.

    Raises:
        OutputExists: the graphs go into the model's own folder, and its weight files cannot be used unchanged.
    """
    if target.parent.resolve() == (model if model.is_dir() else model.parent).resolve():
        try:
            return Placed(places_in_files(weights, source), None)
        except Unusable as reason:
            if model.is_dir():
                raise OutputExists(
                    "the graph cannot use the weight files in the model's own folder unchanged, and the export never "
                    "overwrites them",
                    where=model,
                    expected="plain files that store every weight as the graph needs it",
                    found=reason,
                    then=_OWN_FOLDER,
                ) from reason
    where = payload_layout(weights)
    return Placed(places_in_payload(weights, where), where)


@dataclass(frozen=True)
class Export:
    """The graphs and weights to write.

    Attributes:
        model: the folder or file that the weights come from.
        target: the `.onnx` file; with several graphs, the name to which each prepends its prefix.
        graphs: the bytes of each graph, by prefix.
        weights: the weights of the graphs.
        placed: where the graphs find the weights.
        force: whether existing files may be overwritten.
        besides: further inputs, which no output may overwrite.
    """

    model: Path
    target: Path
    graphs: Mapping[str, bytes]
    weights: tuple[TensorSpec, ...]
    placed: Placed
    force: bool
    besides: tuple[Path, ...] = ()

    def path(self, prefix: str) -> Path:
        """The path of a graph."""
        return self.target.with_name(prefix + self.target.name)

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The files to write: the graphs, and the weights unless the model's own files are used."""
        return (*map(self.path, self.graphs), *((self.payload,) if self.placed.layout else ()))

    @property
    def payload(self) -> Path:
        """The path of the weights."""
        return self.target.parent / PAYLOAD if self.placed.layout else self.model

    @property
    def inputs(self) -> list[Path]:
        """The paths that no output may overwrite."""
        return [*_guarded(self.model), *self.besides]

    def check(self) -> None:
        """Refuses what `staged` would refuse, before the weights are read. Raises OutputExists or WriteFailed."""
        folder, where = self.target.parent, self.placed.layout
        size = sum(map(len, self.graphs.values())) + (0 if where is None else where.size)
        if where is not None and not folder.exists():
            self.staging(folder, folder=True).check_room(size)
            return
        if where is not None and os.path.lexists(self.payload):
            kept = not _linked(self.payload) and self.payload.is_file() and has_layout(self.payload, where)
            if not kept and not self.force:
                raise _another_payload(self.payload)
            if not kept:
                self.staging(self.payload)
            size -= where.size
        for prefix in self.graphs:
            self.staging(self.path(prefix)).check_room(size)

    def staging(self, path: Path, folder: bool = False) -> Staging:
        """The staging of an output file or of its folder. Raises OutputExists."""
        inputs = [self.model, *self.besides] if folder else self.inputs
        return Staging(path, folder=folder, inputs=inputs, force=self.force)


@dataclass(frozen=True)
class Staged:
    """The weights: on disk but not yet named, or kept where they are.

    Attributes:
        payload: file descriptors, by the file names that the graphs refer to.
        blake3: BLAKE3 of the payload, in hexadecimal; None if the model's own files are used.
    """

    payload: Mapping[str, int]
    blake3: str | None


def check_target(model: Path, target: Path, force: bool, besides: Iterable[Path] = ()) -> None:
    """Refuses an output that is no `.onnx` file, is an input, or exists already; before any long work."""
    if target.suffix != ".onnx":
        raise Unsupported(
            "the output must be a .onnx file",
            where=target,
            expected="a name that ends in .onnx",
            then=f"pass -o {target / 'model.onnx'}",
        )
    Staging(target, folder=False, inputs=[*_guarded(model), *besides], force=force)


def _guarded(model: Path) -> list[Path]:
    """The model's files, without the graphs in its folder."""
    if not model.is_dir():
        return [model]
    return [path for path in model.iterdir() if path.is_file() and path.suffix != ".onnx"]


@contextlib.contextmanager
def staged(export: Export, source: Payloads) -> Iterator[Staged]:
    """Writes all files without names. On a normal exit they get their names.

    A new folder appears as a whole. In an existing folder, graphs to be overwritten are removed first, then the payload
    appears, then the graphs: no graph is ever next to weights that it was not made for.
    """
    target, beside, where = export.target, export.payload, export.placed.layout
    with contextlib.ExitStack() as stack:
        if where is None:
            _stage_graphs(export, stack)
            names = sorted({place.location for place in export.placed.places.values()})
            files = {name: stack.enter_context((target.parent / name).open("rb")).fileno() for name in names}
            yield Staged(files, None)
            return
        if not target.parent.exists():
            staging = stack.enter_context(export.staging(target.parent, folder=True))
            for prefix, graph in export.graphs.items():
                _write(staging.create(export.path(prefix).name, len(graph)), graph, target)
            payload = staging.create(PAYLOAD, where.size)
            yield Staged({PAYLOAD: payload}, write_payload(payload, source, export.weights, where, beside))
            return
        kept = _keeps(export, source, where)
        _stage_graphs(export, stack)
        if kept:
            descriptor = stack.enter_context(beside.open("rb")).fileno()
            yield Staged({PAYLOAD: descriptor}, _file_blake3(descriptor))
            return
        # the stack unwinds in reverse: weights first
        weights = stack.enter_context(export.staging(beside))
        payload = weights.create("", where.size)
        yield Staged({PAYLOAD: payload}, write_payload(payload, source, export.weights, where, beside))
        with disk_errors(target):
            os.fsync(payload)  # everything that can fail comes before the old graphs are removed
            for prefix in export.graphs if export.force else ():
                export.path(prefix).unlink(missing_ok=True)


def _stage_graphs(export: Export, stack: contextlib.ExitStack) -> None:
    """Stages each graph as a separate file in an existing folder."""
    for prefix, graph in export.graphs.items():
        path = export.path(prefix)
        staging = stack.enter_context(export.staging(path))
        _write(staging.create("", len(graph)), graph, path)


def _keeps(export: Export, source: Payloads, where: Layout) -> bool:
    """Whether the payload exists already, byte for byte. Raises OutputExists if it must not be overwritten."""
    beside = export.payload
    if not os.path.lexists(beside):
        return False
    if not _linked(beside) and beside.is_file() and holds_payload(beside, source, export.weights, where):
        return True
    if not export.force:
        raise _another_payload(beside)
    return False


def _linked(path: Path) -> bool:
    return path.is_symlink() or path.stat().st_nlink > 1


def _another_payload(path: Path) -> OutputExists:
    return OutputExists(
        "another model's weights are where this model's weights must go; the graph refers to them by a fixed file name",
        where=path,
        found="a link" if _linked(path) else "a file with other bytes",
        then=f"{_OWN_FOLDER}; or overwrite it with --force",
    )


def _write(descriptor: int, data: bytes, target: Path) -> None:
    with disk_errors(target):
        write_at(descriptor, data, 0)


def _file_blake3(descriptor: int) -> str:
    with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped:
        return blake3(mapped).hexdigest()
