"""merge: W = W0 + ΣΔW, each weight rounded once; the rest copied as it is.

The plan pairs every tensor of base with what the adapter does to it, and knows the length of everything the receipt
will say. Knows no dialect and no method's mathematics.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formats.adapter import Adapter, AdapterModule, Replacement
from formats.checkpoint import Checkpoint
from formats.errors import AdapterFormatError
from formats.paths import create_checkpoint, destination_like, open_checkpoint
from formats.spec import DType, TensorSpec
from formats.tensors import torch_dtype
from surgery import engine
from surgery.checks import check_finite, is_finite
from surgery.engine import Resources
from surgery.errors import AlreadyMerged, NotFinite, NothingToDo
from surgery.methods import additive, check_modules, transforming
from surgery.operations.model_names import open_adapter_of
from surgery.operations.vocabulary import CONFIG, growth, resized_config, without_companion
from surgery.plan import Fate, Outcome, Plan, Step, ledger
from surgery.provenance import (
    ORIGINALS_LIMIT,
    TOOL,
    UNKNOWN,
    Original,
    Receipt,
    content_digest,
    fingerprint,
    tensor_hash,
)
from surgery.report import Report, Stopwatch, peak_rss
from surgery.rounding import add_rounded, round_once

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class MergeReport(Report):
    """What merge did.

    Attributes:
        digest: content address of the output's tensors, the same however they are sharded.
        base_digest: the same of the base.
        adapter: content digest of the adapter, its scalings included.
    """

    digest: str
    base_digest: str
    adapter: str


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    weight: float = 1.0,
    force: bool = False,
    resources: Resources | None = None,
) -> MergeReport:
    """Writes base with the adapter added into its weights.

    Args:
        base: a safetensors file or a folder; the output has its shape: a file, or a folder with the same shards,
            config, tokenizer and the rest.
        adapter: a PEFT adapter, as a folder or a single file.
        out: a folder, or a `.safetensors`/`.st` file.
        weight: a factor of the whole delta.
        force: replace what stands at `out`.
        resources: threads and memory.

    Raises:
        SurgeryError, FormatError: see their trees; whatever the headers and the adapter tell is refused before any
            of the base's payload is read.
    """
    watch = Stopwatch(loading="torch")
    with open_checkpoint(base) as w0:
        delta = open_adapter_of(base, adapter, w0.specs)
        plan, receipt = plan_merge(w0, delta, weight=weight)
        destination = destination_like(base, out, plan.outputs, inputs=(base, adapter), force=force)
        config = resized_config(destination, growth(w0.specs.values(), plan.outputs))
        if config is not None:
            destination = without_companion(destination, CONFIG)
        with create_checkpoint(destination, plan.outputs, plan.metadata) as writer:
            if config is not None:
                writer.attach(CONFIG, config)
            outcomes = engine.run(plan, writer, resources)
            if not any(outcome.figures.get("changed") for outcome in outcomes):
                raise NothingToDo("the merge changes nothing: every delta rounds to zero", where=adapter)
            receipt = _completed(receipt, outcomes)
            writer.seal(receipt.metadata())
    return MergeReport(
        operation="merge",
        output=str(out),
        seconds=watch.seconds,
        peak_rss_bytes=peak_rss(),
        ledger=ledger(outcomes),
        notes=plan.notes,
        digest=output_digest(plan, outcomes),
        base_digest=content_digest((spec, receipt.base_tensors[name]) for name, spec in w0.specs.items()),
        adapter=receipt.adapter,
    )


def plan_merge(base: Checkpoint, adapter: Adapter, *, weight: float = 1.0) -> tuple[Plan, Receipt]:
    """Pairs every tensor of base with what the adapter does to it.

    Returns:
        The plan, and the receipt with placeholders for what only the run can know.

    Raises:
        AlreadyMerged: the base's receipt names this adapter.
        NotMergeable, ShapeMismatch: a method that cannot, a factor that does not fit.
        NotFinite: NaN or Inf in the adapter.
        NothingToDo: an adapter without tensors, or a weight of 0.
    """
    if not adapter.tensors or weight == 0:
        raise NothingToDo("the merge would change nothing", where=adapter.ref.path, found=f"weight {weight}")
    digest, hashes = fingerprint(adapter)
    earlier = Receipt.read(base.metadata, base.ref.path)
    if earlier and any(digest == past.adapter for past in earlier.chain(base.ref.path)):
        raise AlreadyMerged(
            "this adapter is already merged into the base",
            where=base.ref.path,
            found=f"a receipt for adapter {digest[:16]}",
            then="to apply it more strongly, merge into the original base with --weight",
        )
    by_target: dict[str, list[AdapterModule]] = {}
    for module in adapter.modules:
        by_target.setdefault(module.target, []).append(module)
    replaced: dict[str, list[Replacement]] = {}
    for full in sorted(adapter.replacements, key=lambda full: bool(full.rows)):  # whole tensors before rows of them
        if not full.added:
            replaced.setdefault(full.target, []).append(full)
    outputs = {name: _replaced_spec(spec, replaced.get(name, ())) for name, spec in base.specs.items()}
    for target, modules in by_target.items():
        check_modules(modules, outputs[target], weight)
    # A tensor with both a replacement and factors is a saved embedding, as a rule equal to the base's.
    whole = {name: base.specs[name] for name in replaced if name not in by_target}
    grown = {name: spec for name, spec in base.specs.items() if outputs[name] != spec}
    too_large = sum(spec.nbytes for spec in whole.values()) > ORIGINALS_LIMIT
    kept = {} if too_large or grown else whole
    steps = [
        _base_step(base, spec, tuple(by_target.get(name, ())), tuple(replaced.get(name, ())), name in kept, weight)
        for name, spec in base.specs.items()
    ]
    added = tuple(full for full in adapter.replacements if full.added)
    steps += [
        Step(full.target, (full.source,), (replace(full.source.spec, name=full.target),), Add(full.target))
        for full in added
    ]
    receipt = Receipt(
        operation="merge",
        tool=TOOL,
        adapter=digest,
        weight=weight,
        adapter_tensors=hashes,
        base_tensors=dict.fromkeys(base.specs, UNKNOWN),
        added=tuple(full.target for full in added),
        originals={name: Original.unknown(spec) for name, spec in kept.items()},
        lost=tuple(whole | grown) if too_large or grown else (),
        base_metadata=dict(base.metadata),
    )
    notes = []
    if too_large:
        notes.append(f"{len(whole)} tensors are replaced and too large for the receipt: unmerge will refuse this file")
    for old, new in growth(base.specs.values(), outputs.values()):
        notes.append(
            f"the vocabulary grows from {old} to {new} in {', '.join(grown)}: put the adapter's tokenizer beside the "
            "output; unmerge will refuse it"
        )
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
    modules: tuple[AdapterModule, ...],
    replacements: tuple[Replacement, ...],
    keep: bool,
    weight: float,
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
    if not modules and not replacements:
        return Step(spec.name, tuple(inputs), (spec,), Copy(spec.name))
    factors, workspace = [], 0
    for module in modules:
        factors += [ref for _, ref in sorted(module.factors.items())]
        workspace += sum(8 * ref.spec.size for ref in module.factors.values())
    op = Merge(spec.name, spec.dtype, modules, tuple(full.rows for full in replacements), keep, weight)
    return Step(spec.name, (*inputs, *factors), (_replaced_spec(spec, replacements),), op, workspace + (4 << 20))


def _replaced_spec(spec: TensorSpec, replacements: Iterable[Replacement]) -> TensorSpec:
    """The base's tensor once replaced: it keeps its dtype and, unless the vocabulary has grown, its shape."""
    for full in replacements:
        if not full.rows:
            spec = replace(spec, shape=full.source.spec.shape)
    return spec


@dataclass(frozen=True)
class Copy:
    """A tensor taken over byte for byte."""

    name: str

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Hashes and passes on."""
        digest = tensor_hash(inputs[0])
        figures = {"base": {self.name: digest}, "hashes": {self.name: digest}}
        return Outcome((inputs[0],), {self.name: Fate.COPIED}, figures)


@dataclass(frozen=True)
class Add:
    """A tensor that only the adapter has."""

    name: str

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Hashes and passes on."""
        figures = {"hashes": {self.name: tensor_hash(inputs[0])}, "changed": True}
        return Outcome((inputs[0],), {self.name: Fate.FULL}, figures)


@dataclass(frozen=True)
class Merge:
    """W0, or what replaces it, plus the deltas of its modules; `keep` puts the base's tensor into the receipt.

    Inputs: the base's tensor, then what replaces it or, where `replaced` has any, these rows of it, then each module's
    factors in order of their roles. Output: the tensor in the base's dtype.
    """

    name: str
    dtype: DType
    modules: tuple[AdapterModule, ...]
    replaced: tuple[tuple[int, ...], ...]
    keep: bool
    weight: float

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Adds, rounds once, hashes both ends."""
        base = inputs[0]
        start = base
        for rows, source in zip(self.replaced, inputs[1:], strict=False):  # the factors come after
            start = _with_rows(start, rows, source, self.dtype) if rows else source
        if self.modules:
            result = apply_modules(start, self.modules, inputs[1 + len(self.replaced) :], self.weight, self.dtype)
        else:
            result = start if start.dtype == base.dtype else _as_stored(start, self.dtype)
        _check_result(result, start, self.name)
        before, after = tensor_hash(base), tensor_hash(result)
        figures: dict[str, Any] = {"base": {self.name: before}, "hashes": {self.name: after}}
        figures["changed"] = before != after
        if self.keep:
            figures["original"] = {self.name: Original.of(base, TensorSpec(self.name, self.dtype, tuple(base.shape)))}
        elif self.replaced and (not self.modules or tensor_hash(_as_stored(start, self.dtype)) != before):
            figures["lost"] = [self.name]
        fate = Fate.MERGED if self.modules else Fate.FULL
        return Outcome((result,), {self.name: fate}, figures)


def apply_modules(
    start: torch.Tensor,
    modules: tuple[AdapterModule, ...],
    factors: tuple[torch.Tensor, ...],
    weight: float,
    dtype: DType,
) -> torch.Tensor:
    """start + weight · ΣΔW, or what a method makes of start, rounded once to `dtype`; a negative weight takes the
    deltas off.

    Args:
        start: the stored weight.
        modules: what adapts it; deltas, or one that is none and that a negative weight undoes.
        factors: each module's factors in order of their roles.
        weight: of all deltas.
        dtype: of the result.
    """
    remaining = list(factors)
    deltas = []
    for module in modules:
        named = {role: remaining.pop(0) for role in sorted(module.factors)}
        if method := transforming(module):
            return method.transform(module, start, named, dtype, back=weight < 0)
        if adding := additive(module):
            deltas.append(adding.delta(module, named, weight))
    return add_rounded(start, deltas, dtype)


def _with_rows(tensor: torch.Tensor, rows: tuple[int, ...], source: torch.Tensor, dtype: DType) -> torch.Tensor:
    """A copy of the tensor in `dtype` with some rows replaced by those of source."""
    tensor = _as_stored(tensor, dtype).clone()
    tensor[list(rows)] = _as_stored(source, dtype)
    return tensor


def _as_stored(tensor: torch.Tensor, dtype: DType) -> torch.Tensor:
    import torch

    return tensor if tensor.dtype == torch_dtype(dtype) else round_once(tensor.to(torch.float64), dtype)


def _check_result(result: torch.Tensor, start: torch.Tensor, name: str) -> None:
    if result.is_floating_point() and not is_finite(result):
        check_finite(start, name)
        raise NotFinite(
            "the merged weight exceeds the range of its stored dtype",
            where=name,
            found=result.dtype,
            then="merge into a base stored as bfloat16 or float32",
        )


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
