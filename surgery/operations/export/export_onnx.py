"""export-onnx: a model → OUT.onnx, and its weights beside it; adapters in it where that is asked for.

Two ways to the same files. Tracing: builds the graph without weights, writes everything without a name, has it checked
against torch, and only then lets it appear. Onto a graph that exists: the names, dtypes and shapes that the graph is
over are compared with the checkpoint's, and the weights are copied; that takes neither torch nor a run. What a graph is
made of is `surgery.onnx`'s business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from formats import Checkpoint, DType, TensorSpec, open_checkpoint
from formats.adapter import NOTHING_TOLD, Told
from formats.errors import NotACheckpoint, PathNotFound, UnsupportedDType
from surgery.errors import Unsupported
from surgery.model.stored_dtype import dtype_named
from surgery.onnx.files.earlier_export import read_graphs, require_fit, require_same_settings, require_ties, weights_of
from surgery.onnx.files.payload import Payloads, attach_payload
from surgery.operations.export.files import Export, check_target, placed, staged
from surgery.operations.export.grafts import Grafted, open_grafts
from surgery.operations.export.loras import Keeping
from surgery.pipeline.plan import Fate
from surgery.report import Report, Stopwatch, peak_rss

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
        path: where it is.
        sha256: equal for models of one architecture, whatever their weights.
        nodes: nodes of the graph.
        nodes_run: nodes that ONNX Runtime executes after its own optimisation; None if not verified.
        inputs, outputs: the graph's.
    """

    path: str
    sha256: str
    nodes: int
    nodes_run: int | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ExportReport(Report):
    """What export-onnx did. The ledger counts the checkpoint's tensors: copied into the payload, or not needed.

    Attributes:
        graphs: the graphs: one, or encoder and decoder.
        payload: path of the weights, which the graphs find by name beside them; the model's where they are its own.
        payload_blake3: hash of the weights' file; None for the model's own, which are not read.
        traced: whether the graphs were made now, and not taken from another export.
        max_abs_error: largest difference from torch at valid tokens; None if not verified.
        max_rel_error: the same in relation to the largest value of its output.
        worst: the output where that was, and the shape.
        tolerance: what max_rel_error was held against.
        float32_error: max_rel_error against the model in float32, where the graphs compute in another dtype.
        shapes: of the first input of each comparison.
        model_class: the transformers class, or the function that makes the module; "" where a graph was given.
        dtype: what the graphs compute in.
        unused: names of the checkpoint's tensors that no graph needs.
        adapters: "branch", "inputs" or "half-folded"; "constants" of prefixes and prompts; empty without adapters.
        adapted: names of the weights that have LoRA beside them, or of the modules that something else is put to.
        adapted_rel_error: largest difference from the model on merged weights, as max_rel_error; None if not verified.
        adapted_tolerance: what it was held against.
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


def export_onnx(
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
) -> ExportReport:
    """Writes OUT.onnx and, beside it, `model.safetensors`; in the model's own folder OUT.onnx alone, over the files
    that are there. An encoder–decoder becomes `encoder_OUT.onnx` and `decoder_OUT.onnx` over the same weights.

    Args:
        model: a Hugging Face folder: config.json, and weights in one file or in shards. With `graph` or `factory`
            also a file of weights.
        out: the `.onnx` file. Its folder must hold no other model's `model.safetensors`.
        adapters: LoRA of linear layers, in any dialect that merge reads, to be left beside the weights; or one
            adapter of bottlenecks, prefixes or prompts, as fold reads it. What fold left for the graph of the model
            it wrote is put there without being named.
        adapters_as: "branch", LoRA's default: the one adapter's factors are weights of the graph. "inputs": the graph
            takes LoRA's as optional inputs, of any rank, for every weight that one of the adapters changes; ONNX
            Runtime fills them from `.onnx_adapter` files, which `convert` writes. "half-folded", the default for
            bottlenecks: those that read what a projection gives have the first of their products in the
            projection's.
        told: what the adapters' files do not say.
        graph: a graph that an earlier export wrote; it is used as it is, and only the weights are new.
        with_cache: keys and values of tokens gone by as inputs and outputs, so that generation costs a token a step.
        dtype: float32, float16 or bfloat16: what the graph computes in; the checkpoint's own where None.
        factory: `package.module:function`, which returns the torch module. It is imported and called.
        inputs: of the factory's module, each `NAME=DTYPE[AXES]`.
        force: replace what stands there; never the model itself.
        verify: compare with torch before anything appears under its name; None means where the graph is new.

    Raises:
        UnknownArchitecture, Unsupported, MissingTensors, UnsupportedDType: a model that cannot be exported, or an
            adapter that no graph can take, and why.
        ShapeMismatch, CorruptFile: weights that do not fit under `graph`.
        NotFinite: a weight is beyond the range of `dtype`.
        OutputExists: something stands at the output, or the output is the input.
        VerificationFailed: ONNX Runtime and torch disagree, on the model's weights or on merged ones.
        ReportedError: the adapters, as merge.
    """
    watch = Stopwatch(None if graph is not None and not verify else "torch")
    source, target, wanted = Path(model), Path(out), dtype_named(dtype)
    _check_source(source, alone=graph is not None or factory is not None)
    guarded = tuple(map(Path, adapters))
    check_target(source, target, force, guarded)
    if guarded and (graph is not None or factory is not None):
        raise Unsupported(
            "adapters are left in new graphs of transformers' models only",
            where=source,
            then="leave out the graph or the factory; or merge the adapter",
        )
    with open_checkpoint(source) as checkpoint:
        if graph is not None:
            plan = _onto(Path(graph), source, checkpoint, convert=wanted is not None)
            if verify:
                cached = any(name.startswith("past_key_values.") for name in plan.inputs)
                plan = replace(plan, model=_exportable(source, cached, factory, inputs))
        else:
            _check_dtype(wanted or DType.F32, wanted, verify is not False and bool(guarded), source)
            exportable = _exportable(source, with_cache, factory, inputs)
            for program in exportable.kind.programs:
                check_target(source, target.with_name(program.prefix + target.name), force)
            left = open_grafts(exportable, guarded, adapters_as, checkpoint) or Keeping.of(
                source, guarded, adapters_as or "branch", _computed(checkpoint.specs, wanted), told
            )
            plan = _traced(exportable, checkpoint, wanted, left)
        computed = next((spec.dtype for spec in plan.weights if spec.dtype.is_float), DType.F32)
        checked = plan.model if verify or (verify is None and graph is None) else None
        _check_dtype(computed, wanted, bool(checked and plan.left and plan.left.way), source)
        where = placed(plan.weights, plan.payloads, source, target)
        graphs = {prefix: attach_payload(model, where.places) for prefix, model in plan.graphs.items()}
        export = Export(source, target, graphs, plan.weights, where, force, guarded)
        with staged(export, plan.payloads) as files:
            found, agreed = (
                _verified(checked, plan, export, files.payload, computed, checkpoint) if checked else (None, None)
            )
        kept = plan.needed & {spec.name for spec in plan.weights}
        unused = tuple(sorted(checkpoint.specs.keys() - plan.needed))
    fates = [Fate.COPIED] * len(kept) + [Fate.CONVERTED] * (len(plan.needed) - len(kept))
    fates += [Fate.UNUSED] * len(unused) + (plan.left.fates if plan.left else [])
    ran = agreed.nodes_run if agreed else found.nodes_run if found else {}
    unchecked = () if found or graph is not None else ("not compared with torch",)
    if found and computed is DType.BF16:
        unchecked = (_IN_FLOAT32,)
    return ExportReport(
        operation="export-onnx",
        output=str(target),
        seconds=watch.seconds,
        peak_rss_bytes=peak_rss(),
        ledger={fate.value: fates.count(fate) for fate in Fate},
        notes=(*checkpoint.notes, *plan.notes, *unchecked, *(plan.left.notes if plan.left else ())),
        graphs=tuple(_described(export, prefix, model, ran.get(prefix)) for prefix, model in plan.graphs.items()),
        payload=str(export.payload),
        payload_blake3=files.blake3,
        traced=graph is None,
        max_abs_error=found.max_abs_error if found else None,
        max_rel_error=found.max_rel_error if found else None,
        worst=found.worst if found else None,
        tolerance=found.tolerance if found else None,
        float32_error=found.float32_error if found else None,
        shapes=found.shapes if found else (),
        model_class=plan.model.name if plan.model else plan.said,
        dtype=computed.label,
        unused=unused,
        adapters=plan.left.way if plan.left else "",
        adapted=plan.left.adapted if plan.left else (),
        adapted_rel_error=agreed.max_rel_error if agreed else None,
        adapted_tolerance=agreed.tolerance if agreed else None,
    )


@dataclass(frozen=True)
class _Plan:
    """What is to be written, and what to say of it.

    Attributes:
        graphs, plain: by prefix, with the adapters and without; no weight has its place yet.
        weights, payloads: what the payload holds.
        needed: the checkpoint's tensors that the model needs.
        model: what the graphs are checked against.
        left: the adapters in new graphs.
    """

    graphs: Mapping[str, onnx.ModelProto]
    plain: Mapping[str, onnx.ModelProto]
    weights: tuple[TensorSpec, ...]
    payloads: Payloads
    needed: frozenset[str]
    model: Exportable | None
    left: Keeping | Grafted | None = None
    inputs: tuple[str, ...] = ()
    said: str = ""
    notes: tuple[str, ...] = ()


def _onto(graph: Path, source: Path, checkpoint: Checkpoint, convert: bool) -> _Plan:
    """The graphs of another export, if the checkpoint's tensors are what they are over."""
    given = read_graphs(graph)
    weights = weights_of(given)
    require_fit(given, graph, checkpoint, convert)
    require_ties(given[0].ties, checkpoint)
    config = source / "config.json"
    settings = given[0].settings
    notes: tuple[str, ...] = ()
    if settings and config.is_file():
        require_same_settings(given, graph, config)
    elif settings:
        notes = ("no config.json beside the weights: only names, dtypes and shapes were compared with the graph",)
    names = settings.get("architectures") or [""]
    inputs = tuple(name for each in given for name in each.inputs)
    graphs = {each.prefix: each.model for each in given}
    needed = frozenset(spec.name for spec in weights)
    return _Plan(graphs, graphs, weights, checkpoint, needed, None, None, inputs, str(names[0]), notes)


def _computed(specs: Mapping[str, TensorSpec], dtype: DType | None) -> dict[str, TensorSpec]:
    """The tensors in the dtype that the graphs compute in."""
    return {
        name: replace(spec, dtype=dtype) if dtype is not None and spec.dtype.is_float else spec
        for name, spec in specs.items()
    }


def _traced(model: Exportable, checkpoint: Checkpoint, dtype: DType | None, left: Keeping | Grafted) -> _Plan:
    """New graphs, made without weights."""
    from surgery.onnx.against_torch.model import check_structure
    from surgery.onnx.trace.template import build_templates

    bare = build_templates(model, checkpoint.specs, dtype)
    for first, *rest in bare[0].ties:
        require_ties(dict.fromkeys(rest, first), checkpoint)
    templates, payloads = left.put(bare, checkpoint)
    every = {spec.name: spec for template in templates for spec in template.weights}
    weights = tuple(every[name] for name in sorted(every))
    graphs, plain = ({template.prefix: template.model for template in some} for some in (templates, bare))
    for graph in graphs.values():
        check_structure(graph, model.where)
    needed = frozenset(spec.name for template in bare for spec in template.weights)
    return _Plan(graphs, plain, weights, payloads, needed, model, left)


def _exportable(source: Path, cached: bool, factory: str | None, inputs: Sequence[str]) -> Exportable:
    if factory is None:
        from surgery.onnx.trace.architecture import read_architecture

        return read_architecture(source, cached=cached)
    from surgery.onnx.trace.own_module import own_module

    return own_module(source, factory, inputs)


def _verified(
    model: Exportable, plan: _Plan, export: Export, payload: Mapping[str, int], dtype: DType, checkpoint: Checkpoint
) -> tuple[Verification, Agreement | None]:
    from surgery.onnx.against_torch.model import verify_graphs

    if plan.left is None:
        return verify_graphs(model, export.graphs, payload, dtype), None
    plain = {prefix: attach_payload(graph, export.placed.places) for prefix, graph in plan.plain.items()}
    return plan.left.compare(model, plain, export.graphs, payload, dtype, checkpoint)


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
        raise PathNotFound("no such folder or file", where=source)
    if not source.is_dir() and not alone:
        raise NotACheckpoint(
            "the graph is built from a folder, not from a weight file alone",
            where=source,
            expected="a Hugging Face folder: config.json and its weights",
            found="a file",
            then="pass the folder that holds it, with its config.json; or say what builds the module: --factory",
        )


def _check_dtype(computed: DType, wanted: DType | None, kept: bool, source: Path) -> None:
    """Refuses a dtype that is not the one asked for, and one that adapters which are `kept` cannot be compared in."""
    if wanted is not None and computed is not wanted:
        raise UnsupportedDType(
            "the graph computes in another dtype than the one asked for",
            where=source,
            expected=wanted,
            found=computed,
            then="leave out --dtype, or --graph",
        )
    if kept and computed is DType.BF16:
        raise UnsupportedDType(
            "ONNX Runtime's CPU provider does not run bfloat16, so adapters in the graph cannot be compared with torch",
            where=source,
            then="export it unchecked for another provider with --no-verify, or choose --dtype float32 or float16",
        )
