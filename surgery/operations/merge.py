"""merge: W = W0 + ΣΔW, each weight rounded once; the rest copied as it is.

The plan pairs every tensor of base with what the adapter does to it, and knows the length of everything the receipt
will say. Knows no dialect and no method's mathematics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from formats.adapter import AdapterModule, Replacement
from formats.checkpoint import Checkpoint
from formats.errors import AdapterFormatError
from formats.paths import Destination, destination_like, open_checkpoint
from formats.quantized import refuse_foreign
from formats.spec import DType, TensorSpec
from surgery import engine
from surgery.correction import correction_workspace
from surgery.engine import Resources
from surgery.errors import AlreadyMerged, NothingToDo, NotMergeable
from surgery.methods import additive, check_modules
from surgery.operations.adapters import (
    AdapterPaths,
    WeighedAdapter,
    adapter_paths,
    open_adapters,
    replacements,
    weighed_modules,
)
from surgery.operations.merge_ops import Add, Copy, Merge, Shed
from surgery.operations.scaled_ops import merge_step
from surgery.operations.stored_dtype import Storage, as_numbers, dtype_named, restated_config
from surgery.operations.vocabulary import CONFIG, companion, growth, resized_config, without_companion
from surgery.plan import Outcome, Plan, Step, ledger
from surgery.provenance import ORIGINALS_LIMIT, TOOL, UNKNOWN, Original, Receipt, content_digest
from surgery.report import Report, Stopwatch, peak_rss
from surgery.survival import Surviving, check_surviving
from surgery.undo import Change, UndoRecord, correction_spec, create_with_undo, undo_destination


@dataclass(frozen=True, kw_only=True)
class MergeReport(Report):
    """What merge did.

    Attributes:
        digest: content address of the output's tensors, the same however they are sharded.
        base_digest: the same of the base.
        adapters: content digest of every adapter, its scalings included, in the order of their addition.
        surviving: of every tensor that a delta was added to, how much of the delta is stored; by name.
        undo: the undo file, if one was written.
    """

    digest: str
    base_digest: str
    adapters: tuple[str, ...]
    surviving: Mapping[str, Surviving]
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
    dtype: str | None = None,
    min_surviving: float | None = None,
    undo: str | Path | None = None,
    max_shard_size: int | None = None,
    force: bool = False,
    resources: Resources | None = None,
) -> MergeReport:
    """Writes base with one or several adapters added into its weights.

    Args:
        base: a safetensors file or a folder; the output has its shape: a file, or a folder with the same shards,
            config, tokenizer and the rest.
        adapters: a PEFT adapter, as a folder or a single file; or (path, weight); or a sequence of these, whose order
            does not matter: all deltas are summed and rounded once.
        out: a folder, or a `.safetensors`/`.st` file.
        weight: a factor of every delta.
        dtype: "float32", "float16" or "bfloat16": every weight of the output is stored so, float8 with scales
            dequantised; without it each keeps its own.
        min_surviving: the least ‖stored(W) − W0‖ / ‖ΔW‖ that every merged tensor must have.
        undo: a `.safetensors`/`.st` file to write what unmerge needs to give the base back bit for bit.
        max_shard_size: bytes of each shard of an output folder, instead of the base's shards.
        force: replace what stands at `out` and at `undo`.
        resources: threads and memory.

    Raises:
        VerificationFailed: less than `min_surviving` of a delta survives rounding.
        SurgeryError, FormatError: see their trees; whatever the headers and the adapter tell is refused before any
            of the base's payload is read.
    """
    watch = Stopwatch(loading="torch")
    stored = dtype_named(dtype)
    with open_checkpoint(base) as w0:
        opened = open_adapters(base, adapters, w0.specs, weight)
        plan, receipt = plan_merge(w0, opened, undo=undo is not None, stored=stored)
        inputs = (base, *(path for path, _ in adapter_paths(adapters)))
        destination = destination_like(base, out, plan.outputs, inputs=inputs, force=force, max_shard=max_shard_size)
        original = companion(destination, CONFIG)
        config = _config(destination, plan, w0, stored)
        if config is not None:
            destination = without_companion(destination, CONFIG)
            if stored is not None and original is not None:
                receipt = replace(receipt, config=original.read_bytes().decode())
                plan = replace(plan, metadata=receipt.metadata())
        beside = undo_destination(undo, out, inputs, force) if undo is not None else None
        with create_with_undo(destination, plan, beside) as (writer, corrections):
            if config is not None:
                writer.attach(CONFIG, config)
            outcomes = engine.run(plan, writer, resources, corrections)
            if not any(outcome.figures.get("changed") for outcome in outcomes):
                raise NothingToDo("the merge changes nothing: every delta rounds to zero", where=base)
            surviving = _surviving(outcomes)
            if min_surviving is not None:
                check_surviving(surviving, min_surviving)
            receipt = _completed(receipt, outcomes)
            writer.seal(receipt.metadata())
            digest = output_digest(plan, outcomes)
            base_digest = content_digest((spec, receipt.base_tensors[name]) for name, spec in w0.specs.items())
            if corrections is not None:
                changes = _changes(w0, plan, outcomes)
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
        surviving=surviving,
        undo=_undo_figures(undo, plan) if undo is not None else None,
    )


def _config(destination: Destination, plan: Plan, base: Checkpoint, stored: DType | None) -> bytes | None:
    """The output's config.json, where it is not the base's: another vocabulary, another dtype."""
    config, source = (
        resized_config(destination, growth(base.specs.values(), plan.outputs)),
        companion(destination, CONFIG),
    )
    if stored is None or source is None:
        return config
    return restated_config(config or source.read_bytes(), stored, source)


def _surviving(outcomes: tuple[Outcome, ...]) -> dict[str, Surviving]:
    """What of every tensor's delta is stored."""
    found: dict[str, Surviving] = {}
    for outcome in outcomes:
        found |= outcome.figures.get("surviving", {})
    return found


def plan_merge(
    base: Checkpoint, adapters: Sequence[WeighedAdapter], *, undo: bool = False, stored: DType | None = None
) -> tuple[Plan, Receipt]:
    """Pairs every tensor of base with what the adapters do to it; `undo` adds corrections that lead back, aside, and
    `stored` is the dtype of every weight of the result, where they do not keep their own.

    Returns:
        The plan, and the receipt with placeholders for what only the run can know.

    Raises:
        AlreadyMerged: the base's receipt names one of the adapters.
        Quantised: weights in a form that nothing can be added to, or float8 without its scales.
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
    by_target = weighed_modules(adapters)
    replacing = replacements(adapters)
    added = tuple(full for parts in replacing.values() for full in parts if full.added)
    replaced = {target: parts for target, parts in replacing.items() if target in base.specs}
    storage = Storage.of(base, stored)
    refuse_foreign(storage.foreign, (*by_target, *replaced), base.ref.path)
    outputs = {name: _replaced_spec(spec, replaced.get(name, ())) for name, spec in base.specs.items()}
    for target, modules in by_target.items():
        check_modules(modules, as_numbers(outputs[target]))
    dequantised = {} if stored is None else dict(storage.scaled)
    in_scales = dequantised | {name: how for name, how in storage.scaled.items() if name in by_target}
    for name in sorted({*storage.scaled, *storage.scales} & set(replaced)):
        raise NotMergeable(
            "an adapter carries a tensor in full that the base stores as float8 with scales",
            where=name,
            then="dequantise the base first, or merge an adapter without that tensor",
        )
    # A tensor with both a replacement and factors is a saved embedding, as a rule equal to the base's.
    whole = {name: base.specs[name] for name in replaced if name not in by_target}
    grown = {name: spec for name, spec in base.specs.items() if outputs[name].shape != spec.shape}
    too_large = sum(spec.nbytes for spec in whole.values()) > ORIGINALS_LIMIT
    kept = {} if too_large or grown else whole
    with_weights = {how.scale.name for how in in_scales.values()}
    steps = []
    for name, spec in base.specs.items():
        if name in in_scales:
            pair = (base.tensor(name), base.tensor(in_scales[name].scale.name))
            steps.append(merge_step(in_scales[name], pair, by_target.get(name, ()), stored, undo))
        elif name in storage.shed:
            asides = (correction_spec(spec),) if undo else ()
            steps.append(Step(name, (base.tensor(name),), (), Shed(name, undo), 4 * spec.nbytes, asides=asides))
        elif name not in with_weights:
            kind = storage.result(spec).dtype
            parts = (by_target.get(name, ()), replaced.get(name, ()))
            steps.append(_base_step(base, spec, kind, *parts, name in kept, undo))
    for full in added:
        new = storage.result(replace(full.source.spec, name=full.target))
        steps.append(Step(full.target, (full.source,), (new,), Add(full.target, new.dtype)))
    receipt = Receipt(
        operation="merge",
        tool=TOOL,
        adapters=tuple(each.record for each in adapters),
        base_tensors=dict.fromkeys(base.specs, UNKNOWN),
        added=tuple(full.target for full in added),
        originals={name: Original.unknown(spec) for name, spec in kept.items()},
        lost=tuple(whole | grown) if too_large or grown else (),
        base_metadata=dict(base.metadata),
        dtype=stored.label if stored is not None else "",
        dtypes={step.name: base.specs[step.name].dtype.label for step in steps if _converts(base, step)},
        scaled={name: (how.scale.name, *how.block) for name, how in in_scales.items()},
    )
    notes = []
    if too_large:
        means = "unmerge needs the undo file" if undo else "unmerge will refuse this file"
        notes.append(f"{len(whole)} tensors are replaced and too large for the receipt: {means}")
    for before, after in growth(base.specs.values(), outputs.values()):
        notes.append(
            f"the vocabulary grows from {before} to {after} in {', '.join(grown)}: put the adapter's tokenizer beside "
            f"the output; {'unmerge needs the undo file' if undo else 'unmerge will refuse it'}"
        )
    if any(each.adapter.replacements and each.strength != 1 for each in adapters):
        notes.append("tensors that an adapter carries in full replace the base's whole, whatever its weight")
    if dequantised:
        means = "unmerge needs the undo file" if undo else "unmerge will refuse this file"
        notes.append(f"{len(dequantised)} float8 weights are dequantised, their scales dropped: {means}")
    if added:
        notes.append(f"{len(added)} tensors are new to the base")
    return Plan("merge", tuple(steps), receipt.metadata(), tuple(notes)), receipt


def output_hashes(outcomes: tuple[Outcome, ...]) -> dict[str, str]:
    """SHA-256 of every tensor that was written, as its step took it."""
    hashes: dict[str, str] = {}
    for outcome in outcomes:
        hashes |= outcome.figures.get("hashes", {})
    return hashes


def output_digest(plan: Plan, outcomes: tuple[Outcome, ...]) -> str:
    """The content address of what a plan wrote."""
    hashes = output_hashes(outcomes)
    return content_digest((spec, hashes[spec.name]) for spec in plan.outputs)


def _base_step(
    base: Checkpoint,
    spec: TensorSpec,
    stored: DType,
    modules: tuple[tuple[AdapterModule, float], ...],
    replacements: tuple[Replacement, ...],
    keep: bool,
    undo: bool,
) -> Step:
    inputs = [base.tensor(spec.name), *(full.source for full in replacements)]
    for full in replacements:
        if not spec.dtype.is_weight and full.source.spec.dtype is not spec.dtype:
            raise AdapterFormatError(
                "a replacement has another dtype than the base's tensor",
                where=spec.name,
                expected=spec.dtype,
                found=full.source.spec.dtype,
            )
    if not modules and not replacements and stored is spec.dtype:
        return Step(spec.name, tuple(inputs), (spec,), Copy(spec.name))
    factors, workspace = [], 0
    for module, _ in modules:
        factors += [ref for _, ref in sorted(module.factors.items())]
        workspace += sum(8 * ref.spec.size for ref in module.factors.values())
    if not all(additive(module) for module, _ in modules):
        workspace += 8 * spec.size  # the result in float64
    op = Merge(spec.name, stored, modules, tuple(full.rows for full in replacements), keep, undo)
    asides: tuple[TensorSpec, ...] = ()
    if undo:
        asides = (correction_spec(spec),)
        workspace += 2 * spec.nbytes + correction_workspace(spec.dtype.itemsize)
    outputs = (replace(_replaced_spec(spec, replacements), dtype=stored),)
    return Step(spec.name, (*inputs, *factors), outputs, op, workspace + (4 << 20), asides=asides)


def _converts(base: Checkpoint, step: Step) -> bool:
    """Whether a step stores a tensor of base in another dtype."""
    own = base.specs.get(step.name)
    return own is not None and bool(step.outputs) and step.outputs[0].dtype is not own.dtype


def _replaced_spec(spec: TensorSpec, replacements: Iterable[Replacement]) -> TensorSpec:
    """The base's tensor once replaced: it keeps its dtype and, unless the vocabulary has grown, its shape."""
    for full in replacements:
        if not full.rows:
            spec = replace(spec, shape=full.source.spec.shape)
    return spec


def _changes(base: Checkpoint, plan: Plan, outcomes: tuple[Outcome, ...]) -> dict[str, Change]:
    """What the undo file records of every tensor that has a correction, or could have had one."""
    hashes = output_hashes(outcomes)
    changes = {}
    for step in plan.steps:
        now = {spec.name: spec for spec in step.outputs}
        for aside in step.asides:
            spec, result = base.specs[aside.name], now.get(aside.name)
            changes[aside.name] = Change(
                spec.dtype.label,
                list(spec.shape),
                None if result is None else list(result.shape),
                "" if result is None else hashes[aside.name],
                None if result is None or result.dtype is spec.dtype else result.dtype.label,
            )
    return changes


def _undo_figures(path: str | Path, plan: Plan) -> UndoFigures:
    nbytes = Path(path).stat().st_size
    changed = sum(spec.nbytes for step in plan.steps if step.asides for spec in step.outputs)
    return UndoFigures(str(path), nbytes, nbytes / changed if changed else 0.0)


def _completed(receipt: Receipt, outcomes: tuple[Outcome, ...]) -> Receipt:
    """The receipt with what the run found out."""
    hashes: dict[str, str] = {}
    originals: dict[str, Original] = {}
    lost: list[str] = []
    for outcome in outcomes:
        hashes |= outcome.figures.get("base", {})
        originals |= outcome.figures.get("original", {})
        lost += outcome.figures.get("lost", ())
    base_tensors = {name: hashes[name] for name in receipt.base_tensors}
    return replace(receipt, base_tensors=base_tensors, originals=originals, lost=tuple(lost))
