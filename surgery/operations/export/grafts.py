"""What of an adapter export-onnx puts into the graph because no weight holds it: bottlenecks, prefixes and prompts.

From an adapter, all of it, for comparison; or from what fold left beside the model it wrote. `fold_plan` says what is
put where and makes the tensors; `surgery.onnx.adapters.sites` puts it there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from formats import Checkpoint, DType, open_checkpoint
from formats.dialects.prompts import Whole
from formats.errors import CorruptFile
from formats.grafts import GRAFTS_FILE, BranchGraft, Graft, PromptGraft, Value, read_grafts
from formats.layers import LayerKind, layer_kinds
from formats.spec import TensorSpec
from formats.tensors import Bytes, bytes_from_tensor
from surgery.errors import Unsupported
from surgery.hashes import content_digest, tensor_hash
from surgery.model.config import model_config
from surgery.onnx.adapters.bottleneck import HALF
from surgery.onnx.adapters.sites import WAYS, graft_sites, positions_taken
from surgery.onnx.against_torch.model import Verification
from surgery.onnx.against_torch.sites import check_grafted
from surgery.onnx.files.made import Made
from surgery.onnx.files.payload import Beside, Payloads
from surgery.onnx.trace.program import Exportable
from surgery.onnx.trace.single_pass import SinglePass
from surgery.onnx.trace.template import Template
from surgery.operations.fold.open import fingerprint_beside, open_parts
from surgery.operations.fold.plan import plan_grafting
from surgery.pipeline.plan import Fate, Step, TakesOver

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Grafted:
    """What is put into one graph.

    Attributes:
        sites: what goes where.
        specs: of the grafts' tensors, by name.
        tensors: themselves.
        turned: modules whose weights are stored (in, out).
        asked: "branch" or "half-folded".
        sources: how many tensors of the adapter's they are made of.
    """

    sites: tuple[Graft, ...]
    specs: Mapping[str, TensorSpec]
    tensors: Mapping[str, torch.Tensor]
    turned: frozenset[str]
    asked: str
    sources: int

    @property
    def way(self) -> str:
        """In which form the adapter is in the graph: "constants" where no bottleneck is."""
        read = {site.reads for site in self.sites if isinstance(site, BranchGraft)}
        half = self.asked == HALF and not read.isdisjoint((Value.INPUT, Value.PRODUCT))
        return HALF if half else "branch" if read else "constants"

    @property
    def adapted(self) -> tuple[str, ...]:
        """The modules that something is put to."""
        return tuple("embeddings" if isinstance(site, PromptGraft) else site.module for site in self.sites)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user of the graph should know."""
        prompts = [self.specs[site.embedding].shape[0] for site in self.sites if isinstance(site, PromptGraft)]
        return tuple(f"outputs by token have {length} rows more, the prompt's" for length in prompts)

    @property
    def fates(self) -> list[Fate]:
        """Of the adapter's tensors."""
        return [Fate.GRAFTED] * self.sources

    def put(self, templates: Sequence[Template], base: Checkpoint) -> tuple[tuple[Template, ...], Payloads]:
        """The template with everything in its graph, and the payloads of its weights, each made when it is asked for.

        Raises Unsupported for a site that does not look as expected.
        """
        (template,) = templates
        own = {spec.name: spec for spec in template.weights}
        model, needed = graft_sites(template.model, self.sites, self.specs, own, self.turned, self.asked)
        used = {tensor.name for tensor in model.graph.initializer}
        weights = [*(spec for spec in template.weights if spec.name in used), *(each.spec for each in needed)]
        made = {each.spec.name: each for each in needed}

        def make(name: str) -> Bytes:
            return bytes_from_tensor(self._build(made[name], base))

        grafted = replace(template, model=model, weights=tuple(sorted(weights, key=lambda spec: spec.name)))
        return (grafted,), Beside(base, {name: each.spec for name, each in made.items()}, make)

    def _build(self, made: Made, base: Checkpoint) -> torch.Tensor:
        import torch

        parts = []
        for part in made.parts:
            tensor = base.read(part.name) if part.own else self.tensors[part.name]
            if part.added:
                exact = tensor.to(torch.float64) + self.tensors[part.added].to(torch.float64)
                tensor = exact.to(tensor.dtype)
            if part.heads:
                tensor = tensor.view(len(tensor), part.heads, -1).transpose(0, 1).repeat_interleave(part.copies, 0)
            parts.append(tensor.mT if part.turned else tensor)
        return torch.cat(parts, made.axis).reshape(made.spec.shape).contiguous()

    def compare(
        self,
        model: Exportable,
        plain: Mapping[str, bytes],
        graphs: Mapping[str, bytes],
        payload: Mapping[str, int],
        dtype: DType,
        base: Checkpoint,
    ) -> tuple[Verification, None]:
        """How the grafted graph compares with torch. Raises as `check_grafted`; arguments as `Keeping.compare`."""
        return check_grafted(model, graphs, payload, dtype, self.sites, self.tensors), None


def open_grafts(
    exportable: Exportable, adapters: Sequence[Path], adapters_as: str | None, base: Checkpoint
) -> Grafted | None:
    """What is to be put into a model's graph besides factors of weights; None for nothing of that kind.

    Args:
        exportable: the model; fold may have left something beside its weights.
        adapters: their paths.
        adapters_as: "branch" or "half-folded", which is the default.
        base: the model's tensors.

    Raises:
        Unsupported: several adapters, another way to leave them, or no position left for the input.
        NotMergeable: an adapter that no node can express, or a second one.
        CorruptFile: grafts of another model than the one they lie beside.
        ReportedError: the adapter, as fold.
    """
    model, kind = exportable.where, exportable.kind
    if not model.is_dir():
        return None
    parts = open_parts(model, adapters[0], base) if adapters else None
    beside = model / GRAFTS_FILE
    if parts is None and (adapters or not beside.exists()):
        if adapters_as == HALF:
            raise Unsupported(
                "only bottlenecks are half-folded",
                where=adapters[0] if adapters else model,
                expected="branch or inputs",
                found=adapters_as,
            )
        return None
    if len(adapters) > 1:
        raise Unsupported(
            "a graph has one adapter of bottlenecks, prefixes or prompts", found=", ".join(map(str, adapters))
        )
    asked = adapters_as or HALF
    if asked not in WAYS:
        raise Unsupported(
            "the shapes of bottlenecks, prefixes and prompts are the graph's own, so they are no inputs",
            where=adapters[0] if adapters else beside,
            expected=" or ".join(WAYS),
            found=asked,
        )
    turned = frozenset(name for name, kind in layer_kinds(base.specs).items() if kind is LayerKind.TRANSPOSED)
    if parts is None:
        found = _left(beside, base, turned, asked)
    else:
        for part in parts:
            if isinstance(part, Whole) and part.tensors:
                raise Unsupported(
                    "the adapter carries weights in full, which a graph of the base does not have",
                    where=part.ref.path,
                    found=", ".join(part.tensors),
                    then=f"fold it first, and export that: surgery fold {model} {adapters[0]} -o folded",
                )
        record = fingerprint_beside(adapters[0])
        grafting = plan_grafting(base, model_config(model), parts, record.digest, half=asked == HALF)
        tensors = {name: tensor for step in grafting.steps for name, tensor in _run(step, base).items()}
        specs = {spec.name: spec for step in grafting.steps for spec in step.asides}
        found = Grafted(grafting.sites, specs, tensors, turned, asked, len(record.tensors))
    if not isinstance(kind, SinglePass):
        raise Unsupported(
            "bottlenecks, prefixes and prompts are put into graphs that see all tokens at once",
            where=adapters[0] if adapters else beside,
            found="a graph with a cache, or an encoder and a decoder",
            then="leave out --with-cache",
        )
    taken = positions_taken(found.sites, {name: spec.shape for name, spec in found.specs.items()})
    if taken >= kind.longest:
        raise Unsupported(
            "the adapter takes all positions that the model has, and leaves none to the input",
            where=adapters[0] if adapters else beside,
            expected=f"fewer than {kind.longest} tokens",
            found=taken,
        )
    return found


def _left(path: Path, base: Checkpoint, turned: frozenset[str], asked: str) -> Grafted:
    """What fold left beside a model."""
    with open_checkpoint(path) as checkpoint:
        grafts = read_grafts(checkpoint)
        digest = content_digest((spec, tensor_hash(base.read(name))) for name, spec in base.specs.items())
        if digest != grafts.model:
            raise CorruptFile(
                "the grafts belong to another model than the one they lie beside",
                where=path,
                expected=f"a model with digest {grafts.model[:16]}",
                found=digest[:16],
                then="fold the adapter into this model anew, or remove the file if the model stands for itself",
            )
        tensors = {name: checkpoint.read(name) for name in checkpoint.specs}
        return Grafted(grafts.sites, dict(checkpoint.specs), tensors, turned, asked, len(tensors))


def _run(step: Step, base: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors that a step makes aside."""
    assert not isinstance(step.op, TakesOver)  # it makes tensors
    with ExitStack() as stack:
        opened = {base.ref: base}
        for ref in step.inputs:
            if ref.checkpoint not in opened:
                opened[ref.checkpoint] = stack.enter_context(open_checkpoint(ref.checkpoint.path))
        made = step.op(*(opened[ref.checkpoint].read(ref.name) for ref in step.inputs)).asides
    return {spec.name: tensor for spec, tensor in zip(step.asides, made, strict=True) if tensor is not None}
