"""Plans one adapter from several LoRA adapters: which factors belong together, under which keys, at which rank.

Reads headers, and the adapters' payload for their digests. Knows no decomposition.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from formats.adapter import AdapterModule
from formats.dialects import CONFIG_KEY
from formats.dialects.peft_recast import module_of, recast_config
from formats.layers import LayerKind, owner
from formats.open_files import OpenFiles
from formats.spec import DType, TensorRef, TensorSpec
from surgery.errors import Unsupported
from surgery.linalg.truncated import workspace
from surgery.operations.extract.pairing import Matrix
from surgery.operations.extract.results import gathered
from surgery.operations.lora.ops import AdaptedWeight, AdapterFactors, AddBias, Mix, Recast, Weigh
from surgery.operations.merge.adapters import WeighedAdapter, replacements
from surgery.pipeline import engine
from surgery.pipeline.engine import Resources
from surgery.pipeline.ops import Copy
from surgery.pipeline.plan import Plan, Step
from surgery.ranks import FixedRank, RankRule
from surgery.ranks.choice import RankChoice
from surgery.ranks.spectra import Spectrum
from surgery.ranks.spend import header_bytes, spend
from surgery.receipts.receipt import TOOL


@dataclass(frozen=True)
class Casting:
    """The adapters' tensors, grouped by their place in the result.

    Attributes:
        adapters: in the order of their digests.
        slots: every adapted weight.
        biases: the changes of biases (peft's `lora_bias`), by key.
        copied: tensors that are copied: full tensors and magnitudes.
    """

    adapters: tuple[WeighedAdapter, ...]
    slots: tuple[AdaptedWeight, ...]
    biases: Mapping[str, tuple[AdapterFactors, ...]]
    copied: tuple[TensorRef, ...]

    @classmethod
    def of(cls, adapters: tuple[WeighedAdapter, ...], files: OpenFiles) -> Casting:
        """Groups tensors. Raises Unsupported if adapters name the same weight differently or differ in a setting of the
        whole adapter, NotMergeable if two of them carry a tensor in full."""
        found: dict[str, dict[str, AdapterFactors]] = {}  # by weight, by adapter
        biases: dict[str, tuple[AdapterFactors, ...]] = {}
        copied: dict[str, TensorRef] = {}
        for each in adapters:
            seen: set[str] = set()
            for module in each.adapter.modules:
                source = AdapterFactors(module, each.strength, each.digest)
                if module.method == "lora_bias":
                    key = module.factors["lora_B.bias"].name
                    biases[key] = (*biases.get(key, ()), source)
                    continue
                a = module.factors["lora_A"].name
                if a not in seen:  # a stack of experts that the base stores separately appears once for each expert
                    seen.add(a)
                    found.setdefault(_target(module), {})[each.digest] = source
                if module.method == "dora":
                    magnitude = module.factors["lora_magnitude_vector"]
                    copied[magnitude.name] = magnitude
        for parts in replacements(adapters).values():
            copied |= {full.source.name: full.source for full in parts}
        for each in adapters:
            copied |= _second_copies(each, files)
        targeted = {entry for each in adapters for entry in each.adapter.config.get("target_parameters") or ()}
        slots = tuple(_slot(name, tuple(sources.values()), targeted) for name, sources in sorted(found.items()))
        for setting in ("lora_bias", "layer_replication"):
            if len({json.dumps(each.adapter.config.get(setting) or None) for each in adapters}) > 1:
                raise Unsupported(
                    f"the adapters differ in {setting}, which peft can set only for a whole adapter",
                    where=", ".join(each.adapter.ref.path for each in adapters),
                    then="merge them into the base instead",
                )
        return cls(adapters, slots, biases, tuple(copied[name] for name in sorted(copied)))

    def config(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """The adapter_config.json for these ranks, by the weights' names."""
        adapted = [
            frozenset(slot.module for slot in self.slots if any(each.digest == s.digest for s in slot.sources))
            for each in self.adapters
        ]
        return recast_config(
            [each.adapter.config for each in self.adapters],
            adapted,
            {slot.module: ranks[slot.name] for slot in self.slots},
            frozenset(slot.module for slot in self.slots if slot.matrix.kind is LayerKind.PARAMETER),
        )


def _second_copies(each: WeighedAdapter, files: OpenFiles) -> dict[str, TensorRef]:
    """Tensors of the file that are copies of others; peft writes some tensors twice and reads both."""
    taking_part = {ref.name for ref in each.adapter.tensors}
    checkpoint = files.of(each.adapter.ref)
    return {key: checkpoint.tensor(key) for key in checkpoint.specs if key not in taking_part}


def _target(module: AdapterModule) -> str:
    return module.part.stack if module.part is not None else module.target


def _slot(name: str, sources: tuple[AdapterFactors, ...], targeted: Collection[str]) -> AdaptedWeight:
    keys = {tuple(ref.name for ref in source.factors) for source in sources}
    if len(keys) > 1:
        raise Unsupported(
            "the adapters name the same weight differently: they were made for different classes of the model",
            where=name,
            found=", ".join(sorted(a for a, _ in keys)),
            then="merge them into the base instead",
        )
    first = sources[0].module
    a, b = (ref.spec for ref in sources[0].factors)
    out, into, experts = b.shape[0], a.shape[1], a.shape[0] // first.rank
    shape: tuple[int, ...] = (out, *a.shape[1:])
    if first.kind in (LayerKind.TRANSPOSED, LayerKind.EMBEDDING):
        shape = (into, out)
    if first.kind is LayerKind.PARAMETER and experts > 1:
        shape = (experts, out, into)
    module = module_of(a.name)
    if first.kind is LayerKind.PARAMETER:
        module = f"{module}.{name.rpartition('.')[2]}"
        if not any(module == entry or module.endswith(f".{entry}") for entry in targeted):
            raise Unsupported(
                "the base and the model name this parameter differently, so its rank cannot be set by name",
                where=name,
                found=", ".join(sorted(targeted)),
                then="merge the adapters into the base instead",
            )
    return AdaptedWeight(
        Matrix(owner(name), TensorSpec(name, a.dtype, shape), first.kind, False), module, (a.name, b.name), sources
    )


def plan_recast(
    operation: str,
    casting: Casting,
    mix: Mix,
    ranks: RankChoice | None,
    dtypes: Mapping[str, DType],
    measured: Mapping[str, int] | None = None,
    notes: tuple[str, ...] = (),
) -> Plan:
    """The plan that writes the new adapter.

    Args:
        operation: name of the operation.
        casting: the grouped factors.
        mix: how deltas are combined.
        ranks: how ranks are chosen; None to keep all.
        dtypes: dtype of every weight's factors.
        measured: every weight's rank, if there is a budget.
        notes: remarks for the user.

    Raises:
        UnknownTensor: an override matches nothing.
    """
    rules = {} if ranks is None else ranks.rules((slot.name for slot in casting.slots), measured)
    steps = []
    for slot in casting.slots:
        rule = rules.get(slot.name)
        outputs = _outputs(slot, slot.rank if rule is None else rule.most(mix.size(slot)), dtypes[slot.name])
        op = Recast(slot, mix, rule, dtypes[slot.name])
        steps.append(Step(slot.name, _inputs(slot), outputs, op, _workspace(slot, mix, rule), rule is not None))
    widest = widest_of(dtypes.values())
    for key, sources in sorted(casting.biases.items()):
        refs = tuple(source.module.factors["lora_B.bias"] for source in sources)
        steps.append(Step(key, refs, (TensorSpec(key, widest, refs[0].spec.shape),), AddBias(key, sources, widest)))
    steps += [Step(ref.name, (ref,), (ref.spec,), Copy(ref.name)) for ref in casting.copied]
    return Plan(operation, tuple(steps), {"format": "pt", "surgery": f"{TOOL} {operation}"}, notes)


def widest_of(dtypes: Iterable[DType]) -> DType:
    """The narrowest dtype that holds all of them."""
    found = set(dtypes)
    if len(found) == 1:
        return found.pop()
    return DType.F64 if DType.F64 in found else DType.F32


def _inputs(slot: AdaptedWeight) -> tuple[TensorRef, ...]:
    return tuple(ref for source in slot.sources for ref in source.factors)


def _outputs(slot: AdaptedWeight, rank: int, dtype: DType) -> tuple[TensorSpec, TensorSpec]:
    a, b = (ref.spec for ref in slot.sources[0].factors)
    width = slot.matrix.matrices * rank
    return (
        TensorSpec(slot.keys[0], dtype, (width, *a.shape[1:])),
        TensorSpec(slot.keys[1], dtype, (b.shape[0], width, *b.shape[2:])),
    )


def _workspace(slot: AdaptedWeight, mix: Mix, rule: RankRule | None) -> int:
    """Bytes for float64 copies of the factors, some for each matrix of the decomposition; formed deltas also need as
    much as in extract, and two more copies."""
    out, into = slot.matrix.sides
    thin = 8 * 6 * slot.matrix.matrices * slot.rank * (out + into)
    if not mix.is_dense:
        return thin
    most = None if rule is None else rule.most(min(out, into))
    return thin + workspace(out, into, most) + 2 * 4 * out * into


def ranks_within(
    casting: Casting,
    mix: Mix,
    ranks: RankChoice,
    dtypes: Mapping[str, DType],
    *,
    as_file: bool,
    files: OpenFiles,
    resources: Resources,
) -> dict[str, int]:
    """The ranks of all weights that hold the most energy within the budget.

    Thin products give all their singular values at once. For formed deltas, more are measured if a weight uses all
    known ones.

    Raises:
        SurgeryError: the budget is too small for the least ranks.
    """
    slots = {slot.name: slot for slot in casting.slots}

    def measure(names: Collection[str] | None, known: int) -> Iterable[Spectrum]:
        steps = []
        for name in names or slots:
            slot, rank = slots[name], min(known, mix.size(slots[name]))
            op = Weigh(slot, mix, rank, dtypes[name])
            steps.append(Step(name, _inputs(slot), (), op, _workspace(slot, mix, FixedRank(rank))))
        return gathered(engine.run(Plan("measure", tuple(steps)), None, files, resources)).spectra

    return spend(
        ranks,
        slots,
        measure,
        per_rank=sum(slot.matrix.bytes_per_rank(dtypes[name]) for name, slot in slots.items()),
        fixed=lambda _: _fixed_bytes(casting, dtypes, as_file),
    )


def _fixed_bytes(casting: Casting, dtypes: Mapping[str, DType], as_file: bool) -> int:
    """Bytes that do not depend on ranks: copied tensors, and a header that is long enough for any ranks."""
    specs = [ref.spec for ref in casting.copied]
    specs += [sources[0].module.factors["lora_B.bias"].spec for sources in casting.biases.values()]
    nbytes = sum(spec.size * max(spec.dtype.itemsize, 4) for spec in specs)
    for slot in casting.slots:
        largest = (slot.matrix.spec.size,) * 4  # as a shape, it has more digits than any factor's
        specs += [TensorSpec(key, dtypes[slot.name], largest) for key in slot.keys]
    config = casting.config(longest_ranks(dtypes)) if as_file else None
    return nbytes + header_bytes(specs, {} if config is None else {CONFIG_KEY: json.dumps(config, indent=2)})


def longest_ranks(names: Iterable[str]) -> dict[str, int]:
    """Ranks that make an adapter's config as long as possible."""
    return {name: 10**6 + number for number, name in enumerate(names)}
