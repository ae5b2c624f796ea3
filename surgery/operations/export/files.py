"""The files of an export: graphs and the weights beside them, which appear together or not at all.

A graph that goes into the folder of the model's own weights is over those as they are; no byte of them is read. Else
one canonical payload is written beside the graphs.
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
        places: of each weight, by name.
        layout: of the payload that is to be written; None where the model's own files serve.
    """

    places: Mapping[str, External]
    layout: Layout | None


def placed(weights: Sequence[TensorSpec], source: Payloads, model: Path, target: Path) -> Placed:
    """Where graphs at `target` find their weights.

    Args:
        weights: all of them.
        source: what they are read from.
        model: the folder or file that they come from.
        target: an `.onnx` file.

    Raises:
        OutputExists: the graphs go into the model's own folder, and its weights cannot serve them.
    """
    if target.parent.resolve() == (model if model.is_dir() else model.parent).resolve():
        try:
            return Placed(places_in_files(weights, source), None)
        except Unusable as reason:
            if model.is_dir():
                raise OutputExists(
                    "the weights in the model's own folder cannot serve the graph as they are, and are not ours to "
                    "replace",
                    where=model,
                    expected="plain files with every weight as the graph takes it",
                    found=reason,
                    then=_OWN_FOLDER,
                ) from reason
    where = payload_layout(weights)
    return Placed(places_in_payload(weights, where), where)


@dataclass(frozen=True)
class Export:
    """What is to be written.

    Attributes:
        model: the folder or file that the weights come from.
        target: the `.onnx` file; of several graphs the name that each puts its prefix before.
        graphs: the bytes of each, by prefix.
        weights: what they are over.
        placed: where they find those.
        force: whether what stands there may be replaced.
        besides: further inputs, which no output may replace.
    """

    model: Path
    target: Path
    graphs: Mapping[str, bytes]
    weights: tuple[TensorSpec, ...]
    placed: Placed
    force: bool
    besides: tuple[Path, ...] = ()

    def path(self, prefix: str) -> Path:
        """Where a graph goes."""
        return self.target.with_name(prefix + self.target.name)

    @property
    def outputs(self) -> tuple[Path, ...]:
        """What is written: the graphs, and the weights unless they are the model's own."""
        return (*map(self.path, self.graphs), *((self.payload,) if self.placed.layout else ()))

    @property
    def payload(self) -> Path:
        """Where the weights are."""
        return self.target.parent / PAYLOAD if self.placed.layout else self.model

    @property
    def inputs(self) -> list[Path]:
        """What no output may replace."""
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
        """A file of the output, or its folder, begun. Raises OutputExists."""
        inputs = [self.model, *self.besides] if folder else self.inputs
        return Staging(path, folder=folder, inputs=inputs, force=self.force)


@dataclass(frozen=True)
class Staged:
    """The weights, on disk and nameless, or kept where they stand.

    Attributes:
        payload: descriptors, by the names that the graphs look for.
        blake3: of the payload, in hexadecimal; None where the model's own files serve.
    """

    payload: Mapping[str, int]
    blake3: str | None


def check_target(model: Path, target: Path, force: bool, besides: Iterable[Path] = ()) -> None:
    """Refuses an output that is no `.onnx` file, is an input, or is there already, before long work."""
    if target.suffix != ".onnx":
        raise Unsupported(
            "the output is one .onnx file",
            where=target,
            expected="a name that ends in .onnx",
            then=f"say -o {target / 'model.onnx'}",
        )
    Staging(target, folder=False, inputs=[*_guarded(model), *besides], force=force)


def _guarded(model: Path) -> list[Path]:
    """The model's files; graphs in its folder are no part of it."""
    if not model.is_dir():
        return [model]
    return [path for path in model.iterdir() if path.is_file() and path.suffix != ".onnx"]


@contextlib.contextmanager
def staged(export: Export, source: Payloads) -> Iterator[Staged]:
    """All files, written and nameless. On a normal exit they appear.

    A folder that does not exist yet appears whole. In one that does, the payload appears before the graphs, and graphs
    that are to be replaced go first: at no time does a graph stand beside weights it was not made for.
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
        # left in reverse: weights first
        weights = stack.enter_context(export.staging(beside))
        payload = weights.create("", where.size)
        yield Staged({PAYLOAD: payload}, write_payload(payload, source, export.weights, where, beside))
        with disk_errors(target):
            os.fsync(payload)  # what can fail has been tried before the old graphs go
            for prefix in export.graphs if export.force else ():
                export.path(prefix).unlink(missing_ok=True)


def _stage_graphs(export: Export, stack: contextlib.ExitStack) -> None:
    """Each graph as a file of its own, in a folder that is there."""
    for prefix, graph in export.graphs.items():
        path = export.path(prefix)
        staging = stack.enter_context(export.staging(path))
        _write(staging.create("", len(graph)), graph, path)


def _keeps(export: Export, source: Payloads, where: Layout) -> bool:
    """Whether the payload stands there already, to the byte. Raises OutputExists where it must not be replaced."""
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
        "another model's weights stand where this one's would go; their name is part of the graph, so it is fixed",
        where=path,
        found="a link" if _linked(path) else "a file with other bytes",
        then=f"{_OWN_FOLDER}; or replace it with --force",
    )


def _write(descriptor: int, data: bytes, target: Path) -> None:
    with disk_errors(target):
        write_at(descriptor, data, 0)


def _file_blake3(descriptor: int) -> str:
    with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped:
        return blake3(mapped).hexdigest()
