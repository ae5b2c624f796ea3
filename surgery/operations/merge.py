"""merge: W = W0 + ΣΔW, each weight rounded once; the rest copied as it is.

The plan pairs every tensor of base with what the adapter does to it, and knows the length of everything the receipt
will say. Knows no dialect and no method's mathematics.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from formats.adapter import NOTHING_TOLD, AdapterModule, Replacement, Told
from formats.checkpoint import Checkpoint
from formats.errors import AdapterFormatError
from formats.paths import destination_like, open_checkpoint
from formats.spec import TensorRef, TensorSpec
from surgery import engine
from surgery.correction import correction_workspace
from surgery.engine import Resources
from surgery.errors import AlreadyMerged, NothingToDo
from surgery.methods import check_modules, workspace
from surgery.operations.adapters import (
    AdapterPaths,
    WeighedAdapter,
    adapter_paths,
    open_for_merge,
    replacements,
    weighed_modules,
)
from surgery.operations.merge_ops import Add, Copy, Merge
from surgery.operations.outline import Outline
from surgery.operations.vocabulary import (
    CONFIG,
    companion,
    growth,
    resized_config,
    with_settings,
    without_companion,
)
from surgery.plan import Outcome, Plan, Step, ledger
from surgery.provenance import ORIGINALS_LIMIT, TOOL, UNKNOWN, Original, Receipt, content_digest
from surgery.report import Report, Stopwatch, peak_rss
from surgery.undo import Change, UndoRecord, correction_spec, create_with_undo, undo_destination


@dataclass(frozen=True, kw_only=True)
class MergeReport(Report):
    """What merge did.

    Attributes:
        digest: content address of the output's tensors, the same however they are sharded.
        base_digest: the same of the base.
        adapters: content digest of every adapter, its scalings included, in the order of their addition.
        undo: the undo file, if one was written.
    """

    digest: str
    base_digest: str
    adapters: tuple[str, ...]
    undo: UndoFigures | None = None


@dataclass(frozen=True)
class UndoFigures:
    """An undo file: its path, its bytes, and their share of the bytes of the tensors that merging changed."""

    path: str
    nbytes: int
    share: float


def merge(
    base: str | Path,
    adapters: AdapterPaths,
    out: str | Path,
    *,
    weight: float = 1.0,
    undo: str | Path | None = None,
    told: Told = NOTHING_TOLD,
    untie: bool = False,
    max_shard_size: int | None = None,
    force: bool = False,
    resources: Resources | None = None,
) -> MergeReport:
    """Writes base with one or several adapters added into its weights.

    Args:
        base: a safetensors file or a folder; the output has its shape: a file, or a folder with the same shards,
            config, tokenizer and the rest.
        adapters: a PEFT adapter, as a folder or a single file, or a loralib one, as a file; or (path, weight); or a
            sequence of these, whose order does not matter: all deltas are summed and rounded once.
        out: a folder, or a `.safetensors`/`.st` file.
        weight: a factor of every delta.
        undo: a `.safetensors`/`.st` file to write what unmerge needs to give the base back bit for bit.
        told: alpha and layout of loralib adapters, whose files do not say them.
        untie: give a head that the base ties to its embedding a tensor of its own.
        max_shard_size: bytes of each shard of an output folder, instead of the base's shards.
        force: replace what stands at `out` and at `undo`.
        resources: threads and memory.

    Raises:
        SurgeryError, FormatError: see their trees; whatever the headers and the adapter tell is refused before any
            of the base's payload is read.
    """
    watch = Stopwatch(loading="torch")
    with open_checkpoint(base) as w0:
        opened, outline = open_for_merge(base, adapters, w0.specs, weight, told, untie=untie)
        plan, receipt = plan_merge(w0, opened, outline, undo=undo is not None)
        inputs = (base, *(path for path, _ in adapter_paths(adapters)))
        destination = destination_like(base, out, plan.outputs, inputs=inputs, force=force, max_shard=max_shard_size)
        original = companion(destination, CONFIG)
        config = resized_config(destination, growth(outline.specs.values(), plan.outputs))
        if outline.config and original is not None:
            config = with_settings(config or original.read_bytes(), outline.config, original)
            receipt = replace(receipt, config=original.read_text(encoding="utf-8"))
            plan = replace(plan, metadata=receipt.metadata())
        if config is not None:
            destination = without_companion(destination, CONFIG)
        beside = undo_destination(undo, out, inputs, force) if undo is not None else None
        with create_with_undo(destination, plan, beside) as (writer, corrections):
            if config is not None:
                writer.attach(CONFIG, config)
            outcomes = engine.run(plan, writer, resources, corrections)
            if not any(outcome.figures.get("changed") for outcome in outcomes):
                raise NothingToDo("the merge changes nothing: every delta rounds to zero", where=base)
            receipt = _completed(receipt, outline, outcomes)
            writer.seal(receipt.metadata())
            digest = output_digest(plan, outcomes)
            base_digest = content_digest((spec, receipt.base_tensors[name]) for name, spec in w0.specs.items())
            if corrections is not None:
                changes = _changes(plan, outline, outcomes)
                corrections.seal(UndoRecord(receipt, base_digest, digest, changes).metadata())
    return MergeReport(
        operation="merge",
        output=str(out),
        seconds=watch.seconds,
        peak_rss_bytes=peak_rss(),
        ledger=ledger(outcomes),
        notes=plan.notes,
        digest=digest,
        base_digest=base_digest,
        adapters=receipt.digests,
        undo=_undo_figures(undo, plan) if undo is not None else None,
    )


def plan_merge(
    base: Checkpoint, adapters: Sequence[WeighedAdapter], outline: Outline | None = None, *, undo: bool = False
) -> tuple[Plan, Receipt]:
    """Pairs every tensor of base with what the adapters do to it.

    Args:
        base: the base.
        adapters: opened against the outline's tensors.
        outline: what the base is to become, where that is not the base itself.
        undo: whether to add corrections that lead back, aside.

    Returns:
        The plan, and the receipt with placeholders for what only the run can know.

    Raises:
        AlreadyMerged: the base's receipt names one of the adapters.
        NotMergeable, ShapeMismatch: a method that cannot, a factor that does not fit, two adapters that both replace
            a tensor.
    """
    earlier = Receipt.read(base.metadata, base.ref.path)
    known = {digest for past in (earlier.chain(base.ref.path) if earlier else ()) for digest in past.digests}
    for each in adapters:
        if each.digest in known:
            raise AlreadyMerged(
                "this adapter is already merged into the base",
                where=base.ref.path,
                found=f"a receipt for adapter {each.digest[:16]}, {each.adapter.ref.path}",
                then="to apply it more strongly, merge into the original base with --weight",
            )
    outline = outline or Outline.plain(base.specs)
    surplus, names = outline.surplus, outline.renamed
    by_target = weighed_modules(adapters, lambda name: base.tensor(outline.sources[name]))
    replacing = replacements(adapters)
    added = tuple(full for parts in replacing.values() for full in parts if full.added)
    replaced = {target: parts for target, parts in replacing.items() if target in outline.specs}
    outputs = {name: _replaced_spec(spec, replaced.get(name, ())) for name, spec in outline.specs.items()}
    for target, modules in by_target.items():
        check_modules(modules, outputs[target])
    # A tensor with both a replacement and factors is a saved embedding, as a rule equal to the base's.
    whole = {name: outline.specs[name] for name in replaced if name not in by_target and name not in surplus}
    grown = {name: spec for name, spec in outline.specs.items() if outputs[name] != spec}
    too_large = sum(spec.nbytes for spec in whole.values()) > ORIGINALS_LIMIT
    kept = {} if too_large or grown else whole
    steps = [
        _base_step(
            base.tensor(outline.sources[name]),
            spec,
            by_target.get(name, ()),
            replaced.get(name, ()),
            name in kept,
            undo and name not in surplus,
        )
        for name, spec in outline.specs.items()
    ]
    steps += [
        Step(full.target, (full.source,), (replace(full.source.spec, name=full.target),), Add(full.target))
        for full in added
    ]
    receipt = Receipt(
        operation="merge",
        tool=TOOL,
        adapters=tuple(each.record for each in adapters),
        base_tensors=dict.fromkeys(base.specs, UNKNOWN),
        added=(*(full.target for full in added), *sorted(surplus)),
        originals={names.get(name, name): Original.unknown(spec) for name, spec in kept.items()},
        lost=tuple(names.get(name, name) for name in whole | grown) if too_large or grown else (),
        base_metadata=dict(base.metadata),
        renamed=names,
    )
    notes = []
    if too_large:
        means = "unmerge needs the undo file" if undo else "unmerge will refuse this file"
        notes.append(f"{len(whole)} tensors are replaced and too large for the receipt: {means}")
    for old, new in growth(outline.specs.values(), outputs.values()):
        notes.append(
            f"the vocabulary grows from {old} to {new} in {', '.join(grown)}: put the adapter's tokenizer beside the "
            f"output; {'unmerge needs the undo file' if undo else 'unmerge will refuse it'}"
        )
    if any(each.adapter.replacements and each.strength != 1 for each in adapters):
        notes.append("tensors that an adapter carries in full replace the base's whole, whatever its weight")
    if outline.config:
        said = ", ".join(f"{key} = {json.dumps(value)}" for key, value in outline.config.items())
        notes.append(f"{len(surplus)} tensors more than the base has, for which config.json must say {said}")
    if added:
        notes.append(f"{len(added)} tensors are new to the base")
    return Plan("merge", tuple(steps), receipt.metadata(), tuple(notes)), receipt


def output_hashes(outcomes: tuple[Outcome, ...]) -> dict[str, str]:
    """BLAKE3 of every tensor that was written, as its step took it."""
    hashes: dict[str, str] = {}
    for outcome in outcomes:
        hashes |= outcome.figures.get("hashes", {})
    return hashes


def output_digest(plan: Plan, outcomes: tuple[Outcome, ...]) -> str:
    """The content address of what a plan wrote."""
    hashes = output_hashes(outcomes)
    return content_digest((spec, hashes[spec.name]) for spec in plan.outputs)


def _base_step(
    start: TensorRef,
    spec: TensorSpec,
    modules: tuple[tuple[AdapterModule, float], ...],
    replacements: tuple[Replacement, ...],
    keep: bool,
    undo: bool,
) -> Step:
    inputs = [start, *(full.source for full in replacements)]
    for full in replacements:
        if not spec.dtype.is_weight and full.source.spec.dtype is not spec.dtype:
            raise AdapterFormatError(
                "a replacement has another dtype than the base's tensor",
                where=spec.name,
                expected=spec.dtype,
                found=full.source.spec.dtype,
            )
    if not modules and not replacements:
        return Step(spec.name, tuple(inputs), (spec,), Copy(spec.name))
    factors = [ref for module, _ in modules for _, ref in sorted(module.factors.items())]
    needed = workspace(modules, spec)
    op = Merge(spec.name, spec.dtype, modules, tuple(full.rows for full in replacements), keep, undo)
    asides: tuple[TensorSpec, ...] = ()
    if undo:
        asides = (correction_spec(replace(spec, name=start.name)),)
        needed += 2 * spec.nbytes + correction_workspace(spec.dtype.itemsize)
    outputs = (_replaced_spec(spec, replacements),)
    return Step(spec.name, (*inputs, *factors), outputs, op, needed, asides=asides)


def _replaced_spec(spec: TensorSpec, replacements: Iterable[Replacement]) -> TensorSpec:
    """The base's tensor once replaced: it keeps its dtype and, unless the vocabulary has grown, its shape."""
    for full in replacements:
        if not full.rows:
            spec = replace(spec, shape=full.source.spec.shape)
    return spec


def _changes(plan: Plan, outline: Outline, outcomes: tuple[Outcome, ...]) -> dict[str, Change]:
    """What the undo file records of every tensor that has a correction, or could have had one, by the base's names."""
    hashes = output_hashes(outcomes)
    changes = {}
    for step in plan.steps:
        if step.asides:
            spec, now = outline.specs[step.name], step.outputs[0]
            changes[outline.sources[step.name]] = Change(
                spec.dtype.label, list(spec.shape), list(now.shape), hashes[step.name]
            )
    return changes


def _undo_figures(path: str | Path, plan: Plan) -> UndoFigures:
    nbytes = Path(path).stat().st_size
    changed = sum(step.outputs[0].nbytes for step in plan.steps if step.asides)
    return UndoFigures(str(path), nbytes, nbytes / changed if changed else 0.0)


def _completed(receipt: Receipt, outline: Outline, outcomes: tuple[Outcome, ...]) -> Receipt:
    """The receipt with what the run found out."""
    hashes: dict[str, str] = {}
    originals: dict[str, Original] = {}
    lost: list[str] = []
    for outcome in outcomes:
        hashes |= outcome.figures.get("base", {})
        originals |= outcome.figures.get("original", {})
        lost += outcome.figures.get("lost", ())
    origins, names, surplus = outline.origins, outline.renamed, outline.surplus
    return replace(
        receipt,
        base_tensors={name: hashes[origins[name]] for name in receipt.base_tensors},
        originals={names.get(name, name): original for name, original in originals.items()},
        lost=tuple(names.get(name, name) for name in lost if name not in surplus),
    )
