"""Unmerging with an undo file: predict each tensor, correct the prediction, and check every hash.

This undoes every merge, including replaced tensors and methods without a delta. Knows no method's
mathematics and no container.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from formats.adapter import AdapterModule
from formats.checkpoint import Checkpoint
from formats.errors import CorruptFile
from formats.quantized import Scaled
from formats.spec import TensorRef, TensorSpec
from formats.tensors import bytes_from_tensor, tensor_from_bytes
from surgery.errors import UndoMismatch
from surgery.exact.correction import corrected, correction_workspace
from surgery.hashes import tensor_hash
from surgery.methods import workspace
from surgery.operations.merge.adapters import WeighedAdapter, check_receipt, weighed_modules
from surgery.operations.merge.float8 import restore_step
from surgery.operations.merge.ops import coarsened, prediction
from surgery.pipeline.ops import Copy, Drop, Hashed
from surgery.pipeline.plan import Fate, Outcome, Plan, Step
from surgery.receipts.receipt import Receipt
from surgery.receipts.undo_file import Change, UndoFile, UndoRecord, changed_since, leads_elsewhere

if TYPE_CHECKING:
    import torch


def plan_restore(
    merged: Checkpoint, adapters: Sequence[WeighedAdapter], receipt: Receipt | None, undo: UndoFile
) -> Plan:
    """Pairs every tensor of a merged file with its correction.

    Args:
        merged: the merged file; its receipt may have been lost.
        adapters: the adapters that were merged.
        receipt: the receipt in the merged file, if it has one.
        undo: the undo file.

    Raises:
        UndoMismatch: the undo file belongs to another merge, or the file holds other tensors.
        NotMerged: the undo file's merge used other adapters or weights.
    """
    record, where = undo.record, undo.checkpoint.ref.path
    if receipt is not None and (receipt.adapters, receipt.base_tensors) != (
        record.receipt.adapters,
        record.receipt.base_tensors,
    ):
        raise UndoMismatch(
            "the undo file belongs to another merge",
            where=where,
            expected=f"the merge in {merged.ref.path}, adapter {', '.join(digest[:16] for digest in receipt.digests)}",
            found=f"adapter {', '.join(digest[:16] for digest in record.receipt.digests)}",
            then="pass the undo file that merge wrote with this output",
        )
    by_target = weighed_modules(check_receipt(merged.ref.path, adapters, record.receipt), merged.tensor)
    added, names = set(record.receipt.added), record.receipt.renamed
    origins = {name: name for name in record.receipt.base_tensors} | {ours: name for name, ours in names.items()}
    odd = set(merged.specs) ^ ({origins[name] for name in origins.keys() - _gone(record)} | added)
    odd |= {
        origins[name]
        for name, change in record.changes.items()
        if merged.specs.get(origins[name]) != change.result(origins[name])
    }
    if odd:
        raise UndoMismatch(
            "the merged file and the undo file do not list the same tensors",
            where=merged.ref.path,
            found=", ".join(sorted(odd)[:5]),
            then="pass the file that merge wrote, unchanged",
        )
    steps = []
    scaled = _scaled(undo)
    scales = {how.scale.name for how in scaled.values()}
    for name, spec in merged.specs.items():
        ours = names.get(name, name)  # its name in the base
        if name in added:
            steps.append(Step(name, (), (), Drop(name)))
        elif name in scaled:
            steps.append(_scaled_step(merged, undo, scaled[name], by_target.get(name, ())))
        elif name in scales:
            continue
        elif ours in record.changes:
            steps.append(_correct_step(merged.tensor(name), undo, ours, by_target.get(name, ())))
        else:
            steps.append(Step(name, (merged.tensor(name),), (replace(spec, name=ours),), Copy(ours)))
    for name in sorted(_gone(record) - scales):
        steps.append(_recover_step(undo, name))
    return Plan("unmerge", tuple(steps), dict(record.receipt.base_metadata))


def _gone(record: UndoRecord) -> set[str]:
    """The base's tensors that the merged file no longer has."""
    return {name for name, change in record.changes.items() if change.now is None}


def _scaled(undo: UndoFile) -> dict[str, Scaled]:
    """The float8 weights that were merged in one step with their scales. Raises CorruptFile."""
    changes, found = undo.record.changes, {}
    for name, (scale, *block) in undo.record.receipt.scaled.items():
        if not {name, scale} <= set(changes) or len(block) != 2 or min(block) < 1:
            raise CorruptFile(
                "the undo file's record and its tensors contradict each other",
                where=name,
                then="restore the undo file from a backup, or use the original base model",
            )
        found[name] = Scaled(changes[name].spec(name), changes[scale].spec(scale), (block[0], block[1]))
    return found


def _scaled_step(
    merged: Checkpoint, undo: UndoFile, scaled: Scaled, modules: tuple[tuple[AdapterModule, float], ...]
) -> Step:
    names, record = (scaled.weight.name, scaled.scale.name), undo.record
    now = [(merged.tensor(name), record.changes[name].merged) for name in names if name in merged.specs]
    corrections = {name: undo.checkpoint.tensor(name) for name in names if name in undo.checkpoint.specs}
    base = (record.receipt.base_tensors[names[0]], record.receipt.base_tensors[names[1]])
    return restore_step(scaled, base, now, modules, corrections, undo.checkpoint.ref.path)


def _recover_step(undo: UndoFile, name: str) -> Step:
    spec = undo.record.changes[name].spec(name)
    inputs = (undo.checkpoint.tensor(name),) if name in undo.checkpoint.specs else ()
    op = Recover(spec, undo.record.receipt.base_tensors[name], f"{undo.checkpoint.ref.path}: {name}")
    return Step(name, inputs, (spec,), op, 2 * spec.nbytes + correction_workspace(spec.dtype.itemsize))


@dataclass(frozen=True)
class Recover:
    """Restores a tensor that the merged file no longer has. Input: its correction of zeros, if one is stored."""

    spec: TensorSpec
    base: str
    where: str

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Restores and checks. Raises CorruptFile."""
        payload = np.zeros(self.spec.nbytes, np.uint8)
        if inputs:
            itemsize = self.spec.dtype.itemsize
            payload = corrected(payload, bytes_from_tensor(inputs[0]), self.spec.nbytes, itemsize, self.where)
        result = tensor_from_bytes(payload, self.spec)
        if tensor_hash(result) != self.base:
            raise leads_elsewhere(self.where, self.base, tensor_hash(result))
        return Outcome((result,), {self.spec.name: Fate.FULL}, Hashed(after={self.spec.name: self.base}))


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
    """Restores the base's tensor: predicts it from the merged tensor, then corrects it.

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
            raise leads_elsewhere(self.where, self.base, digest or f"{guess.nbytes} bytes")
        fate = Fate.UNMERGED if self.modules else Fate.CONVERTED if self.change.stored else Fate.FULL
        return Outcome((result,), {name: fate}, Hashed(after={name: digest}))
