"""The files of an export: graphs and the one payload beside them, which appear together or not at all."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from formats import TensorSpec
from formats.errors import OutputExists
from formats.layout import Layout
from formats.staging import Staging, disk_errors, write_at
from surgery.errors import Unsupported
from surgery.onnx.payload import PAYLOAD, Payloads, holds_payload, write_payload

_OWN_FOLDER = "give each export a folder of its own: base/model.onnx, merged/model.onnx"


@dataclass(frozen=True)
class Export:
    """What is to be written.

    Attributes:
        model: the folder or file that the weights come from.
        target: the `.onnx` file; of several graphs the name that each puts its prefix before.
        graphs: the bytes of each, by prefix.
        weights: what the payload holds.
        where: its layout.
        force: whether what stands there may be replaced.
        besides: further inputs, which no output may replace.
    """

    model: Path
    target: Path
    graphs: Mapping[str, bytes]
    weights: tuple[TensorSpec, ...]
    where: Layout
    force: bool
    besides: tuple[Path, ...] = ()

    def path(self, prefix: str) -> Path:
        """Where a graph goes."""
        return self.target.with_name(prefix + self.target.name)

    @property
    def payload(self) -> Path:
        """Where the weights go."""
        return self.target.parent / PAYLOAD


@dataclass(frozen=True)
class Staged:
    """The payload, on disk and nameless, or kept where it stands: its descriptor, and the BLAKE3 in hexadecimal."""

    payload: int
    blake3: str


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
    return [model, *(path for path in model.iterdir() if path.is_file())] if model.is_dir() else [model]


@contextlib.contextmanager
def staged(export: Export, source: Payloads) -> Iterator[Staged]:
    """All files, written and nameless. On a normal exit they appear.

    A folder that does not exist yet appears whole. In one that does, the payload appears before the graphs, and graphs
    that are to be replaced go first: at no time does a graph stand beside weights it was not made for.
    """
    target, beside = export.target, export.payload
    with contextlib.ExitStack() as stack:
        if not target.parent.exists():
            staging = stack.enter_context(
                Staging(target.parent, folder=True, inputs=[export.model, *export.besides], force=export.force)
            )
            for prefix, graph in export.graphs.items():
                _write(staging.create(export.path(prefix).name, len(graph)), graph, target)
            payload = staging.create(PAYLOAD, export.where.size)
            yield Staged(payload, write_payload(payload, source, export.weights, export.where, beside))
            return
        guarded = [*_guarded(export.model), *export.besides]
        kept = _keeps(export, source)
        for prefix, graph in export.graphs.items():
            path = export.path(prefix)
            staging = stack.enter_context(Staging(path, folder=False, inputs=guarded, force=export.force))
            _write(staging.create("", len(graph)), graph, path)
        if kept:
            descriptor = stack.enter_context(beside.open("rb")).fileno()
            yield Staged(descriptor, _file_blake3(descriptor))
            return
        # left in reverse: weights first
        weights = stack.enter_context(Staging(beside, folder=False, inputs=guarded, force=export.force))
        payload = weights.create("", export.where.size)
        yield Staged(payload, write_payload(payload, source, export.weights, export.where, beside))
        with disk_errors(target):
            os.fsync(payload)  # what can fail has been tried before the old graphs go
            for prefix in export.graphs if export.force else ():
                export.path(prefix).unlink(missing_ok=True)


def _keeps(export: Export, source: Payloads) -> bool:
    """Whether the payload stands there already, to the byte. Raises OutputExists where it must not be replaced."""
    beside = export.payload
    folder = export.model if export.model.is_dir() else export.model.parent
    own = beside.parent.resolve() == folder.resolve()
    if not os.path.lexists(beside):
        if own and export.model.is_dir():
            raise OutputExists(
                "the export would put a second set of weights into the model's own folder",
                where=beside.parent,
                found="the weights under other names or in shards",
                then=_OWN_FOLDER,
            )
        return False
    linked = beside.is_symlink() or beside.stat().st_nlink > 1
    if not linked and beside.is_file() and holds_payload(beside, source, export.weights, export.where):
        return True
    if own:
        raise OutputExists(
            "the weights in the model's own folder cannot serve the graph as they are, and are not ours to replace",
            where=beside,
            expected="a plain file, exactly the tensors the graph needs, in the canonical order and without metadata",
            found="a link" if linked else "another order, other tensors or metadata",
            then=_OWN_FOLDER,
        )
    if not export.force:
        raise OutputExists(
            "another model's weights stand where this one's would go; their name is part of the graph, so it is fixed",
            where=beside,
            found="a link" if linked else "a file with other bytes",
            then=f"{_OWN_FOLDER}; or replace it with --force",
        )
    return False


def _write(descriptor: int, data: bytes, target: Path) -> None:
    with disk_errors(target):
        write_at(descriptor, data, 0)


def _file_blake3(descriptor: int) -> str:
    with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped:
        return blake3(mapped).hexdigest()
