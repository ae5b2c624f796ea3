"""fold: an adapter into a model's weights as far as that is exact; what must stay in the graph goes along, described.

An adapter that is a change of weights (LoRA, (IA)³, VeRA …) is merged, by merge. `fold_plan` plans the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from formats.adapter import NOTHING_TOLD, Told
from formats.checkpoint import Checkpoint
from formats.destination import create_checkpoint, destination_like
from formats.dialects import dialect_named
from formats.dialects.adapterhub_beside import Part
from formats.dialects.bottleneck import Bottlenecks
from formats.errors import FormatError
from formats.grafts import GRAFTS_FILE
from formats.layers import owner
from formats.paths import open_checkpoint
from surgery.errors import NothingToDo, Unsupported, VerificationFailed
from surgery.hashes import content_digest
from surgery.model.config import CONFIG, companion, model_config, with_settings, without_companion
from surgery.operations.fold.calibrate import Approximation, calibrate
from surgery.operations.fold.open import fingerprint_beside, open_parts
from surgery.operations.fold.plan import Folding, plan_fold
from surgery.operations.fold.verdicts import IN_FULL, REPLACED, Base, Verdict, Way, judge, verdicts_beside
from surgery.operations.merge.adapters import open_for_merge
from surgery.operations.merge.merge import MergeReport, merge, output_digest
from surgery.pipeline import engine
from surgery.pipeline.engine import Resources
from surgery.pipeline.plan import Outcome, no_fates
from surgery.report import Report, Stopwatch, peak_rss

_NODES = (Way.HALF, Way.GRAPH)


@dataclass(frozen=True, kw_only=True)
class FoldReport(Report):
    """What fold did.

    Attributes:
        verdicts: what became of every part of the adapter, and why.
        digest: content address of the output's tensors, grafts apart.
        base_digest: the same of the model.
        adapter: content digest of the adapter.
        grafts: the file that describes what must stay in the graph; None where nothing must.
        settings: what config.json says anew.
        approximation: how near what stands for non-linearities is to them; None where nothing does.
    """

    verdicts: tuple[Verdict, ...]
    digest: str
    base_digest: str
    adapter: str
    grafts: str | None = None
    settings: Mapping[str, Any]
    approximation: Approximation | None = None


def fold(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    told: Told = NOTHING_TOLD,
    calibration: str | Path | None = None,
    max_error: float | None = None,
    force: bool = False,
    resources: Resources | None = None,
) -> FoldReport:
    """Writes a model with an adapter folded into its weights, exactly; and beside it what cannot be.

    Args:
        model: a safetensors file or a folder.
        adapter: AdapterHub's bottlenecks, compacters, prefixes, prompts, or a union of these; peft's prompts and
            prefixes; or whatever merge takes.
        out: a folder, or a `.safetensors`/`.st` file where nothing must stay in the graph.
        told: as for merge.
        calibration: a safetensors file of input_ids (rows, length), and attention_mask where rows are padded, or of
            pixel_values: fold not only what is exact, but also bottlenecks whose f an affine map, the nearest on these
            rows, stands for.
        max_error: the largest ‖error‖ / ‖output‖ of the model, on rows held out, that this may cost.
        force: replace what stands at `out`.
        resources: threads and memory.

    Raises:
        VerificationFailed: the error is larger than `max_error`.
        NotMergeable: what no weight and no added node can express, with the reason.
        SurgeryError, FormatError: see their trees; whatever the headers tell is refused before any work.
    """
    watch = Stopwatch(loading="torch")
    with open_checkpoint(model) as base:
        parts = open_parts(model, adapter, base)
        if parts is None:
            if calibration is not None:
                raise nothing_to_approximate(adapter)
            verdicts = merged_verdicts(model, adapter, base, told)
            return _merged(merge(model, adapter, out, told=told, force=force, resources=resources), verdicts)
        record = fingerprint_beside(adapter)
        config, approximation = model_config(model), None
        folding = plan_fold(base, config, parts, record)
        inputs: tuple[Path, ...] = (Path(model), Path(adapter))
        if calibration is not None:
            inputs = (*inputs, Path(calibration))
            chosen = _approximable(base, config, parts, folding)
            instead, approximation = calibrate(model, base, folding.judged, chosen, calibration)
            _check_error(approximation, max_error, calibration)
            folding = plan_fold(base, config, parts, record, instead)
        outcomes = _run(folding, inputs, out, force=force, resources=resources)
        before = _found(outcomes, "base")
        base_digest = content_digest((spec, before[name]) for name, spec in base.specs.items())
    fates = {name: fate for outcome in outcomes for name, fate in outcome.fates.items()}
    return FoldReport(
        operation="fold",
        output=str(out),
        seconds=watch.seconds,
        peak_rss_bytes=peak_rss(),
        ledger=no_fates() | Counter(fate.value for fate in fates.values()),
        notes=folding.plan.notes,
        verdicts=folding.verdicts,
        digest=output_digest(folding.plan, outcomes),
        base_digest=base_digest,
        adapter=record.digest,
        grafts=None if folding.grafts is None else str(Path(out) / GRAFTS_FILE),
        settings=folding.settings,
        approximation=approximation,
    )


def _approximable(
    base: Checkpoint, config: Mapping[str, Any], parts: Sequence[Part], folding: Folding
) -> frozenset[str]:
    """The projections before the bottlenecks that would fold if they were linear.

    Raises:
        NothingToDo: there are none.
        Unsupported: the adapter has a prefix or a prompt too, with which calibration does not run the model.
    """
    where = parts[0].ref.path
    nodes = {each.one.behind for _, each in folding.judged if each.verdict.way in _NODES}
    if not nodes:
        raise nothing_to_approximate(where)
    if not all(isinstance(part, Bottlenecks) for part in parts):
        raise Unsupported("calibration runs the model with bottlenecks, not with a prefix or a prompt", where=where)
    known = Base(base.specs, config)
    linear = [each for part in parts if isinstance(part, Bottlenecks) for each in judge(part, known, nodes)]
    chosen = frozenset(
        each.one.behind for each in linear if each.one.behind in nodes and each.verdict.way not in _NODES
    )
    if not chosen:
        raise nothing_to_approximate(where)
    return chosen


def nothing_to_approximate(where: object) -> NothingToDo:
    """What is raised where --approximate changes nothing."""
    return NothingToDo(
        "no bottleneck would fold if its non-linearity were affine",
        where=where,
        then="leave --approximate out: --dry-run says what folds exactly, and why the rest does not",
    )


def _check_error(found: Approximation, most: float | None, calibration: str | Path) -> None:
    if most is not None and not found.output <= most:
        worst = max(found.modules, key=lambda name: found.modules[name])
        raise VerificationFailed(
            "the approximate fold errs more than it may",
            where=calibration,
            expected=f"‖error‖/‖output‖ ≤ {most} on {found.held_out} rows held out",
            found=f"{found.output:.3g}; the worst bottleneck, {worst}, errs by {found.modules[worst]:.3g}",
            then="leave the non-linearities in the graph: fold without --approximate",
        )


def verdicts(model: str | Path, adapter: str | Path, told: Told = NOTHING_TOLD) -> tuple[Verdict, ...]:
    """What would become of every part of an adapter. Arguments and errors are those of `fold`."""
    with open_checkpoint(model) as base:
        parts = open_parts(model, adapter, base)
        if parts is None:
            return merged_verdicts(model, adapter, base, told)
        return plan_fold(base, model_config(model), parts, fingerprint_beside(adapter)).verdicts


def merged_verdicts(model: str | Path, adapter: str | Path, base: Checkpoint, told: Told) -> tuple[Verdict, ...]:
    """Those on an adapter that is a change of weights. Raises as merge does."""
    found = []
    for each in open_for_merge(model, adapter, base.specs, told=told)[0]:
        for module in each.adapter.modules:
            found.append(Verdict(owner(module.target), module.method, Way.FOLDED, "a change of the weight: merged"))
        for full in each.adapter.replacements:
            found.append(Verdict(owner(full.target), IN_FULL, Way.FOLDED, REPLACED))
        dialect, path = dialect_named(each.adapter.dialect), Path(adapter)
        if dialect.has_head(path) and (head := dialect.head(path, base.specs, model_config(model))):
            found += [one for one in verdicts_beside(head) if one.way is Way.LEFT]
    return tuple(found)


def _merged(report: MergeReport, verdicts: tuple[Verdict, ...]) -> FoldReport:
    return FoldReport(
        operation="fold",
        output=report.output,
        seconds=report.seconds,
        peak_rss_bytes=report.peak_rss_bytes,
        ledger=report.ledger,
        notes=report.notes,
        verdicts=verdicts,
        digest=report.digest,
        base_digest=report.base_digest,
        adapter=report.adapters[0],
        settings={},
    )


def _run(
    folding: Folding, inputs: tuple[Path, ...], out: str | Path, *, force: bool, resources: Resources | None
) -> tuple[Outcome, ...]:
    """Runs the plan into the output and what lies beside it."""
    plan, grafts, receipt = folding.plan, folding.grafts, folding.receipt
    destination = destination_like(inputs[0], out, plan.outputs, inputs=inputs, force=force)
    if grafts is not None and not destination.is_folder:
        raise FormatError(
            "parts of the adapter must stay in the graph, and a single file has no room for them beside it",
            where=out,
            expected="a folder",
            then="name a folder with -o; --dry-run says which parts, and why",
        )
    source, config = companion(destination, CONFIG), None
    if folding.settings and source is not None:
        config = with_settings(source.read_bytes(), folding.settings, source)
        destination = without_companion(destination, CONFIG)
    with create_checkpoint(destination, plan.outputs, plan.metadata) as writer:
        if config is not None:
            writer.attach(CONFIG, config)
        beside = None if grafts is None else writer.beside(GRAFTS_FILE, plan.asides, grafts.metadata())
        outcomes = engine.run(plan, writer, resources, beside)
        if grafts is None and not any(outcome.figures.get("changed") for outcome in outcomes):
            raise NothingToDo("the fold changes nothing: all of the adapter rounds to zero", where=inputs[1])
        if receipt is not None:
            writer.seal(replace(receipt, base_tensors=_found(outcomes, "base")).metadata())
        if grafts is not None and beside is not None:
            beside.seal(replace(grafts, model=output_digest(plan, outcomes)).metadata())
    return outcomes


def _found(outcomes: tuple[Outcome, ...], figure: str) -> dict[str, str]:
    """What the steps say of the tensors, by name."""
    return {name: value for outcome in outcomes for name, value in outcome.figures.get(figure, {}).items()}
