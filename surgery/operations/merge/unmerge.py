"""unmerge: subtracts deltas, W0 = W − ΣΔW, and restores the tensors that the receipt keeps.

Subtraction gives the nearest stored value, which is not always the original one. The receipt's hashes show which
tensors are exact, and an undo file corrects the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from formats.adapter import NOTHING_TOLD, AdapterModule, Told
from formats.checkpoint import Checkpoint
from formats.model_config import CONFIG
from formats.open_files import OpenFiles
from formats.quantized import refuse_foreign
from formats.spec import DType, TensorRef, TensorSpec
from surgery.errors import NotMerged
from surgery.exact.finite import check_finite
from surgery.hashes import tensor_hash
from surgery.methods import check_modules, transforming, workspace
from surgery.model.base_model import BaseModel, with_config
from surgery.model.config import growth, resized
from surgery.model.stored_dtype import Storage, as_numbers
from surgery.operations.merge.adapters import (
    AdapterPaths,
    WeighedAdapter,
    adapter_files,
    adapter_paths,
    check_receipt,
    open_adapters,
    weighed_modules,
)
from surgery.operations.merge.figures import UnmergeFigures
from surgery.operations.merge.float8 import subtract_step
from surgery.operations.merge.ops import subtract, uncertain_elements
from surgery.operations.merge.unmerge_exactly import plan_restore
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Done, Header, Job, runs, step_by_step
from surgery.pipeline.ops import Copy, Drop, Hashed, hashes_after, output_digest
from surgery.pipeline.plan import Fate, Outcome, Plan, Step
from surgery.receipts.receipt import Original, Receipt
from surgery.receipts.undo_file import UndoFile, changed_since, open_undo
from surgery.report import Report, Stopwatch

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class UnmergeReport(Report):
    """What unmerge did.

    Attributes:
        digest: content digest of the output's tensors; equal to the base's if bit_exact.
        bit_exact: whether every tensor has the base's hash from the receipt; None without a receipt.
        equal: unmerged tensors that have this hash.
        differing: unmerged tensors that have another hash, each with the number of elements that rounding can have
            changed.
        changed: other tensors that have another hash, because something changed them since the merge.
    """

    digest: str
    bit_exact: bool | None
    equal: tuple[str, ...]
    differing: Mapping[str, int]
    changed: tuple[str, ...]


def prepare_unmerge(
    merged: str | Path,
    adapters: AdapterPaths,
    out: str | Path,
    *,
    weight: float | None = None,
    undo: str | Path | None = None,
    told: Told = NOTHING_TOLD,
    force: bool = False,
    resources: Resources | None = None,
) -> Job[UnmergeReport]:
    """Prepares a job that takes the adapters of the last merge off a model and writes the result.

    Args:
        merged: a safetensors file or a folder; the output has the same layout.
        adapters: the adapter that was merged, or all that were merged at once, as for merge.
        out: a folder, or a `.safetensors`/`.st` file.
        weight: a factor for all weights. If neither it nor an adapter's own weight is given, the receipt's apply, or 1
            without a receipt.
        undo: the undo file that merge wrote with this output; it restores the base bit for bit.
        told: as for merge.
        force: overwrite `out` if it exists.
        resources: workers, memory and device.

    Raises:
        NotMerged: the receipt names other adapters, or one of them replaced tensors that nothing can restore.
        UndoMismatch: the undo file, the merged file and the adapters come from different merges.
        SurgeryError, FormatError: see their trees.
    """
    watch, files = Stopwatch(loading="torch"), OpenFiles()
    model = BaseModel.open(merged, files)
    corrections = None if undo is None else open_undo(undo, files)
    receipt = Receipt.read(model.checkpoint.metadata, merged)
    opened = open_adapters(model, adapter_files(adapters, files), model.specs, weight, told)
    plan = plan_unmerge(model, opened, receipt, corrections)
    inputs = (merged, *(path for path, _ in adapter_paths(adapters)), *((undo,) if undo is not None else ()))
    destination = model.destination(out, plan.outputs, inputs=inputs, force=force)
    receipt = corrections.record.receipt if corrections else receipt
    if CONFIG in destination.attachments:
        sizes = growth(_kept(model.checkpoint, plan, receipt.renamed if receipt else {}), plan.outputs)
        if receipt and receipt.config:
            destination = replace(destination, attachments={CONFIG: receipt.config.encode()})
        elif (config := resized(model.config, sizes)) != model.config:
            destination = with_config(destination, config)
    expected = receipt.base_tensors if receipt else {}

    def finish(done: Done) -> Callable[[Header], UnmergeReport]:
        hashes, digest = hashes_after(done.outcomes), output_digest(done.plan.outputs, done.outcomes)
        if corrections and digest != corrections.record.base_digest:
            # Corrected tensors have been checked one by one, so the wrong one is a copied tensor.
            wrong = (name for name, known in expected.items() if hashes.get(name) != known)
            raise changed_since(next(wrong, str(merged)))  # names the file if only a dtype or shape differs
        equal, differing, changed = _compared(expected, done.outcomes)
        exact = not (differing or changed) if receipt else None
        return lambda header: UnmergeReport(
            **header, digest=digest, bit_exact=exact, equal=equal, differing=differing, changed=changed
        )

    return step_by_step(
        plan,
        files=files,
        watch=watch,
        inputs=inputs,
        finish=finish,
        destination=destination,
        resources=resources,
    )


unmerge = runs(prepare_unmerge)


def _kept(merged: Checkpoint, plan: Plan, renamed: Mapping[str, str]) -> list[TensorSpec]:
    """The tensors of the merged file that the output also has, under their names in the output."""
    kept = (merged.specs[step.name] for step in plan.steps if step.outputs and step.name in merged.specs)
    return [replace(spec, name=renamed.get(spec.name, spec.name)) for spec in kept]


def _compared(
    expected: Mapping[str, str], outcomes: tuple[Outcome, ...]
) -> tuple[tuple[str, ...], dict[str, int], tuple[str, ...]]:
    """Sorts the tensors whose base hash is known: unmerged ones that match, unmerged ones that do not (with the number
    of elements that can differ), and others that do not match."""
    hashes = hashes_after(outcomes)
    unmerged = {name for each in outcomes for name, fate in each.fates.items() if fate is Fate.UNMERGED}
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts |= outcome.figures.uncertain if isinstance(outcome.figures, UnmergeFigures) else {}
    right = {name for name, known in expected.items() if hashes.get(name) == known}
    wrong = [name for name in expected if name not in right]
    differing = {name: counts[name] for name in wrong if name in unmerged}
    changed = tuple(name for name in wrong if name not in unmerged)
    return tuple(name for name in expected if name in right & unmerged), differing, changed


def plan_unmerge(
    model: BaseModel, adapters: Sequence[WeighedAdapter], receipt: Receipt | None, undo: UndoFile | None = None
) -> Plan:
    """Pairs every tensor with the deltas to subtract, and with its correction if there is an undo file.

    Raises:
        UndoMismatch: the undo file belongs to another merge.
        NotMerged: the receipt names other adapters or weights, or the original tensors are not kept.
    """
    merged = model.checkpoint
    if undo is not None:
        return plan_restore(merged, adapters, receipt, undo)
    if receipt is not None:
        adapters = check_receipt(merged.ref.path, adapters, receipt)
    elif any(each.adapter.config.get("layer_replication") for each in adapters):
        raise NotMerged(
            "the adapter repeats layers, and without a receipt the copies in this file cannot be identified",
            where=merged.ref.path,
            then="use the original base model",
        )
    added = set(receipt.added) if receipt else set()
    every = weighed_modules(adapters, merged.tensor)
    by_target = {target: modules for target, modules in every.items() if target not in added}
    storage = Storage.of(merged, model.quantization, None)
    refuse_foreign(storage.foreign, by_target, merged.ref.path)
    for target, modules in by_target.items():
        for module, _ in modules:
            if (method := transforming(module)) and method.forgets:
                raise NotMerged(
                    f"{module.method} cannot be taken off: {method.forgets}",
                    where=target,
                    then="use the original base model, or pass the undo file of that merge",
                )
        check_modules(modules, as_numbers(merged.specs[target]))
    before = {name: DType[label] for name, label in (receipt.dtypes if receipt else {}).items()}
    gone = sorted(name for name in (receipt.scaled if receipt else {}) if name in before)
    if gone:
        raise NotMerged(
            f"{len(gone)} float8 weights were dequantised, and this file does not hold their scales",
            where=merged.ref.path,
            found=", ".join(gone[:5]),
            then="use the original base model, or pass the undo file of that merge",
        )
    in_scales = {name: how for name, how in storage.scaled.items() if name in by_target}
    with_weights = {how.scale.name for how in in_scales.values()}
    originals = receipt.originals if receipt else {}
    names = receipt.renamed if receipt else {}
    replaced = {full.target for each in adapters for full in each.adapter.replacements} - set(by_target) - added
    beyond = sorted(
        ({names.get(name, name) for name in replaced} - set(originals)) | set(receipt.lost if receipt else ())
    )
    if beyond:
        raise NotMerged(
            f"the adapter replaced {len(beyond)} tensors, and this file does not hold the originals",
            where=merged.ref.path,
            found=", ".join(beyond[:5]),
            then="use the original base model" + ("" if receipt else "; this file has no receipt"),
        )
    steps = []
    for name, spec in merged.specs.items():
        ours = names.get(name, name)  # its name in the base
        if name in added:
            steps.append(Step(name, (), (), Drop(name)))
        elif ours in originals:
            steps.append(Step(name, (), (originals[ours].spec(ours),), Restore(ours, originals[ours])))
        elif name in in_scales:
            pair = (merged.tensor(name), merged.tensor(in_scales[name].scale.name))
            steps.append(subtract_step(in_scales[name], pair, by_target[name]))
        elif name in with_weights:
            continue
        elif name in by_target or ours in before:
            spec = replace(spec, name=ours, dtype=before.get(ours, spec.dtype))
            base = receipt.base_tensors.get(ours, "") if receipt else ""
            steps.append(_subtract_step(merged.tensor(name), spec, by_target.get(name, ()), base))
        else:
            steps.append(Step(name, (merged.tensor(name),), (replace(spec, name=ours),), Copy(ours)))
    unknown = "this file has no receipt: whether the base was restored bit for bit is unknown"
    notes = merged.notes if receipt else (*merged.notes, unknown)
    metadata = receipt.base_metadata if receipt else merged.metadata
    return Plan("unmerge", tuple(steps), dict(metadata), notes)


def _subtract_step(
    merged: TensorRef, spec: TensorSpec, modules: tuple[tuple[AdapterModule, float], ...], base: str
) -> Step:
    factors = [ref for module, _ in modules for _, ref in sorted(module.factors.items())]
    op = Subtract(spec.name, spec.dtype, modules, base)
    return Step(merged.name, (merged, *factors), (spec,), op, workspace(modules, spec))


@dataclass(frozen=True)
class Subtract:
    """Subtracts the deltas of its modules from a weight, stored as `dtype`; `base` is the expected hash, "" if unknown.
    Inputs: the weight, then the factors as for merge."""

    name: str
    dtype: DType
    modules: tuple[tuple[AdapterModule, float], ...]
    base: str

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Subtracts, rounds once and hashes; if the hash differs, counts the elements that can be wrong."""
        result = subtract(inputs[0], self.modules, inputs[1:], self.dtype)
        check_finite(result, self.name)
        digest = tensor_hash(result)
        uncertain = {}
        if self.base and digest != self.base:
            uncertain = {self.name: uncertain_elements(inputs[0], result, self.modules, self.dtype)}
        figures = UnmergeFigures(after={self.name: digest}, uncertain=uncertain)
        return Outcome((result,), {self.name: Fate.UNMERGED if self.modules else Fate.CONVERTED}, figures)


@dataclass(frozen=True)
class Restore:
    """Restores a replaced tensor from the receipt."""

    name: str
    original: Original

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Decodes and hashes the tensor; reads no input."""
        tensor = self.original.tensor(self.name)
        return Outcome((tensor,), {self.name: Fate.FULL}, Hashed(after={self.name: tensor_hash(tensor)}))
