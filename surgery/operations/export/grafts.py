"""The parts of an adapter that export-onnx puts into the graph because no weight can hold them: bottlenecks, prefixes
and prompts.

They come from a whole adapter, for comparison, or from the file that fold stored next to the model it wrote.
`fold_plan` decides what goes where and makes the tensors; `surgery.onnx.adapters.sites` puts them there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from formats.dialects import AdapterFile
from formats.dialects.prompts import Whole
from formats.errors import CorruptFile
from formats.grafts import GRAFTS_FILE, BranchGraft, Graft, PromptGraft, Value, read_grafts
from formats.layers import LayerKind, layer_kinds
from formats.open_files import OpenFiles
from formats.spec import TensorRef, TensorSpec
from formats.tensors import Bytes, bytes_from_tensor
from surgery.errors import Unsupported
from surgery.hashes import content_digest, tensor_hash
from surgery.model.base_model import BaseModel
from surgery.onnx.adapters.bottleneck import HALF
from surgery.onnx.adapters.sites import WAYS, graft_sites, positions_taken
from surgery.onnx.against_torch.model import Verification
from surgery.onnx.against_torch.sites import check_grafted
from surgery.onnx.files.made import Made
from surgery.onnx.files.payload import Beside
from surgery.onnx.trace.program import ModelKind
from surgery.onnx.trace.single_pass import SinglePass
from surgery.onnx.trace.template import Template
from surgery.operations.export.in_graph import Trial, WithAdapters
from surgery.operations.fold.open import fingerprint_beside, open_parts
from surgery.operations.fold.plan import plan_grafting
from surgery.pipeline.plan import Fate, Step, TakesOver

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PartsInGraph:
    """The parts that go into one graph.

    Attributes:
        model: the model that the graph belongs to.
        sites: the places in the graph, and what goes into each.
        specs: specs of the grafts' tensors, by name.
        reads: the tensors that each graft's tensor is made of.
        make: makes the grafts' tensors.
        turned: modules whose weights are stored (in, out).
        asked: "branch" or "half-folded".
        sources: number of the adapter's tensors that they are made of.
    """

    model: BaseModel
    sites: tuple[Graft, ...]
    specs: Mapping[str, TensorSpec]
    reads: Mapping[str, tuple[TensorRef, ...]]
    make: Callable[[], Mapping[str, torch.Tensor]] = field(repr=False)
    turned: frozenset[str]
    asked: str
    sources: int

    @cached_property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The grafts' tensors, by name. Raises CorruptFile if they belong to another model."""
        return self.make()

    @property
    def way(self) -> str:
        """The form that the adapter has in the graph: "constants" if it has no bottleneck."""
        read = {site.reads for site in self.sites if isinstance(site, BranchGraft)}
        half = self.asked == HALF and not read.isdisjoint((Value.INPUT, Value.PRODUCT))
        return HALF if half else "branch" if read else "constants"

    @property
    def adapted(self) -> tuple[str, ...]:
        """The modules that a part is attached to."""
        return tuple("embeddings" if isinstance(site, PromptGraft) else site.module for site in self.sites)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user of the graph should know."""
        prompts = [self.specs[site.embedding].shape[0] for site in self.sites if isinstance(site, PromptGraft)]
        return tuple(f"per-token outputs have {length} more rows, for the prompt" for length in prompts)

    @property
    def fates(self) -> list[Fate]:
        """The fates of the adapter's tensors."""
        return [Fate.GRAFTED] * self.sources

    def put(self, templates: Sequence[Template]) -> WithAdapters:
        """The template with all parts in its graph; weights that the model does not have are made when they are read.

        Raises Unsupported if the graph does not look as expected at a site.
        """
        (template,) = templates
        own = {spec.name: spec for spec in template.weights}
        model, needed = graft_sites(template.model, self.sites, self.specs, own, self.turned, self.asked)
        used = {tensor.name for tensor in model.graph.initializer}
        weights = [*(spec for spec in template.weights if spec.name in used), *(each.spec for each in needed)]
        made = {each.spec.name: each for each in needed}

        def make(name: str) -> Bytes:
            return bytes_from_tensor(self._build(made[name]))

        grafted = replace(template, model=model, weights=tuple(sorted(weights, key=lambda spec: spec.name)))
        payloads = Beside(self.model.checkpoint, {name: each.spec for name, each in made.items()}, make)
        return WithAdapters((grafted,), payloads, {name: tuple(self._reads(each)) for name, each in made.items()})

    def _reads(self, made: Made) -> Iterator[TensorRef]:
        for part in made.parts:
            yield from (self.model.checkpoint.tensor(part.name),) if part.own else self.reads[part.name]
            yield from self.reads[part.added] if part.added else ()

    def _build(self, made: Made) -> torch.Tensor:
        import torch

        parts = []
        for part in made.parts:
            tensor = self.model.checkpoint.read(part.name) if part.own else self.tensors[part.name]
            if part.added:
                exact = tensor.to(torch.float64) + self.tensors[part.added].to(torch.float64)
                tensor = exact.to(tensor.dtype)
            if part.heads:
                tensor = tensor.view(len(tensor), part.heads, -1).transpose(0, 1).repeat_interleave(part.copies, 0)
            parts.append(tensor.mT if part.turned else tensor)
        return torch.cat(parts, made.axis).reshape(made.spec.shape).contiguous()

    def compare(self, trial: Trial) -> tuple[Verification, None]:
        """How the grafted graph compares with torch. Raises as `check_grafted`."""
        return check_grafted(trial.model, trial.graphs, trial.payload, trial.dtype, self.sites, self.tensors), None


def open_grafts(
    model: BaseModel, kind: ModelKind, adapters: Sequence[AdapterFile], adapters_as: str | None
) -> PartsInGraph | None:
    """The parts to put into a model's graph besides factors of weights; None if there are none.

    Args:
        model: the model; fold may have stored parts next to its weights.
        kind: how the model is used.
        adapters: the opened adapters.
        adapters_as: "branch" or "half-folded", which is the default.

    Raises:
        Unsupported: several adapters, another value of `adapters_as`, or no position left for the input.
        NotMergeable: an adapter that no node can express, or a second one.
        ReportedError: the adapter, as fold.
    """
    if not model.path.is_dir():
        return None
    parts = open_parts(model, adapters[0]) if adapters else None
    beside = model.path / GRAFTS_FILE
    where = adapters[0].path if adapters else beside
    if parts is None and (adapters or not beside.exists()):
        if adapters_as == HALF:
            raise Unsupported(
                "only bottlenecks can be half-folded",
                where=adapters[0].path if adapters else model.path,
                expected="branch or inputs",
                found=adapters_as,
                then="choose one of those with --adapters-as",
            )
        return None
    if len(adapters) > 1:
        raise Unsupported(
            "a graph can hold only one adapter of bottlenecks, prefixes or prompts",
            found=", ".join(str(adapter.path) for adapter in adapters),
            then="export a graph for each of them",
        )
    asked = adapters_as or HALF
    if asked not in WAYS:
        raise Unsupported(
            "bottlenecks, prefixes and prompts cannot be inputs, because the graph fixes their shapes",
            where=where,
            expected=" or ".join(WAYS),
            found=asked,
            then="choose one of those with --adapters-as",
        )
    turned = frozenset(name for name, of in layer_kinds(model.specs).items() if of is LayerKind.TRANSPOSED)
    if parts is None:
        found = _left(beside, model, turned, asked)
    else:
        for part in parts:
            if isinstance(part, Whole) and part.tensors:
                raise Unsupported(
                    "the adapter contains full weights, which a graph of the base does not have",
                    where=part.ref.path,
                    found=", ".join(part.tensors),
                    then=f"fold it first, and export that: surgery fold {model.path} {adapters[0].path} -o folded",
                )
        record = fingerprint_beside(adapters[0])
        grafting = plan_grafting(model, parts, record.digest, half=asked == HALF)
        steps = grafting.steps
        found = PartsInGraph(
            model,
            grafting.sites,
            {spec.name: spec for step in steps for spec in step.asides},
            {spec.name: step.inputs for step in steps for spec in step.asides},
            lambda: {name: tensor for step in steps for name, tensor in _run(step, model.files).items()},
            turned,
            asked,
            len(record.tensors),
        )
    if not isinstance(kind, SinglePass):
        raise Unsupported(
            "bottlenecks, prefixes and prompts can only go into a single graph that sees all tokens at once",
            where=where,
            found="a graph with a cache, or an encoder and a decoder",
            then="omit --with-cache",
        )
    taken = positions_taken(found.sites, {name: spec.shape for name, spec in found.specs.items()})
    if taken >= kind.longest:
        raise Unsupported(
            "the adapter takes all positions of the model, so none remains for the input",
            where=where,
            expected=f"fewer than {kind.longest} tokens",
            found=taken,
        )
    return found


def _left(path: Path, model: BaseModel, turned: frozenset[str], asked: str) -> PartsInGraph:
    """The parts that fold stored next to a model."""
    checkpoint, base = model.files.checkpoint(path), model.checkpoint
    grafts = read_grafts(checkpoint)

    def read() -> dict[str, torch.Tensor]:
        digest = content_digest((spec, tensor_hash(base.read(name))) for name, spec in base.specs.items())
        if digest != grafts.model:
            raise CorruptFile(
                "the grafts belong to a different model than the one next to them",
                where=path,
                expected=f"a model with digest {grafts.model[:16]}",
                found=digest[:16],
                then="fold the adapter into this model again, or remove the file if the model needs no graft",
            )
        return {name: checkpoint.read(name) for name in checkpoint.specs}

    specs = dict(checkpoint.specs)
    reads = {name: (checkpoint.tensor(name),) for name in specs}
    return PartsInGraph(model, grafts.sites, specs, reads, read, turned, asked, len(specs))


def _run(step: Step, files: OpenFiles) -> dict[str, torch.Tensor]:
    """The tensors that a step makes for the graph."""
    assert not isinstance(step.op, TakesOver)  # it makes tensors
    made = step.op(*map(files.read, step.inputs)).asides
    return {spec.name: tensor for spec, tensor in zip(step.asides, made, strict=True) if tensor is not None}
