"""merge: computes W = W0 + ΣΔW, rounds each weight once and copies the rest. `plan` pairs tensors; this runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from formats.adapter import NOTHING_TOLD, Told
from formats.model_config import CONFIG
from formats.open_files import OpenFiles
from formats.spec import DType
from surgery.errors import NothingToDo
from surgery.exact.survival import Surviving, check_surviving
from surgery.hashes import content_digest
from surgery.model.base_model import BaseModel, with_config
from surgery.model.config import growth, resized, with_settings
from surgery.model.outline import Outline
from surgery.model.stored_dtype import dtype_named, restated
from surgery.operations.merge.adapters import AdapterPaths, WeighedAdapter, adapter_files, adapter_paths, open_for_merge
from surgery.operations.merge.figures import MergeFigures
from surgery.operations.merge.plan import plan_merge
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Done, Header, Job, runs, step_by_step
from surgery.pipeline.ops import hashes_after, hashes_before, output_digest
from surgery.pipeline.plan import Outcome, Plan
from surgery.receipts.receipt import Receipt
from surgery.receipts.undo_file import Change, UndoRecord, create_with_undo, undo_destination
from surgery.report import Report, Stopwatch


@dataclass(frozen=True, kw_only=True)
class MergeReport(Report):
    """What merge did.

    Attributes:
        digest: content digest of the output's tensors; it does not depend on their sharding.
        base_digest: content digest of the base's tensors.
        adapters: content digest of every adapter, scalings included, in the order in which they were added.
        surviving: for every tensor with a delta, how much of the delta is stored; by name.
        undo: the undo file, if one was written.
    """

    digest: str
    base_digest: str
    adapters: tuple[str, ...]
    surviving: Mapping[str, Surviving]
    undo: UndoFigures | None = None


@dataclass(frozen=True)
class UndoFigures:
    """An undo file: its path, its size in bytes, and that size relative to the tensors that merging changed."""

    path: str
    nbytes: int
    share: float


def prepare_merge(
    base: str | Path,
    adapters: AdapterPaths,
    out: str | Path,
    *,
    weight: float = 1.0,
    dtype: str | None = None,
    min_surviving: float | None = None,
    undo: str | Path | None = None,
    told: Told = NOTHING_TOLD,
    untie: bool = False,
    max_shard_size: int | None = None,
    force: bool = False,
    resources: Resources | None = None,
) -> Job[MergeReport]:
    """Prepares a job that adds one or several adapters to the weights of a base and writes the result.

    Args:
        base: a safetensors file or a folder. The output has the same layout: a file, or a folder with the same shards,
            config, tokenizer and other files.
        adapters: a PEFT adapter (a folder or a single file) or a loralib adapter (a file); or (path, weight); or a
            sequence of these. Their order does not matter: all deltas are summed and rounded once.
        out: a folder, or a `.safetensors`/`.st` file.
        weight: a factor for every delta.
        dtype: "float32", "float16" or "bfloat16" for every weight of the output; float8 with scales is then
            dequantised. By default each weight keeps its dtype.
        min_surviving: the least ‖stored(W) − W0‖ / ‖ΔW‖ that every merged tensor must have.
        undo: the `.safetensors`/`.st` path of an undo file, with which unmerge restores the base bit for bit.
        told: alpha and layout of loralib adapters, whose files do not contain them.
        untie: give a head that the base ties to its embedding a tensor of its own.
        max_shard_size: largest size of a shard of an output folder, in bytes; by default the base's shards are kept.
        force: overwrite `out` and `undo` if they exist.
        resources: workers, memory and device.

    Raises:
        VerificationFailed: less than `min_surviving` of a delta survives rounding (raised while running).
        SurgeryError, FormatError: see their trees. Errors that headers and the adapter reveal are raised before any
            payload of the base is read.
    """
    watch, files = Stopwatch(loading="torch"), OpenFiles()
    stored = dtype_named(dtype)
    model = BaseModel.open(base, files)
    opened, outline = open_for_merge(model, adapter_files(adapters, files), weight, told, untie=untie)
    return merge_job(
        model,
        opened,
        outline,
        out,
        inputs=(base, *(path for path, _ in adapter_paths(adapters))),
        watch=watch,
        stored=stored,
        min_surviving=min_surviving,
        undo=undo,
        max_shard_size=max_shard_size,
        force=force,
        resources=resources,
    )


merge = runs(prepare_merge)


def merge_job(
    model: BaseModel,
    opened: Sequence[WeighedAdapter],
    outline: Outline,
    out: str | Path,
    *,
    inputs: Sequence[str | Path],
    watch: Stopwatch,
    stored: DType | None = None,
    min_surviving: float | None = None,
    undo: str | Path | None = None,
    max_shard_size: int | None = None,
    force: bool = False,
    resources: Resources | None = None,
) -> Job[MergeReport]:
    """Prepares a merge of adapters that `open_for_merge` opened; other arguments and errors as for `prepare_merge`."""
    plan, receipt = plan_merge(model, opened, outline, undo=undo is not None, stored=stored)
    destination = model.destination(out, plan.outputs, inputs=inputs, force=force, max_shard=max_shard_size)
    if CONFIG in destination.attachments:
        config, restated_too = _config(model, plan, outline, stored), bool(outline.config or stored)
        if restated_too or config != model.config:
            destination = with_config(destination, config)
        if restated_too and model.config_content is not None:
            receipt = replace(receipt, config=model.config_content.decode())
            plan = replace(plan, metadata=receipt.metadata())
    undo_file = undo_destination(undo, out, inputs, force) if undo is not None else None

    def finish(done: Done) -> Callable[[Header], MergeReport]:
        assert done.writer is not None
        figures = [each.figures for each in done.outcomes if isinstance(each.figures, MergeFigures)]
        if not any(each.changed for each in figures):
            raise NothingToDo(
                "the merge changes nothing: every delta rounds to zero",
                where=model.path,
                then="check that the adapter is trained, or store the result in a wider dtype: --dtype float32",
            )
        surviving = {name: found for each in figures for name, found in each.surviving.items()}
        if min_surviving is not None:
            check_surviving(surviving, min_surviving)
        completed = _completed(receipt, outline, done.outcomes)
        done.writer.seal(completed.metadata())
        digest = output_digest(done.plan.outputs, done.outcomes)
        base_digest = content_digest((spec, completed.base_tensors[name]) for name, spec in model.specs.items())
        if done.aside is not None:
            changes = _changes(done.plan, outline, done.outcomes)
            done.aside.seal(UndoRecord(completed, base_digest, digest, changes).metadata())
        return lambda header: MergeReport(
            **header,
            digest=digest,
            base_digest=base_digest,
            adapters=completed.digests,
            surviving=surviving,
            undo=_undo_figures(undo, done.plan) if undo is not None else None,
        )

    return step_by_step(
        plan,
        files=model.files,
        watch=watch,
        inputs=inputs,
        finish=finish,
        destination=destination,
        writers=lambda plan: create_with_undo(destination, plan, undo_file),
        beside=() if undo is None else (undo,),
        resources=resources,
    )


def _config(model: BaseModel, plan: Plan, outline: Outline, stored: DType | None) -> Mapping[str, Any]:
    """The output's config.json; equal to the base's if nothing in it changes."""
    config = model.config
    if sizes := growth(outline.specs.values(), plan.outputs):
        config = resized(config, sizes)
    if outline.config:
        config = with_settings(config, outline.config)
    return config if stored is None else restated(config, stored)


def _changes(plan: Plan, outline: Outline, outcomes: tuple[Outcome, ...]) -> dict[str, Change]:
    """The undo file's entry for every tensor that can have a correction, by the base's names."""
    hashes, origins = hashes_after(outcomes), outline.origins
    now = {spec.name: spec for spec in plan.outputs}
    changes = {}
    for step in plan.steps:
        for aside in step.asides:
            name = origins[aside.name]
            before, result = outline.specs[name], now.get(name)
            changes[aside.name] = Change(
                before.dtype.label,
                list(before.shape),
                None if result is None else list(result.shape),
                "" if result is None else hashes[name],
                None if result is None or result.dtype is before.dtype else result.dtype.label,
            )
    return changes


def _undo_figures(path: str | Path, plan: Plan) -> UndoFigures:
    nbytes = Path(path).stat().st_size
    changed = sum(spec.nbytes for step in plan.steps if step.asides for spec in step.outputs)
    return UndoFigures(str(path), nbytes, nbytes / changed if changed else 0.0)


def _completed(receipt: Receipt, outline: Outline, outcomes: tuple[Outcome, ...]) -> Receipt:
    """Fills in the parts of the receipt that only the run knows."""
    hashes, figures = hashes_before(outcomes), [each.figures for each in outcomes]
    merged = [each for each in figures if isinstance(each, MergeFigures)]
    originals = {name: original for each in merged for name, original in each.originals.items()}
    lost = [name for each in merged for name in each.lost]
    origins, names, surplus = outline.origins, outline.renamed, outline.surplus
    return replace(
        receipt,
        base_tensors={name: hashes[origins[name]] for name in receipt.base_tensors},
        originals={names.get(name, name): original for name, original in originals.items()},
        lost=tuple(names.get(name, name) for name in lost if name not in surplus),
    )
