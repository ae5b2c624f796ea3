"""The plan of a fold: every tensor of the base is copied, changed or widened; parts that stay in the graph are grafts.

Reads headers only, and knows the final length of receipt and grafts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from formats.dialects.adapterhub_beside import Part
from formats.dialects.bottleneck import Bottleneck, Bottlenecks
from formats.dialects.prompts import Prefix, Prompt, Whole
from formats.errors import UnsupportedDType
from formats.grafts import BranchGraft, Graft, Grafts, PrefixGraft, PromptGraft, Value, tensor_names
from formats.layers import LayerKind, layer_kinds, owner
from formats.quantized import foreign, refuse_foreign
from formats.spec import DType, TensorSpec
from surgery.methods.activations import activation
from surgery.model.base_model import BaseModel
from surgery.operations.fold.ops import (
    Branch,
    Embedding,
    FoldBias,
    FoldWeight,
    KeysAndValues,
    Neurons,
    NewBias,
    Source,
    Widen,
)
from surgery.operations.fold.verdicts import Base, Judged, Room, Verdict, Way, joins_rows, judge, verdicts_beside
from surgery.operations.merge.ops import Merge
from surgery.operations.merge.plan import refuse_merged
from surgery.pipeline.ops import Copy
from surgery.pipeline.plan import Op, Plan, Step
from surgery.receipts.receipt import TOOL, UNKNOWN, MergedAdapter, Receipt

_BLOCK = 16 * (1 << 20)  # bytes that a block of columns needs


@dataclass(frozen=True)
class Folding:
    """A fold before it is run.

    Attributes:
        plan: the steps.
        judged: the bottlenecks, each with its adapter and its verdict.
        verdicts: the decisions on every part of the adapter.
        grafts: the parts that stay in the graph, with a placeholder for the model's digest; None if there are none.
        receipt: the receipt, with placeholders for values that only the run can know; None if no weight changes.
        settings: entries that config.json must have.
    """

    plan: Plan
    judged: tuple[tuple[Bottlenecks, Judged], ...]
    verdicts: tuple[Verdict, ...]
    grafts: Grafts | None
    receipt: Receipt | None
    settings: Mapping[str, Any]


def plan_fold(base: BaseModel, parts: Sequence[Part], adapter: MergedAdapter) -> Folding:
    """Decides what becomes of every part of an adapter, and plans it.

    Args:
        base: the base.
        parts: the adapter's parts, read against the base's tensors.
        adapter: its entry in the receipt.

    Raises:
        AlreadyMerged: the base's receipt names the adapter.
        NotMergeable: see `judge`.
        Quantised, UnsupportedDType: weights are not plain floating-point numbers.
    """
    refuse_merged(base.checkpoint, {adapter.digest: parts[0].ref.path})
    work = _Work.of(base, parts)
    changing = work.changing()
    grafting = list(work.grafting())
    work.check_dtypes([*changing, *(step.name for step, _ in grafting)])
    copied = [
        Step(name, (base.checkpoint.tensor(name),), (spec,), Copy(name))
        for name, spec in base.specs.items()
        if name not in changing
    ]
    receipt = None
    if changing:
        receipt = Receipt(
            operation="fold",
            tool=TOOL,
            adapters=(adapter,),
            base_tensors=dict.fromkeys(base.specs, UNKNOWN),
            added=tuple(sorted(set(changing) - set(base.specs))),
            lost=tuple(sorted(set(changing) & set(base.specs))),
            base_metadata=dict(base.checkpoint.metadata),
        )
    steps = (*changing.values(), *copied, *(step for step, _ in grafting))
    metadata = base.checkpoint.metadata if receipt is None else receipt.metadata()
    sites = tuple(site for _, found in grafting for site in found)
    return Folding(
        Plan("fold", steps, metadata, (*base.checkpoint.notes, *work.notes(len(sites)))),
        tuple(work.judged),
        tuple(work.verdicts()),
        Grafts(UNKNOWN, adapter.digest, sites) if sites else None,
        receipt,
        work.settings(),
    )


@dataclass(frozen=True)
class Grafting:
    """A whole adapter as nodes of a graph: the steps that make its tensors as asides, and the places for the nodes."""

    steps: tuple[Step, ...]
    sites: tuple[Graft, ...]


def plan_grafting(base: BaseModel, parts: Sequence[Part], digest: str, *, half: bool) -> Grafting:
    """Plans all of an adapter as nodes, including parts that could be folded into weights.

    Args:
        base: the base.
        parts: the adapter's parts, read against the base's tensors.
        digest: the adapter's digest.
        half: whether bottlenecks that read h read the input of the projection before them instead.

    Raises:
        AlreadyMerged, NotMergeable, Quantised, UnsupportedDType: as `plan_fold`.
    """
    refuse_merged(base.checkpoint, {digest: parts[0].ref.path})
    judged = _Work.of(base, parts)
    work = replace(judged, judged=[(part, _as_nodes(part, each, half)) for part, each in judged.judged])
    grafting = list(work.grafting())
    work.check_dtypes([step.name for step, _ in grafting])
    return Grafting(tuple(step for step, _ in grafting), tuple(site for _, sites in grafting for site in sites))


def _as_nodes(adapter: Bottlenecks, each: Judged, half: bool) -> Judged:
    reads_h = not adapter.parallel and not adapter.original_ln_before
    way = Way.HALF if reads_h and half else Way.GRAPH
    return replace(each, verdict=replace(each.verdict, way=way), split=False)


@dataclass(frozen=True)
class _Work:
    """The work of a fold."""

    base: BaseModel
    known: Base
    parts: Sequence[Part]
    judged: Sequence[tuple[Bottlenecks, Judged]]
    kinds: Mapping[str, LayerKind]

    @classmethod
    def of(cls, base: BaseModel, parts: Sequence[Part]) -> _Work:
        """Decides on every bottleneck."""
        known = Base(base.specs, base.config)
        judged = [(part, each) for part in parts if isinstance(part, Bottlenecks) for each in judge(part, known)]
        return cls(base, known, parts, judged, layer_kinds(base.specs))

    def verdicts(self) -> Iterator[Verdict]:
        """The verdicts on every part, in the adapter's order."""
        for part in self.parts:
            yield from (each.verdict for adapter, each in self.judged if adapter is part)
            yield from verdicts_beside(part)

    def source(self, each: Judged) -> Source:
        """The source of the bottleneck's matrices."""
        return Source(each.one, each.split and each.verdict.way is Way.WIDENED)

    def transposed(self, weight: str) -> bool:
        """Whether a weight is stored (in, out)."""
        return self.kinds.get(owner(weight)) is LayerKind.TRANSPOSED

    @property
    def widened(self) -> dict[int, Judged]:
        """The bottlenecks that become neurons, by layer."""
        return {each.one.layer: each for _, each in self.judged if each.verdict.way is Way.WIDENED}

    @property
    def neurons(self) -> int:
        """The number of neurons that each layer gets, which is the need of the widest bottleneck."""
        return max((self.source(each).width for each in self.widened.values()), default=0)

    def changing(self) -> dict[str, Step]:
        """The steps of tensors that change, by name."""
        steps: list[Step] = []
        for _, each in self.judged:
            if each.verdict.way is Way.FOLDED:
                weight, source = each.one.behind, self.source(each)
                spec, bias = self.base.specs[weight], self.base.specs.get(f"{owner(weight)}.bias")
                fold = FoldWeight(weight, spec.dtype, source, self.transposed(weight))
                steps.append(self._step(spec, fold, source, _BLOCK))
                if bias is not None:
                    steps.append(self._step(bias, FoldBias(bias.name, bias.dtype, source), source))
        steps += self._biases()
        for part in self.parts:
            if isinstance(part, Whole):
                for name, ref in part.tensors.items():
                    spec = self.base.specs[name]
                    op = Merge(name, spec.dtype, (), ((),), False)
                    steps.append(Step(name, (self.base.checkpoint.tensor(name), ref), (spec,), op, 16 * spec.size))
        widened = self.widened
        if widened:
            one = next(iter(widened.values())).one
            assert one.first is not None  # ensured by the verdict
            for neurons, name in (
                (Neurons.FIRST, one.first),
                (Neurons.FIRST_BIAS, f"{owner(one.first)}.bias"),
                (Neurons.SECOND, one.behind),
                (Neurons.SECOND_BIAS, f"{owner(one.behind)}.bias"),
            ):
                for layer, tensor in self.known.alike(name).items():
                    if layer in widened or neurons is not Neurons.SECOND_BIAS:
                        steps.append(self._widen(tensor, neurons, widened.get(layer)))
        return {step.name: step for step in steps}

    def _biases(self) -> Iterator[Step]:
        """The steps of biases that the base lacks, in all layers: folded values, and zeros elsewhere."""
        folded = {owner(each.one.behind): self.source(each) for each in self.roomy}
        for name, spec in self.base.specs.items():
            if name.endswith(".weight") and any(owner(name).endswith(room.projections) for room in self.rooms):
                result = TensorSpec(f"{owner(name)}.bias", spec.dtype, spec.shape[:1])
                source = folded.get(owner(name))
                needed = 16 * result.size + (source.nbytes if source else 0)
                yield Step(result.name, source.refs if source else (), (result,), NewBias(result, source), needed)

    @property
    def roomy(self) -> list[Judged]:
        """The folded bottlenecks whose projection lacks a bias."""
        folded = [each for _, each in self.judged if each.verdict.way is Way.FOLDED]
        return [each for each in folded if f"{owner(each.one.behind)}.bias" not in self.base.specs]

    @property
    def rooms(self) -> list[Room]:
        """The settings that add biases."""
        rooms = {room.setting: room for each in self.roomy if (room := self.known.room(each.one.place))}
        return list(rooms.values())

    def _widen(self, tensor: str, part: Neurons, each: Judged | None) -> Step:
        spec, source = self.base.specs[tensor], None if each is None else self.source(each)
        shape = list(spec.shape)
        if part is not Neurons.SECOND_BIAS:
            shape[1 if part is Neurons.SECOND else 0] += self.neurons
        result = TensorSpec(tensor, spec.dtype, tuple(shape))
        return self._step(spec, Widen(tensor, spec.dtype, part, source, self.neurons), source, result.nbytes, result)

    def _step(
        self, spec: TensorSpec, op: Op, source: Source | None, needed: int = 0, result: TensorSpec | None = None
    ) -> Step:
        inputs = (self.base.checkpoint.tensor(spec.name), *(source.refs if source else ()))
        needed += source.nbytes if source else 0
        return Step(spec.name, inputs, (result or spec,), op, needed)

    def grafting(self) -> Iterator[tuple[Step, tuple[Graft, ...]]]:
        """The steps that write grafts, each with its places in the graph."""
        for part in self.parts:
            if isinstance(part, Bottlenecks):
                for adapter, each in self.judged:
                    if adapter is part and each.verdict.way in (Way.HALF, Way.GRAPH):
                        yield self._branch(part, each)
            elif isinstance(part, Prefix):
                yield self._prefix(part)
            elif isinstance(part, Prompt):
                dtype = next(spec.dtype for spec in self.base.specs.values() if spec.dtype.is_weight)
                name, ref = "prompt.embedding", part.embedding
                op, spec = Embedding(dtype, ref), TensorSpec(name, dtype, ref.spec.shape)
                step = Step(part.ref.path, (ref,), (), op, 16 * spec.size, asides=(spec,))
                yield step, (PromptGraft(part.among_words, part.after_first, name),)

    def _branch(self, adapter: Bottlenecks, each: Judged) -> tuple[Step, tuple[Graft, ...]]:
        one, source, site = each.one, self.source(each), branch_site(adapter, each.one)
        module, dtype = owner(one.behind), self.base.specs[one.behind].dtype
        inputs, wide = list(source.refs), source.outputs
        biased = f"{module}.bias" in self.base.specs
        if each.verdict.way is Way.HALF:
            site = replace(site, reads=Value.INPUT if joins_rows(one, self.known) else Value.PRODUCT)
            inputs[:0] = [self.base.checkpoint.tensor(f"{module}.bias")] if biased else []
        rows = site.reads is Value.INPUT
        if rows:
            inputs.insert(0, self.base.checkpoint.tensor(one.behind))
            wide = inputs[0].spec.size // source.outputs
        rank, out = source.width, source.outputs
        shapes = {"down": (rank, wide), "down_bias": (rank,), "up": (out, rank), "up_bias": (out,)}
        specs = tuple(TensorSpec(name, dtype, shapes[role]) for role, name in tensor_names(site).items())
        op = Branch(dtype, source, site.reads, biased, self.transposed(one.behind))
        needed = source.nbytes + 8 * 6 * sum(spec.size for spec in specs) + (_BLOCK if rows else 0)
        return Step(one.behind, tuple(inputs), (), op, needed, asides=specs), (site,)

    def _prefix(self, prefix: Prefix) -> tuple[Step, tuple[Graft, ...]]:
        op = KeysAndValues(self.base.specs[prefix.attentions[0]].dtype, prefix)
        sites, specs = [], []
        for layer, attention in zip(prefix.layers, prefix.attentions, strict=True):
            names = [f"{owner(attention)}.prefix.{what}" for what in ("keys", "values")]
            sites.append(PrefixGraft(owner(attention), layer, prefix.moves_positions, *names))
            specs += [TensorSpec(name, op.dtype, (prefix.length, prefix.width)) for name in names]
        needed = 8 * 6 * sum(ref.spec.size for ref in op.refs) + 16 * sum(spec.size for spec in specs)
        return Step(prefix.attentions[0], op.refs, (), op, needed, asides=tuple(specs)), tuple(sites)

    def check_dtypes(self, names: Sequence[str]) -> None:
        """Raises Quantised or UnsupportedDType if one of these is not a plain floating-point weight."""
        specs, where = self.base.specs, self.base.checkpoint.ref.path
        refuse_foreign(foreign(specs, self.base.quantization), [name for name in names if name in specs], where)
        for name in names:
            if name in specs and not specs[name].dtype.is_weight:
                raise UnsupportedDType(
                    "fold computes with plain floating-point weights",
                    where=f"{where}: {name}",
                    expected=", ".join(dtype.label for dtype in DType if dtype.is_weight),
                    found=specs[name].dtype,
                    then="dequantise the model first: surgery merge --dtype, or transformers' model.dequantize()",
                )

    def settings(self) -> dict[str, Any]:
        """The entries that config.json must have."""
        settings: dict[str, Any] = {room.setting: True for room in self.rooms}
        if self.widened:
            settings[self.known.width] = self.known.config[self.known.width] + self.neurons
        return settings

    def notes(self, sites: int) -> Iterator[str]:
        """Yields remarks for the user."""
        if self.widened:
            layers = self.known.alike(next(iter(self.widened.values())).one.behind)
            filled = sum(layer not in self.widened for layer in layers)
            zeros = f"; {filled} layers have no adapter, so theirs are zeros" if filled else ""
            width = self.known.width
            yield f"every MLP gets {self.neurons} more neurons: {width} = {self.settings()[width]}{zeros}"
        for room in self.rooms:
            names = ", ".join(each.rpartition(".")[2] for each in room.projections)
            yield f"{names} get biases in every layer: {room.setting} = true"
        for part in self.parts:
            if isinstance(part, Whole) and part.left:
                yield f"the head ({part.kind}) is left out: {part.left}"
        if sites:
            yield f"{sites} parts stay as nodes: the output alone is not the adapted model"


def branch_site(adapter: Bottlenecks, one: Bottleneck) -> BranchGraft:
    """A bottleneck with a known non-linearity, as nodes of the graph."""
    module, f = owner(one.behind), activation(adapter.non_linearity)
    assert f is not None  # judged
    reads = adds_to = Value.OUTPUT
    if adapter.parallel:
        reads = Value.RESIDUAL
    elif adapter.original_ln_before:
        reads = Value.SUM if one.norm is None else Value.NORMED
        adds_to = {True: Value.OUTPUT, False: reads, "post_add": Value.SUM}[adapter.residual_before_ln]
    return BranchGraft(
        module=module,
        layer=one.layer,
        place=one.place,
        reads=reads,
        adds_to=adds_to,
        norm=owner(one.norm) if reads is Value.NORMED and one.norm else None,
        non_linearity=f.name,
        **{role: f"{module}.{one.place}.{role}" for role in ("down", "down_bias", "up", "up_bias")},
    )
