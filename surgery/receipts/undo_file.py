"""The undo file: what unmerge needs beside the merged file and its adapters to give back the base bit for bit.

A safetensors file. Its tensors are corrections (see `surgery.exact.correction`), by the name of the tensor that they
lead back to; a tensor that comes out right without one has none. Its metadata names the merge: the receipt, the content
digests of base and result, and for every tensor that merging changed what it was and the BLAKE3 of what it became.
Knows how it is read and written, and nothing of how a prediction is made.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from formats.checkpoint import Checkpoint, CheckpointWriter
from formats.containers import Container, container_named
from formats.destination import Destination, create_checkpoint
from formats.errors import CorruptFile, OutputExists
from formats.open_files import OpenFiles
from formats.spec import DType, TensorSpec
from surgery.errors import UndoMismatch
from surgery.exact.correction import correction_limit
from surgery.pipeline.plan import Plan
from surgery.receipts.receipt import Receipt

UNDO = "surgery.receipts.undo_file"
_VERSION = 3
_SCALES_LIMIT = 1 << 26  # elements of a tensor that is gone: scales


@dataclass(frozen=True)
class Change:
    """What merging did to one tensor.

    Attributes:
        dtype, shape: what it had.
        now: the shape it has now; None if it is gone.
        merged: BLAKE3 of its payload now; empty if it is gone.
        stored: the dtype it has now, where that is another.
    """

    dtype: str
    shape: list[int]
    now: list[int] | None
    merged: str
    stored: str | None = None

    def spec(self, name: str) -> TensorSpec:
        """The tensor as it was."""
        return TensorSpec(name, DType[self.dtype], tuple(self.shape))

    def result(self, name: str) -> TensorSpec | None:
        """The tensor as it is now."""
        if self.now is None:
            return None
        return TensorSpec(name, DType[self.stored or self.dtype], tuple(self.now))


@dataclass(frozen=True)
class UndoRecord:
    """What an undo file says of its merge.

    Attributes:
        receipt: the merge's own, without the originals.
        base_digest, result_digest: content addresses of the tensors before and after.
        changes: every tensor that merging changed, by name.
    """

    receipt: Receipt
    base_digest: str
    result_digest: str
    changes: Mapping[str, Change]

    def metadata(self) -> dict[str, str]:
        """The undo file's metadata."""
        document = {
            "version": _VERSION,
            "receipt": replace(self.receipt, originals={}, lost=()).text,
            "base_digest": self.base_digest,
            "result_digest": self.result_digest,
            "changes": {name: asdict(change) for name, change in self.changes.items()},
        }
        return {UNDO: json.dumps(document, sort_keys=True, separators=(",", ":"))}


@dataclass(frozen=True)
class UndoFile:
    """An undo file, open: its corrections and its record."""

    checkpoint: Checkpoint
    record: UndoRecord


def open_undo(path: str | Path, files: OpenFiles) -> UndoFile:
    """Opens an undo file.

    Raises:
        UndoMismatch: a safetensors file that is no undo file.
        CorruptFile: one whose record and corrections contradict each other.
    """
    checkpoint = files.checkpoint(path)
    if UNDO not in checkpoint.metadata:
        raise UndoMismatch(
            "not an undo file", where=path, expected=f"{UNDO} in its metadata", then="pass what merge --undo wrote"
        )
    try:
        document: dict[str, Any] = json.loads(checkpoint.metadata[UNDO])
        if document["version"] != _VERSION:
            raise ValueError(f"version {document['version']}")
        changes = {name: Change(**change) for name, change in document["changes"].items()}
        receipt = Receipt.parse(document["receipt"], path)
        record = UndoRecord(receipt, document["base_digest"], document["result_digest"], changes)
        sound = all(_is_sound(name, change) for name, change in changes.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(
            "the undo file's record is not one of ours",
            where=path,
            found=f"{type(error).__name__}: {error}",
            then="it may come from a newer version of surgery",
        ) from error
    if not sound or not set(checkpoint.specs) <= set(changes) <= set(receipt.base_tensors):
        raise CorruptFile("the undo file's record and its tensors contradict each other", where=path)
    return UndoFile(checkpoint, record)


def _is_sound(name: str, change: Change) -> bool:
    """Whether the tensor had a size that can be believed: merging lets tensors grow, never shrink."""
    sizes = [*change.shape, *(change.now or ())]
    known = all(type(n) is int and n >= 0 for n in sizes) and isinstance(change.merged, str)
    now = change.result(name) if known else None
    return known and change.spec(name).size <= (_SCALES_LIMIT if now is None else now.size)


def correction_spec(spec: TensorSpec) -> TensorSpec:
    """The most that a tensor's correction takes in the file."""
    return TensorSpec(spec.name, DType.U8, (correction_limit(spec.size, spec.dtype.itemsize),))


def undo_destination(path: str | Path, out: str | Path, inputs: Iterable[str | Path], force: bool) -> Destination:
    """Where an undo file goes. Raises OutputExists where it would touch an input, the output, or what stands there."""
    path, guarded = Path(path), tuple(Path(each) for each in inputs)
    if container_named(path) is not Container.SAFETENSORS:
        raise OutputExists(
            "an undo file is a safetensors file and is named like one",
            where=path,
            expected=f"a name that ends in {' or '.join(Container.SAFETENSORS.suffixes)}",
        )
    mine = path.resolve()
    for other in (*guarded, Path(out)):
        if other.resolve() in (mine, *mine.parents):
            raise OutputExists("the undo file would lie in an input or in the output", where=path, found=other)
    destination = Destination(path, inputs=guarded, force=force)
    destination.check()
    return destination


@contextlib.contextmanager
def create_with_undo(
    destination: Destination, plan: Plan, undo: Destination | None
) -> Iterator[tuple[CheckpointWriter, CheckpointWriter | None]]:
    """Opens an output and, where one is wanted, its undo file; they appear together or not at all.

    Both are on disk before the undo file gets its name, and at once the output gets its own: a kill between the two
    leaves no output without what undoes it.
    """
    named = False
    try:
        with create_checkpoint(destination, plan.outputs, plan.metadata) as writer:
            if undo is None:
                yield writer, None
            else:
                with create_checkpoint(undo, plan.asides, {}, reserve=False) as corrections:
                    yield writer, corrections
                    writer.settle()
                named = True
    except BaseException:
        if undo is not None and named:
            undo.path.unlink(missing_ok=True)
        raise


def changed_since(name: str) -> UndoMismatch:
    """What is raised for a tensor of the merged file that is not what merging left there."""
    return UndoMismatch(
        "this tensor is not what the merge left there: the file was changed since, or is another merge's",
        where=name,
        then="pass the file as it was merged",
    )


def leads_elsewhere(where: str, expected: str, found: str) -> CorruptFile:
    """What is raised where a corrected tensor is not the base's. `expected` and `found` are hashes."""
    return CorruptFile(
        "the undo file's correction does not lead back to the base",
        where=where,
        expected=f"BLAKE3 {expected[:16]}",
        found=found[:16],
        then="copy the undo file again",
    )
