"""Plans what export-onnx writes, before a weight is read: graphs, their weights, and the adapters in them.

New graphs are traced without weights. Graphs of an earlier export are reused, if the checkpoint has the tensors that
they need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from formats.checkpoint import Checkpoint
from formats.spec import DType, TensorRef, TensorSpec
from surgery.model.base_model import BaseModel
from surgery.onnx.files.earlier_export import read_graphs, require_fit, require_same_settings, require_ties, weights_of
from surgery.onnx.files.payload import Payloads
from surgery.operations.export.in_graph import AdaptersInGraph
from surgery.pipeline.ops import Copy
from surgery.pipeline.plan import Elsewhere, Fate, Step

if TYPE_CHECKING:
    import onnx

    from surgery.onnx.trace.program import Exportable


@dataclass(frozen=True)
class ExportPlan:
    """The graphs and weights to write, and what to report.

    Attributes:
        graphs, plain: the graphs by prefix, with the adapters and without; no weight has its place yet.
        weights, payloads: the contents of the payload.
        needed: the checkpoint's tensors that the model needs.
        model_class: the model class for the report.
        adapters: the adapters in new graphs; None if the graphs come from another export.
        reads: the tensors that a weight is made of, for weights that the checkpoint does not have.
        notes: notes for the user.
    """

    graphs: Mapping[str, onnx.ModelProto]
    plain: Mapping[str, onnx.ModelProto]
    weights: tuple[TensorSpec, ...]
    payloads: Payloads
    needed: frozenset[str]
    model_class: str
    adapters: AdaptersInGraph | None = None
    reads: Mapping[str, tuple[TensorRef, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def computed(self) -> DType:
        """The dtype that the graphs compute in."""
        return next((spec.dtype for spec in self.weights if spec.dtype.is_float), DType.F32)

    @property
    def traced(self) -> bool:
        """Whether the graphs were traced in this run, not reused from another export."""
        return self.adapters is not None

    @property
    def cached(self) -> bool:
        """Whether the graphs take keys and values of past tokens."""
        names = (value.name for graph in self.graphs.values() for value in graph.graph.input)
        return any(name.startswith("past_key_values.") for name in names)

    def unused(self, base: Checkpoint) -> tuple[str, ...]:
        """Names of the checkpoint's tensors that no graph needs."""
        return tuple(sorted(base.specs.keys() - self.needed))

    def fates(self, base: Checkpoint) -> list[Fate]:
        """The fate of every tensor of the checkpoint and of the adapters."""
        copied = len(self.needed & {spec.name for spec in self.weights})
        fates = [Fate.COPIED] * copied + [Fate.CONVERTED] * (len(self.needed) - copied)
        return fates + [Fate.UNUSED] * len(self.unused(base)) + (self.adapters.fates if self.adapters else [])

    def steps(self, base: Checkpoint) -> tuple[Step, ...]:
        """The steps that write the payload, one for each weight."""
        steps = []
        for spec in self.weights:
            made = self.reads.get(spec.name)
            inputs = (base.tensor(spec.name),) if made is None else made
            taken = Copy(spec.name) if base.specs.get(spec.name) == spec else Elsewhere("make" if made else "convert")
            steps.append(Step(spec.name, inputs, (spec,), taken))
        return tuple(steps)


def onto_graphs(graph: Path, model: BaseModel, convert: bool) -> ExportPlan:
    """The graphs of another export, if the model has the tensors that they need.

    Args:
        graph: the `.onnx` file.
        model: the model whose weights the graphs will use.
        convert: whether weights of another floating-point dtype will be converted.

    Raises:
        PathNotFound, CorruptFile, Unsupported: the graph, as `read_graphs`; another config.json; tied tensors that
            differ.
        MissingTensors, ShapeMismatch, UnsupportedDType: as `require_fit`.
    """
    given, checkpoint = read_graphs(graph), model.checkpoint
    weights = weights_of(given)
    require_fit(given, graph, checkpoint, convert)
    require_ties(given[0].ties, checkpoint)
    settings = given[0].settings
    notes: tuple[str, ...] = ()
    if settings and model.path.is_dir() and model.config_file is not None:
        require_same_settings(given, graph, model)
    elif settings:
        notes = ("no config.json next to the weights: only names, dtypes and shapes were compared with the graph",)
    names = settings.get("architectures") or [""]
    graphs = {each.prefix: each.model for each in given}
    needed = frozenset(spec.name for spec in weights)
    return ExportPlan(graphs, graphs, weights, checkpoint, needed, str(names[0]), notes=notes)


def new_graphs(model: Exportable, base: BaseModel, dtype: DType | None, adapters: AdaptersInGraph) -> ExportPlan:
    """Graphs that are traced without weights, with adapters in them.

    Args:
        model: the model to trace.
        base: its tensors.
        dtype: the dtype that the graphs compute in; None for the checkpoint's own.
        adapters: the adapters to put into the graphs.

    Raises:
        ReportedError: as `build_templates` and `AdaptersInGraph.put`; Unsupported for tied tensors that differ.
    """
    from surgery.onnx.against_torch.model import check_structure
    from surgery.onnx.trace.template import build_templates

    bare = build_templates(model, base.specs, dtype)
    for first, *rest in bare[0].ties:
        require_ties(dict.fromkeys(rest, first), base.checkpoint)
    made = adapters.put(bare)
    every = {spec.name: spec for template in made.templates for spec in template.weights}
    weights = tuple(every[name] for name in sorted(every))
    graphs, plain = ({template.prefix: template.model for template in some} for some in (made.templates, bare))
    for graph in graphs.values():
        check_structure(graph, model.where)
    needed = frozenset(spec.name for template in bare for spec in template.weights)
    return ExportPlan(graphs, plain, weights, made.payloads, needed, model.name, adapters, made.reads)


def exportable(model: BaseModel, cached: bool, factory: str | None, inputs: Sequence[str]) -> Exportable:
    """The model to trace and compare: a transformers class or a function's module. Raises as the readers of these."""
    if factory is None:
        from surgery.onnx.trace.architecture import read_architecture

        return read_architecture(model, cached=cached)
    from surgery.onnx.trace.own_module import own_module

    return own_module(model, factory, inputs)


def in_dtype(specs: Mapping[str, TensorSpec], dtype: DType | None) -> dict[str, TensorSpec]:
    """The tensors in the dtype that the graphs compute in."""
    return {
        name: replace(spec, dtype=dtype) if dtype is not None and spec.dtype.is_float else spec
        for name, spec in specs.items()
    }
