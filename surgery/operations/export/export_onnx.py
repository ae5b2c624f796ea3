"""export-onnx: writes OUT.onnx from a model, its weights next to it, and adapters in the graph on request.

There are two ways to the same files. Tracing builds the graph without weights, writes all files without names, compares
the graph with torch, and only then gives the files their names. Reusing an existing graph compares the names, dtypes
and shapes that the graph needs with the checkpoint's, and copies the weights; this needs neither torch nor a run. What
a graph contains is left to `surgery.onnx`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from formats.adapter import NOTHING_TOLD, Told
from formats.dialects import AdapterFile
from formats.errors import NotACheckpoint, PathNotFound, UnsupportedDType
from formats.open_files import OpenFiles
from formats.spec import DType
from surgery.errors import Unsupported
from surgery.model.base_model import BaseModel
from surgery.model.stored_dtype import dtype_named
from surgery.onnx.files.payload import attach_payload
from surgery.operations.export.files import Export, check_target, placed, staged
from surgery.operations.export.grafts import open_grafts
from surgery.operations.export.in_graph import AdaptersInGraph, Trial
from surgery.operations.export.loras import LorasInGraph
from surgery.operations.export.plan import ExportPlan, exportable, in_dtype, new_graphs, onto_graphs
from surgery.operations.fold.open import open_single
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Job, header, runs
from surgery.pipeline.plan import Fate, Plan
from surgery.report import Report, Stopwatch

if TYPE_CHECKING:
    import onnx

    from surgery.onnx.against_torch.lora import Agreement
    from surgery.onnx.against_torch.model import Verification
    from surgery.onnx.trace.program import Exportable

_IN_FLOAT32 = (
    "compared over bfloat16 weights and in float32 otherwise, on both sides: ONNX Runtime's CPU provider does not run "
    "bfloat16"
)


@dataclass(frozen=True)
class ExportedGraph:
    """One `.onnx` file.

    Attributes:
        path: path of the file.
        sha256: SHA-256 of the file; equal for models of one architecture, whatever their weights.
        nodes: number of nodes in the graph.
        nodes_run: number of nodes that ONNX Runtime executes after its own optimisation; None if not verified.
        inputs, outputs: names of the graph's inputs and outputs.
    """

    path: str
    sha256: str
    nodes: int
    nodes_run: int | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ExportReport(Report):
    """The result of export-onnx. The ledger counts the checkpoint's tensors: copied into the payload, or not needed.

    Attributes:
        graphs: the graphs: one, or encoder and decoder.
        payload: path of the weights, which the graphs find by file name next to them; the model's own files if used.
        payload_blake3: BLAKE3 of the weight file; None for the model's own files, which are not read.
        traced: whether the graphs were traced in this run, not reused from another export.
        max_abs_error: largest difference from torch at valid tokens; None if not verified.
        max_rel_error: the same, divided by the largest value of its output.
        worst: the output with that difference, and the shape.
        tolerance: the largest max_rel_error that passes.
        float32_error: max_rel_error against the model in float32, if the graphs compute in another dtype.
        shapes: shape of the first input of each comparison.
        model_class: the transformers class, or the function that makes the module; "" if a graph was given.
        dtype: the dtype that the graphs compute in.
        unused: names of the checkpoint's tensors that no graph needs.
        adapters: "branch", "inputs" or "half-folded"; "constants" for prefixes and prompts; empty without adapters.
        adapted: names of the weights that have a LoRA branch, or of the modules that another adapter is attached to.
        adapted_rel_error: max_rel_error against the model with merged weights; None if not verified.
        adapted_tolerance: the largest adapted_rel_error that passes.
    """

    graphs: tuple[ExportedGraph, ...]
    payload: str
    payload_blake3: str | None
    traced: bool
    max_abs_error: float | None
    max_rel_error: float | None
    worst: str | None
    tolerance: float | None
    float32_error: float | None
    shapes: tuple[tuple[int, ...], ...]
    model_class: str
    dtype: str
    unused: tuple[str, ...]
    adapters: str
    adapted: tuple[str, ...]
    adapted_rel_error: float | None
    adapted_tolerance: float | None


def prepare_export_onnx(
    model: str | Path,
    out: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    adapters_as: str | None = None,
    told: Told = NOTHING_TOLD,
    graph: str | Path | None = None,
    with_cache: bool = False,
    dtype: str | None = None,
    factory: str | None = None,
    inputs: Sequence[str] = (),
    force: bool = False,
    verify: bool | None = None,
) -> Job[ExportReport]:
    """Prepares a job that writes OUT.onnx and, next to it, `model.safetensors`.

    In the model's own folder only OUT.onnx is written; it uses the weight files already there. An encoder–decoder
    becomes `encoder_OUT.onnx` and `decoder_OUT.onnx`, which share one set of weights.

    Args:
        model: a Hugging Face folder: config.json, and weights in one file or in shards. With `graph` or `factory` it
            may also be a weight file.
        out: the `.onnx` file. Its folder must not hold another model's `model.safetensors`.
        adapters: LoRA of linear layers, in any dialect that merge reads, to keep separate from the weights; or one
            adapter of bottlenecks, prefixes or prompts, as fold reads it. The parts that fold stored next to the model
            for its graph are added without being named.
        adapters_as: "branch", the default for LoRA: the factors of the one adapter are weights of the graph. "inputs":
            the graph takes LoRA factors as optional inputs, of any rank, for every weight that one of the adapters
            changes; ONNX Runtime fills them from `.onnx_adapter` files, which `convert` writes. "half-folded", the
            default for bottlenecks: if a bottleneck reads a projection's output, its first product is computed
            together with the projection's.
        told: what the adapters' files do not say.
        graph: a graph that an earlier export wrote; it is reused unchanged, and only the weights are new.
        with_cache: take and return the keys and values of past tokens, so that a generation step computes one token.
        dtype: the dtype that the graph computes in: float32, float16 or bfloat16; None for the checkpoint's own.
        factory: `package.module:function`, which returns the torch module. It is imported and called.
        inputs: inputs of the factory's module, each `NAME=DTYPE[AXES]`.
        force: overwrite existing outputs, but never the model itself.
        verify: compare with torch before any file gets its name; None means only if the graph is new.

    Raises:
        UnknownArchitecture, Unsupported, MissingTensors, UnsupportedDType: the model cannot be exported, or no graph
            can hold the adapter; the message says why.
        ShapeMismatch, CorruptFile: the weights do not fit `graph`.
        NotFinite: a weight is beyond the range of `dtype` (when it runs).
        OutputExists: the output exists, or is the input.
        VerificationFailed: ONNX Runtime and torch disagree, on the model's weights or on merged ones (when it runs).
        ReportedError: the adapters, as merge.
    """
    watch, files = Stopwatch(None if graph is not None and not verify else "torch"), OpenFiles()
    source, target, wanted = Path(model), Path(out), dtype_named(dtype)
    _check_source(source, alone=graph is not None or factory is not None)
    besides = tuple(map(Path, adapters))
    check_target(source, target, force, besides)
    if besides and (graph is not None or factory is not None):
        raise Unsupported(
            "adapters can only go into a new graph of a transformers model",
            where=source,
            then="omit --graph and --factory; or merge the adapter first",
        )
    base = BaseModel.open(source, files)
    checks = verify if verify is not None else graph is None
    if graph is not None:
        planned = onto_graphs(Path(graph), base, convert=wanted is not None)
        against = exportable(base, planned.cached, factory, inputs) if checks else None
    else:
        _check_dtype(wanted or DType.F32, wanted, checks and bool(besides), source)
        against = traced = exportable(base, with_cache, factory, inputs)
        for program in traced.kind.programs:
            check_target(source, target.with_name(program.prefix + target.name), force)
        opened = [open_single(path, files) for path in besides]
        planned = new_graphs(traced, base, wanted, in_graph(traced, base, opened, adapters_as, wanted, told))
    read = (*besides, *(() if graph is None else (Path(graph),)))
    return export_job(
        planned, base, target, against=against if checks else None, dtype=wanted, inputs=read, force=force, watch=watch
    )


export_onnx = runs(prepare_export_onnx)


def in_graph(
    model: Exportable,
    base: BaseModel,
    adapters: Sequence[AdapterFile] = (),
    adapters_as: str | None = None,
    dtype: DType | None = None,
    told: Told = NOTHING_TOLD,
) -> AdaptersInGraph:
    """The adapters to put into new graphs: as nodes of their own, or as LoRA of weights. Raises as `open_grafts` and
    `LorasInGraph.of`."""
    return open_grafts(base, model.kind, adapters, adapters_as) or LorasInGraph.of(
        base, adapters, adapters_as or "branch", in_dtype(base.specs, dtype), told
    )


def export_job(
    planned: ExportPlan,
    base: BaseModel,
    target: Path,
    *,
    against: Exportable | None,
    watch: Stopwatch,
    dtype: DType | None = None,
    inputs: tuple[Path, ...] = (),
    force: bool = False,
) -> Job[ExportReport]:
    """A job that writes the planned graphs and weights.

    Args:
        planned: graphs and weights.
        base: the model.
        target: the `.onnx` file.
        against: the model that the graphs are compared with before they appear; None to skip the comparison.
        watch: a stopwatch that started when the verb was called.
        dtype: the dtype that the graphs must compute in, if one was requested.
        inputs: further paths that are read.
        force: overwrite existing outputs.

    Raises:
        UnsupportedDType: the graphs compute in another dtype, or adapters cannot be compared in it.
        OutputExists, WriteFailed: as `Export.check`.
    """
    kept = planned.adapters
    _check_dtype(planned.computed, dtype, bool(against and kept and kept.way), base.path)
    where = placed(planned.weights, planned.payloads, base.path, target)
    graphs = {prefix: attach_payload(graph, where.places) for prefix, graph in planned.graphs.items()}
    # The reused graph may be overwritten: the same bytes are written.
    guarded = inputs if planned.traced else ()
    export = Export(base.path, target, graphs, planned.weights, where, force, guarded)
    export.check()
    notes = (*base.checkpoint.notes, *planned.notes, *_unchecked(planned, against), *(kept.notes if kept else ()))
    plan = Plan("export-onnx", planned.steps(base.checkpoint) if where.layout else (), notes=notes)

    def work(resources: Resources) -> ExportReport:
        with staged(export, planned.payloads) as written:
            found, agreed = _verified(against, planned, export, written.payload) if against else (None, None)
        fates = planned.fates(base.checkpoint)
        ran = agreed.nodes_run if agreed else found.nodes_run if found else {}
        return ExportReport(
            **{**header(plan, watch, target), "ledger": {fate.value: fates.count(fate) for fate in Fate}},
            graphs=tuple(_described(export, prefix, made, ran.get(prefix)) for prefix, made in planned.graphs.items()),
            payload=str(export.payload),
            payload_blake3=written.blake3,
            traced=planned.traced,
            max_abs_error=found.max_abs_error if found else None,
            max_rel_error=found.max_rel_error if found else None,
            worst=found.worst if found else None,
            tolerance=found.tolerance if found else None,
            float32_error=found.float32_error if found else None,
            shapes=found.shapes if found else (),
            model_class=against.name if against else planned.model_class,
            dtype=planned.computed.label,
            unused=planned.unused(base.checkpoint),
            adapters=kept.way if kept else "",
            adapted=kept.adapted if kept else (),
            adapted_rel_error=agreed.max_rel_error if agreed else None,
            adapted_tolerance=agreed.tolerance if agreed else None,
        )

    return Job(plan, (base.path, *inputs), export.outputs, base.files, work, Resources())


def _unchecked(planned: ExportPlan, against: Exportable | None) -> tuple[str, ...]:
    """Notes on what the comparison with torch does not cover."""
    if against is not None:
        return (_IN_FLOAT32,) if planned.computed is DType.BF16 else ()
    return ("not compared with torch",) if planned.traced else ()


def _verified(
    model: Exportable, planned: ExportPlan, export: Export, payload: Mapping[str, int]
) -> tuple[Verification, Agreement | None]:
    from surgery.onnx.against_torch.model import verify_graphs

    if planned.adapters is None:
        return verify_graphs(model, export.graphs, payload, planned.computed), None
    plain = {prefix: attach_payload(graph, export.placed.places) for prefix, graph in planned.plain.items()}
    return planned.adapters.compare(Trial(model, plain, export.graphs, payload, planned.computed))


def _described(export: Export, prefix: str, model: onnx.ModelProto, nodes_run: int | None) -> ExportedGraph:
    graph = model.graph
    return ExportedGraph(
        path=str(export.path(prefix)),
        sha256=hashlib.sha256(export.graphs[prefix]).hexdigest(),
        nodes=len(graph.node),
        nodes_run=nodes_run,
        inputs=tuple(value.name for value in graph.input),
        outputs=tuple(value.name for value in graph.output),
    )


def _check_source(source: Path, alone: bool) -> None:
    if not source.exists():
        raise PathNotFound("no such folder or file", where=source, then="check the path of the model")
    if not source.is_dir() and not alone:
        raise NotACheckpoint(
            "a weight file alone does not say which graph to build",
            where=source,
            expected="a Hugging Face folder: config.json and its weights",
            found="a file",
            then="pass the folder that holds it, with its config.json; or name the function that builds the module: "
            "--factory",
        )


def _check_dtype(computed: DType, wanted: DType | None, kept: bool, source: Path) -> None:
    """Refuses a dtype other than the requested one, and one in which adapters that are `kept` cannot be compared."""
    if wanted is not None and computed is not wanted:
        raise UnsupportedDType(
            "the graph does not compute in the requested dtype",
            where=source,
            expected=wanted,
            found=computed,
            then="omit --dtype or --graph",
        )
    if kept and computed is DType.BF16:
        raise UnsupportedDType(
            "ONNX Runtime's CPU provider does not run bfloat16, so adapters in the graph cannot be compared with torch",
            where=source,
            then="export it unchecked for another provider with --no-verify, or choose --dtype float32 or float16",
        )
