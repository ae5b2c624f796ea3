"""The undo file: with it, the merged file and the adapters, unmerge restores the base bit for bit.

It is a safetensors file. Its tensors are corrections (see `surgery.exact.correction`), named after the tensors that
they restore; a tensor that needs no correction has none. Its metadata describes the merge: the receipt, the content
digests of base and result, and for every changed tensor its original spec and the BLAKE3 of its merged payload. This
module reads and writes undo files; it does not know how predictions are made.
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
from formats.paths import open_checkpoint
from formats.spec import DType, TensorSpec
from surgery.errors import UndoMismatch
from surgery.exact.correction import correction_limit
from surgery.pipeline.plan import Plan
from surgery.receipts.receipt import Receipt

UNDO = "surgery.receipts.undo_file"
_VERSION = 3
_SCALES_LIMIT = 1 << 26  # the most elements of a tensor that merging removed, such as scales


@dataclass(frozen=True)
class Change:
    """How merging changed one tensor.

    Attributes:
        dtype, shape: dtype and shape before the merge.
        now: shape after the merge; None if the tensor was removed.
        merged: BLAKE3 of the payload after the merge; empty if the tensor was removed.
        stored: dtype after the merge, if it changed.
    """

    dtype: str
    shape: list[int]
    now: list[int] | None
    merged: str
    stored: str | None = None

    def spec(self, name: str) -> TensorSpec:
        """The tensor's spec before the merge."""
        return TensorSpec(name, DType[self.dtype], tuple(self.shape))

    def result(self, name: str) -> TensorSpec | None:
        """The tensor's spec after the merge; None if it was removed."""
        if self.now is None:
            return None
        return TensorSpec(name, DType[self.stored or self.dtype], tuple(self.now))


@dataclass(frozen=True)
class UndoRecord:
    """An undo file's record of its merge.

    Attributes:
        receipt: the merge's receipt, without the originals.
        base_digest, result_digest: content digests of all tensors before and after the merge.
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
    """An open undo file: its corrections and its record."""

    checkpoint: Checkpoint
    record: UndoRecord


@contextlib.contextmanager
def open_undo(path: str | Path | None) -> Iterator[UndoFile | None]:
    """Opens an undo file; yields None if `path` is None.

    Raises:
        UndoMismatch: the file is not an undo file.
        CorruptFile: the file's record and corrections contradict each other.
    """
    if path is None:
        yield None
        return
    with open_checkpoint(path) as checkpoint:
        if UNDO not in checkpoint.metadata:
            raise UndoMismatch(
                "not an undo file",
                where=path,
                expected=f"{UNDO} in its metadata",
                then="pass the file that merge --undo wrote",
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
                then="it may come from another version of surgery: use that version",
            ) from error
        if not sound or not set(checkpoint.specs) <= set(changes) <= set(receipt.base_tensors):
            raise CorruptFile(
                "the undo file's record and its tensors contradict each other",
                where=path,
                then="copy the undo file again",
            )
        yield UndoFile(checkpoint, record)


def _is_sound(name: str, change: Change) -> bool:
    """Whether the tensor's recorded size is plausible: merging lets tensors grow, never shrink."""
    sizes = [*change.shape, *(change.now or ())]
    known = all(type(n) is int and n >= 0 for n in sizes) and isinstance(change.merged, str)
    now = change.result(name) if known else None
    return known and change.spec(name).size <= (_SCALES_LIMIT if now is None else now.size)


def correction_spec(spec: TensorSpec) -> TensorSpec:
    """The spec of a tensor's correction at its largest possible size."""
    return TensorSpec(spec.name, DType.U8, (correction_limit(spec.size, spec.dtype.itemsize),))


def undo_destination(path: str | Path, out: str | Path, inputs: Iterable[str | Path], force: bool) -> Destination:
    """The destination of an undo file. Raises OutputExists if it would replace an input, the output, or an existing
    file without `force`."""
    path, guarded = Path(path), tuple(Path(each) for each in inputs)
    if container_named(path) is not Container.SAFETENSORS:
        raise OutputExists(
            "an undo file is a safetensors file and is named like one",
            where=path,
            expected=f"a name that ends in {' or '.join(Container.SAFETENSORS.suffixes)}",
            then="choose such a name with --undo",
        )
    mine = path.resolve()
    for other in (*guarded, Path(out)):
        if other.resolve() in (mine, *mine.parents):
            raise OutputExists(
                "the undo file would be inside an input or the output",
                where=path,
                found=other,
                then="choose another place with --undo",
            )
    destination = Destination(path, inputs=guarded, force=force)
    destination.check()
    return destination


@contextlib.contextmanager
def create_with_undo(
    destination: Destination, plan: Plan, undo: Destination | None
) -> Iterator[tuple[CheckpointWriter, CheckpointWriter | None]]:
    """Opens an output and, if wanted, its undo file; they appear together or not at all.

    Both are on disk before the undo file gets its name, and the output gets its name right after. So a kill between the
    two never leaves an output without its undo file.
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
    """The error for a tensor of the merged file that is not as the merge wrote it."""
    return UndoMismatch(
        "this tensor is not as the merge wrote it: the file was changed since, or comes from another merge",
        where=name,
        then="pass the merged file as the merge wrote it",
    )


def leads_elsewhere(where: str, expected: str, found: str) -> CorruptFile:
    """The error for a corrected tensor that is not the base's. `expected` and `found` are hashes."""
    return CorruptFile(
        "the undo file's correction does not restore the base",
        where=where,
        expected=f"BLAKE3 {expected[:16]}",
        found=found[:16],
        then="copy the undo file again",
    )
