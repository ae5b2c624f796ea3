"""Unmerging with an undo file: predict each tensor, correct the prediction, and have every hash agree.

Whatever merge did can be undone so, replaced tensors and methods without a delta included. Knows no method's
mathematics and no container.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.checkpoint import Checkpoint
from formats.errors import CorruptFile
from formats.spec import TensorRef, TensorSpec
from formats.tensors import bytes_from_tensor, tensor_from_bytes
from surgery.correction import corrected, correction_workspace
from surgery.errors import UndoMismatch
from surgery.methods import workspace
from surgery.operations.adapters import WeighedAdapter, check_receipt, weighed_modules
from surgery.operations.merge_ops import Copy, Drop, coarsened, prediction
from surgery.plan import Fate, Outcome, Plan, Step
from surgery.provenance import Receipt, tensor_hash
from surgery.undo import Change, UndoFile

if TYPE_CHECKING:
    import torch


def plan_restore(
    merged: Checkpoint, adapters: Sequence[WeighedAdapter], receipt: Receipt | None, undo: UndoFile
) -> Plan:
    """Pairs every tensor of a merged file with its correction.

    Args:
        merged: the merged file; its receipt may have been lost.
        adapters: those of the merge.
        receipt: the merged file's own, if it has one.
        undo: the undo file.

    Raises:
        UndoMismatch: the undo file is of another merge, or the file holds other tensors.
        NotMerged: the undo file's merge was of other adapters or weights.
    """
    record, where = undo.record, undo.checkpoint.ref.path
    if receipt is not None and (receipt.adapters, receipt.base_tensors) != (
        record.receipt.adapters,
        record.receipt.base_tensors,
    ):
        raise UndoMismatch(
            "the undo file is of another merge",
            where=where,
            expected=f"that of {merged.ref.path}, adapter {', '.join(digest[:16] for digest in receipt.digests)}",
            found=f"adapter {', '.join(digest[:16] for digest in record.receipt.digests)}",
            then="pass the undo file that was written with this very output",
        )
    by_target = weighed_modules(check_receipt(merged.ref.path, adapters, record.receipt), merged.tensor)
    added, names = set(record.receipt.added), record.receipt.renamed
    origins = {name: name for name in record.receipt.base_tensors} | {ours: name for name, ours in names.items()}
    odd = set(merged.specs) ^ (set(origins.values()) | added)
    odd |= {
        origins[name]
        for name, change in record.changes.items()
        if _now(merged, origins[name]) != (change.dtype, change.now)
    }
    if odd:
        raise UndoMismatch(
            "the merged file holds other tensors than the undo file knows",
            where=merged.ref.path,
            found=", ".join(sorted(odd)[:5]),
            then="pass the file as it was merged",
        )
    steps = []
    for name, spec in merged.specs.items():
        ours = names.get(name, name)  # the base's name of it
        if name in added:
            steps.append(Step(name, (), (), Drop(name)))
        elif ours in record.changes:
            steps.append(_correct_step(merged.tensor(name), undo, ours, by_target.get(name, ())))
        else:
            steps.append(Step(name, (merged.tensor(name),), (replace(spec, name=ours),), Copy(ours)))
    return Plan("unmerge", tuple(steps), dict(record.receipt.base_metadata))


def _now(merged: Checkpoint, name: str) -> tuple[str, list[int]] | None:
    spec = merged.specs.get(name)
    return None if spec is None else (spec.dtype.label, list(spec.shape))


def _correct_step(
    merged: TensorRef, undo: UndoFile, name: str, modules: tuple[tuple[AdapterModule, float], ...]
) -> Step:
    change = undo.record.changes[name]
    spec = change.spec(name)
    factors = [ref for module, _ in modules for _, ref in sorted(module.factors.items())]
    inputs = [merged, *factors]
    stored = name in undo.checkpoint.specs
    if stored:
        inputs.append(undo.checkpoint.tensor(name))
    needed = workspace(modules, spec) + 2 * spec.nbytes + correction_workspace(spec.dtype.itemsize)
    base = undo.record.receipt.base_tensors[name]
    op = Correct(spec, change, base, modules, stored, f"{undo.checkpoint.ref.path}: {name}")
    return Step(merged.name, tuple(inputs), (spec,), op, needed)


@dataclass(frozen=True)
class Correct:
    """The base's tensor: predicted from the merged one, then corrected.

    Inputs: the merged tensor, the factors as for merge, and the correction if one is stored.
    """

    spec: TensorSpec
    change: Change
    base: str
    modules: tuple[tuple[AdapterModule, float], ...]
    stored: bool
    where: str

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Checks the merged tensor, predicts, corrects, checks the result. Raises UndoMismatch, CorruptFile."""
        name = self.spec.name
        if tensor_hash(inputs[0]) != self.change.merged:
            raise changed_since(name)
        factors = inputs[1:-1] if self.stored else inputs[1:]
        predicted = prediction(inputs[0], self.modules, factors, self.spec)
        guess = bytes_from_tensor(predicted)
        if self.stored:
            hints = coarsened(inputs[0], predicted, self.spec.dtype)
            stored = bytes_from_tensor(inputs[-1])
            guess = corrected(guess, stored, self.spec.nbytes, self.spec.dtype.itemsize, self.where, hints)
        digest = ""
        if guess.nbytes == self.spec.nbytes:
            result = tensor_from_bytes(guess, self.spec)
            digest = tensor_hash(result)
        if digest != self.base:
            raise CorruptFile(
                "the undo file's correction does not lead back to the base",
                where=self.where,
                expected=f"BLAKE3 {self.base[:16]}",
                found=digest[:16] or f"{guess.nbytes} bytes",
                then="copy the undo file again",
            )
        fate = Fate.UNMERGED if self.modules else Fate.FULL
        return Outcome((result,), {name: fate}, {"hashes": {name: digest}})


def changed_since(name: str) -> UndoMismatch:
    """What is raised for a tensor of the merged file that is not what merging left there."""
    return UndoMismatch(
        "this tensor is not what the merge left there: the file was changed since, or is another merge's",
        where=name,
        then="pass the file as it was merged",
    )
