"""unmerge: W0 = W − ΣΔW, and what the receipt kept restored whole.

Subtraction gives the nearest stored value, not always the one that was there; the receipt's hashes tell which, and an
undo file what is missing.
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
        digest: content address of the output's tensors; the base's own if bit_exact.
        bit_exact: whether every tensor has the hash that the receipt recorded of the base; None without a receipt.
        equal: unmerged tensors that have it.
        differing: unmerged tensors that have not, and how many of their elements rounding can have changed.
        changed: other tensors that have not: something changed them since the merge.
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
    """Prepares a job that writes a merged model with the adapters of its last merge taken off again.

    Args:
        merged: a safetensors file or a folder; the output has its shape.
        adapters: the adapter that was merged, or all that were merged at once, as for merge.
        out: a folder, or a `.safetensors`/`.st` file.
        weight: a factor of all weights; where neither it nor an adapter's own is given they are the receipt's, or 1
            without a receipt.
        undo: the undo file that merge wrote with this output: the base comes back bit for bit.
        told: as for merge.
        force: replace what stands at `out`.
        resources: workers, memory and device.

    Raises:
        NotMerged: the receipt names other adapters, or one of them replaced tensors that nothing can restore.
        UndoMismatch: the undo file, the merged file and the adapters are not of one merge.
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
            # Corrected tensors have been checked one by one: it is one that was only copied.
            wrong = (name for name, known in expected.items() if hashes.get(name) != known)
            raise changed_since(next(wrong, str(merged)))  # the file itself where only a dtype or shape is another
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
    """The tensors of the merged file that the output has too, by the names they have there."""
    kept = (merged.specs[step.name] for step in plan.steps if step.outputs and step.name in merged.specs)
    return [replace(spec, name=renamed.get(spec.name, spec.name)) for spec in kept]


def _compared(
    expected: Mapping[str, str], outcomes: tuple[Outcome, ...]
) -> tuple[tuple[str, ...], dict[str, int], tuple[str, ...]]:
    """Of the tensors whose hash in the base is known: the unmerged ones that have it, those that have not with the
    elements that can differ, and all others that have not."""
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
    """Pairs every tensor with what is taken off it, and with its correction if there is an undo file.

    Raises:
        UndoMismatch: the undo file is of another merge.
        NotMerged: the receipt names other adapters or weights, or what was there is not kept.
    """
    merged = model.checkpoint
    if undo is not None:
        return plan_restore(merged, adapters, receipt, undo)
    if receipt is not None:
        adapters = check_receipt(merged.ref.path, adapters, receipt)
    elif any(each.adapter.config.get("layer_replication") for each in adapters):
        raise NotMerged(
            "the adapter repeats layers, and without a receipt nothing tells which of this file's are copies",
            where=merged.ref.path,
            then="go back to the base itself",
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
                    then="go back to the base itself, or pass the undo file of that merge",
                )
        check_modules(modules, as_numbers(merged.specs[target]))
    before = {name: DType[label] for name, label in (receipt.dtypes if receipt else {}).items()}
    gone = sorted(name for name in (receipt.scaled if receipt else {}) if name in before)
    if gone:
        raise NotMerged(
            f"{len(gone)} float8 weights were dequantised, and their scales are not in this file",
            where=merged.ref.path,
            found=", ".join(gone[:5]),
            then="go back to the base itself, or pass the undo file of that merge",
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
            f"{len(beyond)} tensors were replaced by the adapter, and what they replaced is not in this file",
            where=merged.ref.path,
            found=", ".join(beyond[:5]),
            then="go back to the base itself" + ("" if receipt else "; this file has no receipt"),
        )
    steps = []
    for name, spec in merged.specs.items():
        ours = names.get(name, name)  # the base's name of it
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
    unknown = "no receipt in this file: nothing tells whether the base came back bit for bit"
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
    """W minus the deltas of its modules, stored as `dtype`; `base` is the hash that should come out, if it is known.
    Inputs: the weight, then the factors as for merge."""

    name: str
    dtype: DType
    modules: tuple[tuple[AdapterModule, float], ...]
    base: str

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Subtracts, rounds once, hashes; counts what can differ where something does."""
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
    """A tensor that was replaced, taken from the receipt."""

    name: str
    original: Original

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Decodes and hashes; there is nothing to read."""
        tensor = self.original.tensor(self.name)
        return Outcome((tensor,), {self.name: Fate.FULL}, Hashed(after={self.name: tensor_hash(tensor)}))
