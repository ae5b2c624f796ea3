"""Plans the conversion of any adapter to a plain LoRA: which weights get factors, and which tensors are stored in full.

Reads headers only. Knows no decomposition.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from formats.adapter import Adapter, AdapterModule, Told
from formats.checkpoint import Checkpoint
from formats.dialects import CONFIG_KEY, AdapterFile, dialect_named
from formats.dialects.peft_recast import adapted_module
from formats.dialects.peft_writing import Extracted, commonest, factor_keys, full_key, lora_config
from formats.dialects.writing import DROPS, kept_metadata
from formats.errors import AdapterFormatError
from formats.layers import LayerKind, ancestors, owner
from formats.open_files import OpenFiles
from formats.spec import DType, TensorRef, TensorSpec
from surgery.errors import Unsupported
from surgery.linalg.by_structure import most_inner
from surgery.linalg.truncated import workspace
from surgery.methods import check_modules, transforming
from surgery.methods import workspace as method_workspace
from surgery.model.base_model import BaseModel
from surgery.model.layer_kinds import Structure, learn_structure
from surgery.model.names import read_adapter
from surgery.model.stored_dtype import as_numbers
from surgery.operations.convert.convert import base_specs
from surgery.operations.extract.ops import Decomposition
from surgery.operations.extract.pairing import Matrix
from surgery.operations.extract.results import gathered
from surgery.operations.lora.plan import longest_ranks, widest_of
from surgery.operations.lora.to_lora_ops import Lower, Settle, WeighChange, WeightChange
from surgery.pipeline import engine
from surgery.pipeline.engine import Resources
from surgery.pipeline.ops import Copy
from surgery.pipeline.plan import Fate, Plan, Step
from surgery.ranks.choice import RankChoice
from surgery.ranks.spectra import Spectrum
from surgery.ranks.spend import header_bytes, spend
from surgery.receipts.receipt import TOOL

_EXPERTS = "surgery resize gives LoRA another rank, whatever it adapts"


@dataclass(frozen=True)
class Lowering:
    """The conversion of one adapter.

    Attributes:
        adapter: the adapter that was read.
        changes: every weight that gets factors, by name.
        modules: the model's own name for the layer of each changed tensor.
        settled: changed biases and norms, which are stored in full.
        tensors: the base's tensors that can be read, by name.
        known: every module of the base, by the model's own name.
        beside: fates of the adapter's tensors that belong to no step.
        metadata: the source's metadata that is still valid.
        base_name: name of the base in the config.
        notes: remarks for the user.
    """

    adapter: Adapter
    changes: Mapping[str, WeightChange]
    modules: Mapping[str, str]
    settled: tuple[Settle, ...]
    tensors: Mapping[str, TensorRef]
    known: frozenset[str]
    beside: Mapping[str, Fate]
    metadata: Mapping[str, str]
    base_name: str
    notes: tuple[str, ...]

    def dtypes(self, ranks: RankChoice) -> dict[str, DType]:
        """The dtype of every weight's factors."""
        return {name: ranks.stored or _own_dtype(change) for name, change in self.changes.items()}

    def full_key_of(self, name: str) -> str:
        """The key of a bias or a norm that is stored in full."""
        module = self.modules[name]
        adapted = any(self.modules[other] == module for other in self.changes)
        return full_key(f"{module}.{name.rpartition('.')[2]}", wrappers=1 if adapted else 0)

    def config(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """The adapter_config.json for these ranks, by the weights' names."""
        said = self.adapter.config if dialect_named(self.adapter.dialect).in_peft_names else {}
        biases = any(name.endswith(".bias") for name in self.tensors_in_full)
        described = Extracted(
            ranks={self.modules[name]: rank for name, rank in ranks.items()},
            saved=tuple(sorted(set(said.get("modules_to_save") or ()))),
            biases=biases,
            transposed=any(change.matrix.kind is LayerKind.TRANSPOSED for change in self.changes.values()),
            modules=self.known,
            rank=int(commonest(ranks.values())),
            base=str(said.get("base_model_name_or_path") or self.base_name),
        )
        kept = {key: said[key] for key in ("task_type", "trainable_token_indices") if said.get(key)}
        return lora_config(described) | kept

    @property
    def tensors_in_full(self) -> list[str]:
        """Tensors of the base that the result stores in full."""
        return [*(step.name for step in self.settled), *(full.target for full in self.adapter.replacements)]


def _own_dtype(change: WeightChange) -> DType:
    own = [ref.spec.dtype for ref in change.module.factors.values() if ref.spec.dtype.is_weight]
    return widest_of(own) if own else DType.F32


def open_lowering(file: AdapterFile, base: BaseModel | None, told: Told, drop: Iterable[str]) -> Lowering:
    """Decides what becomes of every tensor of an adapter.

    Raises:
        AdapterFormatError: there is nothing to factor, or a base is needed and none was given.
        Unsupported: peft has no plain factors for a weight.
        ReportedError: as `read_adapter` and `check_modules`.
    """
    specs = base_specs(file, base, told)
    if base is None:
        read, tensors, structure = file.read(specs, told=told), {}, Structure({})
    else:
        read = read_adapter(base, file, specs, told)
        tensors = {name: base.checkpoint.tensor(name) for name in specs}
        structure = learn_structure((base,), {})
    work = _Reading(read, file.checkpoint, specs, tensors, structure, frozenset(drop))
    return work.lowering("" if base is None else str(base.path))


@dataclass(frozen=True)
class _Reading:
    """An adapter and what is known of its base."""

    adapter: Adapter
    checkpoint: Checkpoint
    specs: Mapping[str, TensorSpec]
    tensors: Mapping[str, TensorRef]
    structure: Structure
    drop: frozenset[str]

    def lowering(self, base_name: str) -> Lowering:
        """Raises as `open_lowering`."""
        unknown = self.drop - set(DROPS)
        if unknown:
            raise AdapterFormatError(
                "unknown name for --drop",
                expected=", ".join(DROPS),
                found=", ".join(unknown),
                then=f"--drop {next(iter(DROPS))}",
            )
        where, seen = self.adapter.ref.path, set[str]()
        changes: dict[str, WeightChange] = {}
        settled: list[Settle] = []
        modules: dict[str, str] = {}
        beside: dict[str, Fate] = {}
        for module in self.adapter.modules:
            names = tuple(ref.name for _, ref in sorted(module.factors.items()) if ref.name not in seen)
            seen |= set(names)
            spec = self.specs[module.target]
            vector = len(spec.shape) < 2
            if vector and {"bias", "full"} & self.drop:
                beside |= dict.fromkeys(names, Fate.REFUSED)
                continue
            reads = vector or transforming(module) is not None
            if reads and not self.tensors:
                raise AdapterFormatError(
                    "storing a bias in full needs the base" if vector else "the adapter's change depends on the base",
                    where=f"{where}: {module.target}",
                    found=module.method,
                    then="name the base: --base BASE" + (", or leave biases out: --drop bias" if vector else ""),
                )
            if module.reads is not None:
                module = replace(module, factors={**module.factors, "weight": self.tensors[module.reads]})
            check_modules(((module, 1.0),), spec if reads else as_numbers(spec))
            modules[module.target] = self._module(module)
            if vector:
                settled.append(Settle(module.target, spec.dtype, module, names))
                continue
            if module.target in changes:
                raise Unsupported(
                    "the adapter changes one weight twice",
                    where=f"{where}: {module.target}",
                    then="merge it into the base, and extract a LoRA from the result",
                )
            changes[module.target] = WeightChange(self._matrix(module, spec), module, reads, names)
        if not changes:
            raise AdapterFormatError(
                "this adapter changes no weight that can have factors",
                where=where,
                found=", ".join(sorted({module.method for module in self.adapter.modules})) or "tensors in full",
                then="merge it into the base instead",
            )
        adapter = self.adapter
        if adapter.replacements and "full" in self.drop:
            beside |= dict.fromkeys((full.source.name for full in adapter.replacements), Fate.REFUSED)
            adapter = replace(adapter, replacements=())
        used = {*seen, *beside, *(full.source.name for full in adapter.replacements)}
        for name in self.checkpoint.specs.keys() - used:  # alphas, which are in the factors now, and second copies
            kept = Fate.CONVERTED if name.endswith(".alpha") else Fate.IDENTICAL
            beside[name] = Fate.REFUSED if name in adapter.left else kept
        holders = {owner(self.structure.names.get(name, name)) for name in self.specs} | set(modules.values())
        return Lowering(
            adapter, changes, modules, tuple(settled), self.tensors, frozenset(holders.union(*map(ancestors, holders))),
            beside, kept_metadata(self.checkpoint.metadata), base_name, tuple(self._notes(changes, settled, beside)),
        )  # fmt: skip

    def _module(self, module: AdapterModule) -> str:
        """The model's own name for the layer."""
        if dialect_named(self.adapter.dialect).in_peft_names:
            return adapted_module(module.factors)
        return owner(self.structure.names.get(module.target, module.target))

    def _matrix(self, module: AdapterModule, spec: TensorSpec) -> Matrix:
        """The weight as a matrix. Raises Unsupported if peft's plain LoRA cannot adapt its layer."""
        kind = module.kind
        if dialect_named(self.adapter.dialect).lays_out_by_weight:
            kind = self.structure.kinds.get(spec.name, LayerKind.LINEAR)
        if len(spec.shape) > 2:
            kind = LayerKind.CONV
        elif kind in (LayerKind.CONV, LayerKind.PARAMETER):  # a 1×1 convolution may be a linear layer in the file
            kind = LayerKind.LINEAR
        grouped = kind is LayerKind.CONV and self.structure.order and spec.name not in self.structure.kinds
        parameter = module.kind is LayerKind.PARAMETER or module.part is not None
        if parameter or grouped or not spec.name.endswith(".weight"):
            raise Unsupported(
                "LoRA cannot connect the channels of a convolution in groups, and peft applies none with dilation"
                if grouped
                else "the weight does not belong to a layer, so plain LoRA has no key for its factors",
                where=f"{self.adapter.ref.path}: {spec.name}",
                found=module.method,
                then=_EXPERTS if parameter and module.method == "lora" else None,
            )
        return Matrix(owner(spec.name), spec, kind, False)

    def _notes(
        self, changes: Mapping[str, WeightChange], settled: Sequence[Settle], beside: Mapping[str, Fate]
    ) -> Iterable[str]:
        yield from self.checkpoint.notes
        if settled:
            names = ", ".join(each.name for each in settled[:3]) + (" …" if len(settled) > 3 else "")
            yield f"{len(settled)} biases or norms also change and are stored in full, as merge computes them: {names}"
        convolutions = sum(change.matrix.kind is LayerKind.CONV for change in changes.values())
        if convolutions and not self.structure.order:
            yield f"{convolutions} convolutions are assumed to have no groups or dilation, which files do not record"
        if self.adapter.left:
            yield f"{len(self.adapter.left)} tensors of other parts of the pipeline are left behind"
        dropped = sum(fate is Fate.REFUSED for fate in beside.values()) - len(self.adapter.left)
        if dropped:
            yield f"{dropped} tensors are left behind, as asked"


def plan_lowering(lowering: Lowering, ranks: RankChoice, measured: Mapping[str, int] | None = None) -> Plan:
    """The plan; `measured` has every weight's rank if there is a budget."""
    rules, dtypes = ranks.rules(lowering.changes, measured), lowering.dtypes(ranks)
    steps = []
    for name, change in lowering.changes.items():
        rule, dtype = rules[name], dtypes[name]
        most = rule.most(min(change.matrix.sides))
        op = Lower(change, Decomposition(rule, dtype, ranks.seed))
        outputs = _outputs(lowering, name, most, dtype)
        steps.append(Step(name, _inputs(lowering, name), outputs, op, _workspace(change, most), shrinks=True))
    for settle in lowering.settled:
        base, refs = lowering.tensors[settle.name], settle.module.factors
        inputs = (base, *(ref for _, ref in sorted(refs.items())))
        outputs = (replace(base.spec, name=lowering.full_key_of(settle.name)),)
        steps.append(Step(settle.name, inputs, outputs, settle, 16 * sum(ref.spec.size for ref in inputs)))
    for full in lowering.adapter.replacements:
        steps.append(Step(full.source.name, (full.source,), (full.source.spec,), Copy(full.source.name)))
    metadata = {"format": "pt", **lowering.metadata, "surgery": f"{TOOL} convert"}
    return Plan("convert", tuple(steps), metadata, lowering.notes)


def ranks_within(
    lowering: Lowering, ranks: RankChoice, *, as_file: bool, files: OpenFiles, resources: Resources
) -> dict[str, int]:
    """The ranks of all weights that hold the most energy within the budget.

    Raises:
        SurgeryError: the budget is too small for the least ranks.
    """
    changes, dtypes = lowering.changes, lowering.dtypes(ranks)

    def measure(names: Collection[str] | None, known: int) -> Iterable[Spectrum]:
        steps = []
        for name in names or changes:
            count = min(known, *changes[name].matrix.sides)
            op = WeighChange(changes[name], count, Decomposition(ranks.rule, dtypes[name], ranks.seed))
            steps.append(Step(name, _inputs(lowering, name), (), op, _workspace(changes[name], count)))
        return gathered(engine.run(Plan("measure", tuple(steps)), None, files, resources)).spectra

    return spend(
        ranks,
        changes,
        measure,
        per_rank=sum(change.matrix.bytes_per_rank(dtypes[name]) for name, change in changes.items()),
        fixed=lambda _: _fixed_bytes(lowering, dtypes, as_file=as_file),
    )


def _fixed_bytes(lowering: Lowering, dtypes: Mapping[str, DType], *, as_file: bool) -> int:
    """Bytes that do not depend on ranks: full tensors, and a header that is long enough for any ranks."""
    specs = [full.source.spec for full in lowering.adapter.replacements]
    specs += [replace(lowering.tensors[s.name].spec, name=lowering.full_key_of(s.name)) for s in lowering.settled]
    nbytes = sum(spec.nbytes for spec in specs)
    for name, change in lowering.changes.items():
        largest = (change.matrix.spec.size,) * 4  # as a shape, it has more digits than any factor's
        keys = factor_keys(lowering.modules[name], change.matrix.kind)
        specs += [TensorSpec(key, dtypes[name], largest) for key in keys]
    metadata = dict(lowering.metadata)
    if as_file:
        metadata[CONFIG_KEY] = json.dumps(lowering.config(longest_ranks(lowering.changes)), indent=2)
    return nbytes + header_bytes(specs, metadata)


def _inputs(lowering: Lowering, name: str) -> tuple[TensorRef, ...]:
    change = lowering.changes[name]
    factors = tuple(ref for _, ref in sorted(change.module.factors.items()))
    return (lowering.tensors[name], *factors) if change.reads else factors


def _outputs(lowering: Lowering, name: str, rank: int, dtype: DType) -> tuple[TensorSpec, ...]:
    """lora_A and lora_B."""
    matrix = lowering.changes[name].matrix
    out, into = matrix.sides
    inner = matrix.spec.shape[1:] if matrix.kind is LayerKind.CONV else (into,)
    a, b = factor_keys(lowering.modules[name], matrix.kind)
    return TensorSpec(a, dtype, (rank, *inner)), TensorSpec(b, dtype, (out, rank, *(1,) * (len(inner) - 1)))


def _workspace(change: WeightChange, rank: int) -> int:
    """Bytes for the method, and for its ΔW formed and decomposed, or its factors and their QR."""
    out, into = change.matrix.sides
    formed = (8 if change.reads else 4) * change.matrix.spec.size + workspace(out, into, rank)
    thin = 0 if change.reads else 3 * 8 * (out + into) * most_inner(min(out, into))
    return method_workspace(((change.module, 1.0),), change.matrix.spec) + max(formed, thin)
