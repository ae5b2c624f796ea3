"""fold: merges an adapter into a model's weights as far as this is exact, and describes the parts that must stay nodes.

An adapter that is a change of weights (LoRA, (IA)³, VeRA …) is handled by merge. `plan` plans the others.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from formats.adapter import NOTHING_TOLD, Told
from formats.checkpoint import CheckpointWriter, TensorWriter
from formats.destination import Destination, create_checkpoint
from formats.dialects import AdapterFile
from formats.errors import FormatError
from formats.grafts import GRAFTS_FILE, Grafts
from formats.layers import owner
from formats.model_config import CONFIG
from formats.open_files import OpenFiles
from surgery.errors import NothingToDo
from surgery.hashes import content_digest
from surgery.model.base_model import BaseModel, with_config
from surgery.model.config import with_settings
from surgery.operations.fold.open import fingerprint_beside, open_parts, open_single
from surgery.operations.fold.plan import Folding, plan_fold
from surgery.operations.fold.verdicts import IN_FULL, REPLACED, Verdict, Way, verdicts_beside
from surgery.operations.merge.adapters import WeighedAdapter, open_for_merge
from surgery.operations.merge.figures import MergeFigures
from surgery.operations.merge.merge import MergeReport, merge_job
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Done, Header, Job, JobPlan, runs, step_by_step
from surgery.pipeline.ops import hashes_before, output_digest
from surgery.pipeline.plan import Plan, no_fates
from surgery.report import Report, Stopwatch


@dataclass(frozen=True, kw_only=True)
class FoldReport(Report):
    """What fold did.

    Attributes:
        verdicts: what became of every part of the adapter, and why.
        digest: content digest of the output's tensors, without grafts.
        base_digest: content digest of the model's tensors.
        adapter: content digest of the adapter.
        grafts: the file that describes the parts that must stay in the graph; None if there are none.
        settings: changed entries of config.json.
    """

    verdicts: tuple[Verdict, ...]
    digest: str
    base_digest: str
    adapter: str
    grafts: str | None = None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class FoldPlan(JobPlan):
    """What a fold will do. `verdicts`: what becomes of every part of the adapter, and why."""

    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class FoldJob(Job[FoldReport]):
    """A prepared fold: a job that also has verdicts."""

    verdicts: tuple[Verdict, ...]

    @property
    def summary(self) -> FoldPlan:
        """What the job will do, as plain data."""
        return FoldPlan(**vars(super().summary), verdicts=self.verdicts)


def prepare_fold(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    told: Told = NOTHING_TOLD,
    force: bool = False,
    resources: Resources | None = None,
) -> FoldJob:
    """Prepares a job that folds an adapter into a model's weights as far as this is exact; other parts lie next to it.

    Args:
        model: a safetensors file or a folder.
        adapter: AdapterHub's bottlenecks, compacters, prefixes, prompts, or a union of these; peft's prompts and
            prefixes; or any adapter that merge takes.
        out: a folder, or a `.safetensors`/`.st` file if no part must stay in the graph.
        told: as for merge.
        force: overwrite `out` if it exists.
        resources: threads and memory.

    Raises:
        NotMergeable: no weight and no added node can express the adapter; the message gives the reason.
        SurgeryError, FormatError: see their trees; errors that headers reveal are raised before any work.
    """
    watch, files = Stopwatch(loading="torch"), OpenFiles()
    base = BaseModel.open(model, files)
    opened = open_single(Path(adapter), files)
    return fold_job(base, opened, out, watch=watch, told=told, force=force, resources=resources)


fold = runs(prepare_fold)


def fold_job(
    base: BaseModel,
    opened: AdapterFile,
    out: str | Path,
    *,
    watch: Stopwatch,
    told: Told = NOTHING_TOLD,
    force: bool = False,
    resources: Resources | None = None,
) -> FoldJob:
    """The job of `prepare_fold` for files that are already open; `watch` was started when the verb was called."""
    files = base.files
    inputs, parts = (base.path, opened.path), open_parts(base, opened)
    if parts is None:
        merged, outline = open_for_merge(base, ((opened, None),), told=told)
        merging = merge_job(base, merged, outline, out, inputs=inputs, watch=watch, force=force, resources=resources)
        return _as_fold(merging, merged_verdicts(base, opened, merged))
    record = fingerprint_beside(opened)
    folding = plan_fold(base, parts, record)
    destination = _destination(base, folding, inputs, out, force)

    def finish(done: Done) -> Callable[[Header], FoldReport]:
        assert done.writer is not None
        before, digest = hashes_before(done.outcomes), output_digest(done.plan.outputs, done.outcomes)
        figures = [each.figures for each in done.outcomes if isinstance(each.figures, MergeFigures)]
        if folding.grafts is None and not any(each.changed for each in figures):
            raise NothingToDo(
                "the fold changes nothing: all of the adapter rounds to zero",
                where=opened.path,
                then="check that the adapter is trained",
            )
        if folding.receipt is not None:
            done.writer.seal(replace(folding.receipt, base_tensors=before).metadata())
        if folding.grafts is not None and done.aside is not None:
            done.aside.seal(replace(folding.grafts, model=digest).metadata())
        fates = {name: fate for outcome in done.outcomes for name, fate in outcome.fates.items()}
        return lambda header: FoldReport(
            **{**header, "ledger": no_fates() | Counter(fate.value for fate in fates.values())},
            verdicts=folding.verdicts,
            digest=digest,
            base_digest=content_digest((spec, before[name]) for name, spec in base.specs.items()),
            adapter=record.digest,
            grafts=None if folding.grafts is None else str(destination.path / GRAFTS_FILE),
            settings=folding.settings,
        )

    job = step_by_step(
        folding.plan,
        files=files,
        watch=watch,
        inputs=inputs,
        finish=finish,
        destination=destination,
        writers=lambda plan: _writers(destination, plan, folding.grafts),
        resources=resources,
    )
    return FoldJob(**vars(job), verdicts=folding.verdicts)


def merged_verdicts(model: BaseModel, adapter: AdapterFile, merged: Iterable[WeighedAdapter]) -> tuple[Verdict, ...]:
    """The verdicts on an adapter that is a change of weights.

    Args:
        model, adapter: the opened files.
        merged: the adapter, as `open_for_merge` opened it against the model.
    """
    found = []
    for each in merged:
        for module in each.adapter.modules:
            found.append(Verdict(owner(module.target), module.method, Way.FOLDED, "a change of the weight: merged"))
        for full in each.adapter.replacements:
            found.append(Verdict(owner(full.target), IN_FULL, Way.FOLDED, REPLACED))
        head = adapter.dialect.head(adapter.path, model.specs, model.config, adapter.files)
        if head is not None:
            found += [one for one in verdicts_beside(head) if one.way is Way.LEFT]
    return tuple(found)


def _as_fold(job: Job[MergeReport], verdicts: tuple[Verdict, ...]) -> FoldJob:
    """Presents a merge as a fold."""
    plan = replace(job.plan, operation="fold")

    def work(resources: Resources) -> FoldReport:
        report = job.work(resources)
        return FoldReport(
            **{field.name: getattr(report, field.name) for field in fields(Report)} | {"operation": "fold"},
            verdicts=verdicts,
            digest=report.digest,
            base_digest=report.base_digest,
            adapter=report.adapters[0],
            settings={},
        )

    return FoldJob(**{**vars(job), "plan": plan, "work": work}, verdicts=verdicts)


def _destination(
    base: BaseModel, folding: Folding, inputs: tuple[Path, ...], out: str | Path, force: bool
) -> Destination:
    """The output, with the config.json that it needs."""
    destination = base.destination(out, folding.plan.outputs, inputs=inputs, force=force)
    if folding.grafts is not None and not destination.is_folder:
        raise FormatError(
            "parts of the adapter must stay in the graph, and a single file cannot hold them",
            where=out,
            expected="a folder",
            then="name a folder with -o; --dry-run lists these parts with reasons",
        )
    if folding.settings and CONFIG in destination.attachments:
        return with_config(destination, with_settings(base.config, folding.settings))
    return destination


@contextlib.contextmanager
def _writers(
    destination: Destination, plan: Plan, grafts: Grafts | None
) -> Iterator[tuple[CheckpointWriter, TensorWriter | None]]:
    """Opens the output, and the file of grafts next to its weights."""
    with create_checkpoint(destination, plan.outputs, plan.metadata) as writer:
        yield writer, None if grafts is None else writer.beside(GRAFTS_FILE, plan.asides, grafts.metadata())
