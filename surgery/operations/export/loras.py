"""The adapters that export-onnx keeps in the graph: opens them, adds them as branches, and compares the result.

Their factors are the ones that `convert --to ort` writes. So a graph's inputs and its adapter files have the same
names, and adapters that no graph can hold are refused with the same message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from formats.adapter import Adapter, Told
from formats.dialects import AdapterFile, dialect_named
from formats.dialects.ort import OrtWriter
from formats.dialects.writing import Wanted, Written
from formats.errors import AdapterFormatError
from formats.layers import LayerKind, layer_kinds
from formats.open_files import OpenFiles
from formats.spec import TensorSpec
from formats.tensors import Bytes, bytes_from_tensor
from surgery.errors import Unsupported
from surgery.model.base_model import BaseModel
from surgery.onnx.adapters.lora import WAYS, LoraBranch, graft
from surgery.onnx.against_torch.lora import Agreement, Case, check_graft, worst
from surgery.onnx.against_torch.model import Verification, verify_graphs
from surgery.onnx.files.payload import Beside
from surgery.onnx.trace.template import Template
from surgery.operations.convert.convert import Make
from surgery.operations.export.in_graph import Trial, WithAdapters
from surgery.operations.merge.adapters import open_adapters
from surgery.operations.merge.ops import apply_modules
from surgery.pipeline.plan import Fate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GraphLora:
    """One adapter, and its factors in the form that a graph needs.

    Attributes:
        adapter: the adapter, resolved against the model's tensors.
        written: the output of `convert --to ort` for it.
        branches: its branches in the graph, one for each adapted weight.
        files: the open files from which its tensors are read.
    """

    adapter: Adapter
    written: Written
    branches: tuple[LoraBranch, ...]
    files: OpenFiles

    @classmethod
    def of(cls, adapter: Adapter, model: BaseModel, specs: Mapping[str, TensorSpec]) -> GraphLora:
        """Reads the adapter. Raises Unsupported for a method, a layer or a tensor that no graph can hold."""
        kinds = layer_kinds(specs) if dialect_named(adapter.dialect).lays_out_by_weight else {}
        wanted = Wanted(specs, str(model.path), adapter.component, kinds=kinds)
        try:
            written = OrtWriter().write(adapter, {}, wanted)
        except AdapterFormatError as error:
            raise Unsupported(
                f"the adapter cannot stay in the graph: {error.what}",
                where=f"{adapter.ref.path}: {error.details.get('where', '')}",
                found=error.details.get("found"),
                then=f"merge it, and export the merged model: surgery merge {model.path} {adapter.ref.path} -o merged",
            ) from error
        pieces = {piece.output.name: piece.output for piece in written.pieces}
        branches = []
        for module in adapter.modules:
            product = wanted.product(module)
            assert product is not None  # the writer has refused everything else
            a, b = (pieces[f"{module.target.removesuffix('weight')}lora_{side}"] for side in "AB")
            branches.append(LoraBranch(module.target, a, b, product.module.kind is LayerKind.TRANSPOSED))
        return cls(adapter, written, tuple(branches), model.files)

    def factors(self) -> dict[str, torch.Tensor]:
        """A (in, rank) and B (rank, out) by name, in the graph's dtype. Raises NotFinite."""
        made = {}
        for piece in self.written.pieces:
            (tensor,) = Make(piece)(*map(self.files.read, piece.sources)).tensors
            assert tensor is not None
            made[piece.output.name] = tensor
        return made

    def merged(self, model: BaseModel) -> dict[str, torch.Tensor]:
        """The adapted weights as merge would write them."""
        found = {}
        for module in self.adapter.modules:
            factors = tuple(self.files.read(ref) for _, ref in sorted(module.factors.items()))
            before, dtype = model.checkpoint.read(module.target), model.specs[module.target].dtype
            found[module.target] = apply_modules(before, ((module, 1.0),), factors, dtype)
        return found


@dataclass(frozen=True)
class LorasInGraph:
    """The adapters of one export, in the order of their digests; without any, only the model is exported.

    Attributes:
        model: the model that is exported.
        loras: the adapters.
        as_inputs: whether the graph takes their factors as inputs; otherwise the one adapter's factors are a branch.
    """

    model: BaseModel
    loras: tuple[GraphLora, ...]
    as_inputs: bool

    @classmethod
    def of(
        cls,
        model: BaseModel,
        adapters: Sequence[AdapterFile],
        adapters_as: str,
        specs: Mapping[str, TensorSpec],
        told: Told,
    ) -> LorasInGraph:
        """Reads the adapters.

        Args:
            model: the model that is exported.
            adapters: the opened adapters.
            adapters_as: "branch" or "inputs".
            specs: the model's tensors.
            told: what the adapters' files do not say.

        Raises:
            Unsupported: something that no graph can hold; two adapters as one branch.
            ReportedError: as `open_adapters`.
        """
        if adapters_as not in WAYS:
            raise Unsupported(
                "--adapters-as does not know this value",
                expected=" or ".join(WAYS),
                found=adapters_as,
                then="choose one of those",
            )
        if adapters_as == "branch" and len(adapters) > 1:
            raise Unsupported(
                "a fixed branch can hold only one adapter",
                found=", ".join(str(adapter.path) for adapter in adapters),
                then="combine them first with surgery combine --how cat, or pass --adapters-as inputs",
            )
        opened = open_adapters(model, [(file, None) for file in adapters], specs, told=told) if adapters else ()
        loras = tuple(GraphLora.of(each.adapter, model, specs) for each in opened)
        return cls(model, loras, adapters_as == "inputs")

    @property
    def branches(self) -> tuple[LoraBranch, ...]:
        """One for each weight that any of the adapters changes."""
        found = {branch.weight: branch for each in self.loras for branch in each.branches}
        return tuple(found[name] for name in sorted(found))

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes from reading the adapters, and how to feed them to the graph."""
        said = [note for each in self.loras for note in each.adapter.notes]
        for each in self.loras if self.as_inputs else ():
            path = each.adapter.ref.path
            said.append(
                f"for this graph: surgery convert {path} --to ort --base {self.model.path} -o NAME.onnx_adapter"
            )
        return tuple(said)

    @property
    def fates(self) -> list[Fate]:
        """The fate of every tensor of the adapters; a graph that takes factors as inputs holds none of them."""
        fate = Fate.UNUSED if self.as_inputs else Fate.CONVERTED
        used = [fate for each in self.loras for _ in each.adapter.tensors]
        return used + [Fate.REFUSED for each in self.loras for _ in each.adapter.left]

    @property
    def way(self) -> str:
        """The form that the adapters have in the graph; empty without any."""
        return ("inputs" if self.as_inputs else "branch") if self.loras else ""

    @property
    def adapted(self) -> tuple[str, ...]:
        """The weights that have an adapter."""
        return tuple(branch.weight for branch in self.branches)

    def put(self, templates: Sequence[Template]) -> WithAdapters:
        """Puts the adapters into the graphs; a branch's factors are weights, made when they are read."""
        made = {spec.name: spec for branch in self.branches for spec in (branch.a, branch.b)}
        reads = {piece.output.name: piece.sources for each in self.loras for piece in each.written.pieces}

        def make(name: str) -> Bytes:
            return bytes_from_tensor(self._factors[name])

        return WithAdapters(tuple(map(self._grafted, templates)), Beside(self.model.checkpoint, made, make), reads)

    @cached_property
    def _factors(self) -> dict[str, torch.Tensor]:
        """The factors of all the adapters, by name."""
        return {name: tensor for each in self.loras for name, tensor in each.factors().items()}

    def _grafted(self, template: Template) -> Template:
        here = {spec.name for spec in template.weights}
        branches = tuple(branch for branch in self.branches if branch.weight in here)
        if not branches:
            return template
        factors = () if self.as_inputs else tuple(spec for branch in branches for spec in (branch.a, branch.b))
        weights = tuple(sorted((*template.weights, *factors), key=lambda spec: spec.name))
        return replace(template, model=graft(template.model, branches, inputs=self.as_inputs), weights=weights)

    def compare(self, trial: Trial) -> tuple[Verification, Agreement | None]:
        """Compares the model's graphs with torch, and the grafted ones with the model with merged weights. If the
        factors are inputs, the graphs also run without an adapter.

        Raises:
            VerificationFailed, Unsupported: as `verify_graphs` and `check_graft`.
        """
        verified = verify_graphs(trial.model, trial.plain, trial.payload, trial.dtype)
        cases = [self._case(each) for each in self.loras]
        if cases and self.as_inputs:
            cases.append(Case("no adapter", {}, {}))
        found = [
            check_graft(trial.model, trial.graphs, trial.payload, trial.dtype, self.model.specs, case) for case in cases
        ]
        return verified, worst(found) if found else None

    def _case(self, each: GraphLora) -> Case:
        factors = each.factors() if self.as_inputs else {}
        return Case(
            f"adapter {each.adapter.ref.path}",
            {name: tensor.numpy() for name, tensor in factors.items()},
            each.merged(self.model),
        )
