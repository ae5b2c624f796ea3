"""The plan of a merge: pairs every tensor of the base with its changes, and drafts the receipt.

Reads headers only, and knows the final length of the receipt. Knows no dialect and no method's
mathematics.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from formats.adapter import AdapterModule, Replacement
from formats.checkpoint import Checkpoint
from formats.errors import AdapterFormatError
from formats.quantized import Scaled, refuse_foreign
from formats.spec import DType, TensorSpec
from surgery.errors import AlreadyMerged, NotMergeable, Unsupported
from surgery.exact.correction import correction_workspace
from surgery.methods import additive, check_modules, workspace
from surgery.model.base_model import BaseModel
from surgery.model.config import growth
from surgery.model.outline import Outline
from surgery.model.stored_dtype import Storage, as_numbers
from surgery.operations.merge.adapters import WeighedAdapter, replacements, weighed_modules
from surgery.operations.merge.float8 import merge_step
from surgery.operations.merge.ops import Add, Merge, Shed
from surgery.operations.merge.rows import MergeRows, piece_workspace
from surgery.pipeline.ops import Copy
from surgery.pipeline.plan import Plan, Step
from surgery.receipts.receipt import ORIGINALS_LIMIT, TOOL, UNKNOWN, Original, Receipt
from surgery.receipts.undo_file import correction_spec

Modules = tuple[tuple[AdapterModule, float], ...]


def plan_merge(
    base: BaseModel,
    adapters: Sequence[WeighedAdapter],
    outline: Outline | None = None,
    *,
    undo: bool = False,
    stored: DType | None = None,
) -> tuple[Plan, Receipt]:
    """Pairs every tensor of base with the changes that the adapters make to it.

    Args:
        base: the base.
        adapters: opened against the outline's tensors.
        outline: the tensors of the result before merging; by default those in the base.
        undo: whether steps also write corrections for an undo file.
        stored: the dtype of every weight of the result; None keeps each weight's dtype.

    Returns:
        The plan, and the receipt with placeholders for values that only the run can know.

    Raises:
        AlreadyMerged: the base's receipt names one of the adapters.
        Quantised: weights are in a form to which nothing can be added, or in float8 without their scales.
        NotMergeable, ShapeMismatch: a method cannot be merged, a factor does not fit, or two adapters replace the same
            tensor.
        Unsupported: layers to be repeated are float8 with scales.
    """
    refuse_merged(base.checkpoint, {each.digest: each.adapter.ref.path for each in adapters})
    storage = Storage.of(base.checkpoint, base.quantization, stored)
    work = _Work.of(base.checkpoint, adapters, outline or Outline.plain(base.specs), storage, undo)
    receipt = work.receipt(adapters)
    return Plan("merge", tuple(work.steps()), receipt.metadata(), tuple(work.notes(adapters))), receipt


def refuse_merged(base: Checkpoint, adapters: Mapping[str, str]) -> None:
    """Raises AlreadyMerged if a receipt of the base names one of the adapters, given as paths by digest."""
    earlier = Receipt.read(base.metadata, base.ref.path)
    known = {digest for past in (earlier.chain(base.ref.path) if earlier else ()) for digest in past.digests}
    for digest, path in adapters.items():
        if digest in known:
            raise AlreadyMerged(
                "this adapter is already merged into the base",
                where=base.ref.path,
                found=f"a receipt for adapter {digest[:16]}, {path}",
                then="to apply it more strongly, merge into the original base with --weight",
            )


@dataclass(frozen=True)
class _Work:
    """The work of a merge, by the outline's names.

    Attributes:
        modules: the modules that adapt each tensor.
        replaced: the tensors that replace each tensor or some of its rows.
        added: tensors that only an adapter has.
        results: the spec of each merged tensor, except for its dtype.
        in_scales: float8 weights that share a step with their scales.
    """

    base: Checkpoint
    outline: Outline
    storage: Storage
    undo: bool
    modules: Mapping[str, Modules]
    replaced: Mapping[str, tuple[Replacement, ...]]
    added: tuple[Replacement, ...]
    results: Mapping[str, TensorSpec]
    in_scales: Mapping[str, Scaled]

    @classmethod
    def of(
        cls, base: Checkpoint, adapters: Sequence[WeighedAdapter], outline: Outline, storage: Storage, undo: bool
    ) -> _Work:
        """Pairs and checks. Raises as `plan_merge`."""
        modules = weighed_modules(adapters, lambda name: base.tensor(outline.sources[name]))
        replacing = replacements(adapters)
        replaced = {target: parts for target, parts in replacing.items() if target in outline.specs}
        refuse_foreign(storage.foreign, (*modules, *replaced), base.ref.path)
        results = {name: _replaced_spec(spec, replaced.get(name, ())) for name, spec in outline.specs.items()}
        for target, adapting in modules.items():
            check_modules(adapting, as_numbers(results[target]))
        with_scales = {*storage.scaled, *storage.scales}
        for name in sorted(with_scales & set(replaced)):
            raise NotMergeable(
                "the base stores a tensor that an adapter replaces in full as float8 with scales",
                where=name,
                then="dequantise the base first, or merge an adapter without that tensor",
            )
        for name, source in outline.sources.items():
            if source in with_scales and name != source:
                raise Unsupported(
                    "layers of float8 weights with scales cannot be repeated",
                    where=name,
                    then="dequantise the base first: merge another adapter with --dtype bfloat16, or save it so",
                )
        chosen = storage.scaled if storage.stored is not None else modules
        in_scales = {name: how for name, how in storage.scaled.items() if name in chosen}
        added = tuple(full for parts in replacing.values() for full in parts if full.added)
        return cls(base, outline, storage, undo, modules, replaced, added, results, in_scales)

    @property
    def whole(self) -> dict[str, TensorSpec]:
        """Replaced tensors without factors: a saved embedding that also has factors usually equals the base's."""
        return {
            name: self.outline.specs[name]
            for name in self.replaced
            if name not in self.modules and name not in self.outline.surplus
        }

    @property
    def grown(self) -> dict[str, TensorSpec]:
        """Tensors that grow with the vocabulary."""
        return {name: spec for name, spec in self.outline.specs.items() if self.results[name].shape != spec.shape}

    @property
    def too_large(self) -> bool:
        """Whether the replaced tensors are too large for a receipt."""
        return sum(spec.nbytes for spec in self.whole.values()) > ORIGINALS_LIMIT

    @property
    def kept(self) -> dict[str, TensorSpec]:
        """Replaced tensors that the receipt keeps."""
        return {} if self.too_large or self.grown else self.whole

    def steps(self) -> Iterator[Step]:
        """Yields a step for each tensor, or for each weight together with its scales."""
        with_weights = {how.scale.name for how in self.in_scales.values()}
        kept = self.kept
        for name, spec in self.outline.specs.items():
            source = self.base.tensor(self.outline.sources[name])
            if name in self.in_scales:
                how = self.in_scales[name]
                pair = (source, self.base.tensor(how.scale.name))
                yield merge_step(how, pair, self.modules.get(name, ()), self.storage.stored, self.undo)
            elif name in self.storage.shed:
                asides = (correction_spec(spec),) if self.undo else ()
                yield Step(name, (source,), (), Shed(name, self.undo), 4 * spec.nbytes, asides=asides)
            elif name not in with_weights:
                yield self._step(spec, name in kept)
        for full in self.added:
            new = self.storage.result(replace(full.source.spec, name=full.target))
            yield Step(full.target, (full.source,), (new,), Add(full.target, new.dtype))

    def _step(self, spec: TensorSpec, keep: bool) -> Step:
        """The step of one tensor of the outline."""
        source = self.base.tensor(self.outline.sources[spec.name])
        modules, replaced = self.modules.get(spec.name, ()), self.replaced.get(spec.name, ())
        result = self.storage.result(self.results[spec.name])
        inputs = [source, *(full.source for full in replaced)]
        for full in replaced:
            if not spec.dtype.is_weight and full.source.spec.dtype is not spec.dtype:
                raise AdapterFormatError(
                    "the adapter's replacement has another dtype than the base's tensor",
                    where=spec.name,
                    expected=spec.dtype,
                    found=full.source.spec.dtype,
                    then="save the adapter's tensor in the base's dtype",
                )
        if not modules and not replaced and result.dtype is spec.dtype:
            return Step(spec.name, tuple(inputs), (spec,), Copy(spec.name))
        inputs += [ref for module, _ in modules for _, ref in sorted(module.factors.items())]
        undo = self.undo and spec.name not in self.outline.surplus
        asides = (correction_spec(replace(spec, name=source.name)),) if undo else ()
        needed = workspace(modules, spec) + (correction_workspace(spec.dtype.itemsize) if undo else 0)
        if modules and not replaced and all(additive(module) for module, _ in modules):
            rows = MergeRows(spec, result.dtype, modules, undo)
            return Step(spec.name, tuple(inputs), (result,), rows, needed + piece_workspace(spec), asides=asides)
        op = Merge(spec.name, result.dtype, modules, tuple(full.rows for full in replaced), keep, undo)
        if not all(additive(module) for module, _ in modules):
            needed += 8 * spec.size  # the result in float64
        if undo:
            needed += 2 * spec.nbytes
        return Step(spec.name, tuple(inputs), (result,), op, needed, asides=asides)

    def receipt(self, adapters: Sequence[WeighedAdapter]) -> Receipt:
        """The receipt with placeholders for values that only the run can know."""
        outline, names, stored = self.outline, self.outline.renamed, self.storage.stored
        results = {source: self.storage.result(self.results[name]) for source, name in outline.origins.items()}
        return Receipt(
            operation="merge",
            tool=TOOL,
            adapters=tuple(each.record for each in adapters),
            base_tensors=dict.fromkeys(self.base.specs, UNKNOWN),
            added=(*(full.target for full in self.added), *sorted(outline.surplus)),
            originals={names.get(name, name): Original.unknown(spec) for name, spec in self.kept.items()},
            lost=tuple(names.get(name, name) for name in {**self.whole, **self.grown} if name not in self.kept),
            base_metadata=dict(self.base.metadata),
            renamed=names,
            dtype=stored.label if stored is not None else "",
            dtypes={
                name: spec.dtype.label
                for name, spec in self.base.specs.items()
                if not self._leaves(name) and results[name].dtype is not spec.dtype
            },
            scaled={name: (how.scale.name, *how.block) for name, how in self.in_scales.items()},
        )

    def _leaves(self, name: str) -> bool:
        """Whether the result lacks this tensor."""
        scales = self.storage.scales if self.storage.stored is not None else {}
        return name in self.storage.shed or name in scales

    def notes(self, adapters: Sequence[WeighedAdapter]) -> Iterator[str]:
        """Yields remarks for the user."""
        yield from self.base.notes
        for each in adapters:
            yield from each.adapter.notes
        back = "unmerge needs the undo file" if self.undo else "unmerge will refuse this file"
        if self.too_large:
            yield f"{len(self.whole)} replaced tensors are too large for the receipt: {back}"
        for old, new in growth(self.outline.specs.values(), self.results.values()):
            yield (
                f"the vocabulary grows from {old} to {new} in {', '.join(self.grown)}: put the adapter's tokenizer "
                f"next to the output; {back}"
            )
        if any(each.adapter.replacements and each.strength != 1 for each in adapters):
            yield "an adapter's full tensors replace the base's, whatever the adapter's weight"
        for each in adapters:
            if each.adapter.left:
                parts = (
                    f"{len(each.adapter.left)} tensors of {each.adapter.ref.path} belong to other parts of the pipeline"
                )
                yield f"{parts} than {each.adapter.component} and are left out"
        if self.storage.stored is not None and self.storage.scaled:
            yield f"{len(self.storage.scaled)} float8 weights are dequantised and their scales dropped: {back}"
        if self.outline.config:
            said = ", ".join(f"{key} = {json.dumps(value)}" for key, value in self.outline.config.items())
            yield f"{len(self.outline.surplus)} tensors are not in the base; the output's config.json must say {said}"
        if self.added:
            yield f"{len(self.added)} tensors are new to the base"


def _replaced_spec(spec: TensorSpec, replacements: Iterable[Replacement]) -> TensorSpec:
    """The spec of a replaced tensor: it keeps the base's dtype, and its shape unless the vocabulary has grown."""
    for full in replacements:
        if not full.rows:
            spec = replace(spec, shape=full.source.spec.shape)
    return spec
