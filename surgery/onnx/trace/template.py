"""From a model's architecture to its ONNX graph, without weights.

Two exports of one architecture give the same bytes, whatever the weights, the process or the folder. While the graph
is optimised, every weight is a graph *input*, so that no pass can read its value, fold it or rename it; afterwards it
becomes an initialiser again, under the checkpoint's name. Then all information on where and how the graph was made is
dropped, and nodes are named after their modules. Reads no payload and writes no file; `payload` decides where the
weights go.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from formats.errors import UnsupportedDType
from formats.spec import DType, TensorSpec
from surgery.errors import Unsupported
from surgery.onnx.files.graph_file import PRODUCER
from surgery.onnx.files.settings import SETTINGS, TIES, as_text
from surgery.onnx.trace.architecture import checkpoint_specs, quiet, stored_ties
from surgery.onnx.trace.program import Exportable, Program, called, example
from surgery.report import uncollected

if TYPE_CHECKING:
    import onnx

OPSET = 20  # 23 broke ONNX Runtime's RotaryEmbedding on the CPU
IR_VERSION = 10
RUNNABLE = (DType.F32, DType.F16)  # the dtypes that ONNX Runtime's CPU provider runs
_SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter notes which module a node comes from


@dataclass(frozen=True)
class Template:
    """A graph whose weights have names and shapes, but no values yet.

    model: the ModelProto; each weight is an initialiser with external data and no location yet.
    weights: the tensors that the payload must hold, under the checkpoint's names, sorted; in the graph's dtype.
    ties: groups of names that the model ties but the checkpoint stores separately; the graph uses the first.
    prefix: prefix of the file name, if the model has several graphs.
    """

    model: onnx.ModelProto
    weights: tuple[TensorSpec, ...]
    ties: tuple[tuple[str, ...], ...]
    prefix: str = ""


def build_template(model: Exportable, specs: Mapping[str, TensorSpec], dtype: DType | None = None) -> Template:
    """The only graph of a model, as `build_templates` builds it."""
    (template,) = build_templates(model, specs, dtype)
    return template


def build_templates(
    model: Exportable, specs: Mapping[str, TensorSpec], dtype: DType | None = None
) -> tuple[Template, ...]:
    """Exports every graph of a model once.

    Args:
        model: its class or function, and how it is used.
        specs: the checkpoint's tensors; only names, dtypes and shapes are used.
        dtype: the dtype that the graph computes in; None for the checkpoint's own.

    Raises:
        MissingTensors: the checkpoint lacks tensors that the module has.
        UnsupportedDType: no `dtype` is given, and ONNX Runtime's CPU provider does not run the checkpoint's
            floating-point dtype, or there are several.
        Unsupported: torch cannot trace the model, or the config contradicts the shapes.
    """
    probe = model.build(DType.F32)
    stored = checkpoint_specs(probe, specs, model.where)
    _refuse_foreign(model, stored)
    wanted = dtype or _dtype(model, stored)
    module = probe if wanted is DType.F32 else model.build(wanted)
    stored = {
        name: replace(spec, dtype=wanted) if spec.dtype.is_float else spec
        for name, spec in checkpoint_specs(module, specs, model.where).items()
    }
    ties = stored_ties(module, specs)
    notes = {SETTINGS: as_text(model.settings), TIES: as_text(_tied(module, stored))}
    templates = []
    for program in model.kind.programs:
        with quiet(), uncollected():
            traced = _trace(module, program, model, wanted)
            _optimise(traced, stored)
        proto, used = _canonical(traced, stored, program, model)
        for key, value in sorted(notes.items()):
            proto.metadata_props.add(key=key, value=value)
        templates.append(Template(proto, tuple(sorted(used, key=lambda spec: spec.name)), ties, program.prefix))
    return tuple(templates)


def _tied(module: Any, stored: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The module's other names of a tied tensor → its name in the graph."""
    groups: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return {
        name: stored[name].name
        for names in groups.values()
        for name in names
        if len(names) > 1 and name in stored and name != stored[name].name
    }


def _refuse_foreign(model: Exportable, stored: Mapping[str, TensorSpec]) -> None:
    odd = next((spec for spec in stored.values() if spec.dtype.is_float and not spec.dtype.is_weight), None)
    if odd is not None:
        raise UnsupportedDType(
            "a weight is quantised",
            where=f"{model.where}: {odd.name}",
            expected="F64, F32, F16 or BF16",
            found=odd.dtype,
            then="surgery merge --dtype dequantises float8 while it merges",
        )


def _dtype(model: Exportable, stored: Mapping[str, TensorSpec]) -> DType:
    counts = Counter(spec.dtype for spec in stored.values() if spec.dtype.is_float)
    if len(counts) > 1:
        odd = {dtype: next(s.name for s in stored.values() if s.dtype is dtype) for dtype in counts}
        raise UnsupportedDType(
            "the checkpoint mixes floating-point dtypes, but a graph computes in one",
            where=model.where,
            expected="one of F32, F16 throughout",
            found=", ".join(f"{n} tensors in {dtype} ({odd[dtype]} is one)" for dtype, n in counts.items()),
            then="choose one: --dtype float32 or --dtype float16",
        )
    dtype = next(iter(counts), DType.F32)
    if dtype not in RUNNABLE:
        raise UnsupportedDType(
            f"ONNX Runtime's CPU provider does not run {dtype}",
            where=model.where,
            expected="F32 or F16",
            found=dtype,
            then="pass --dtype float32 or --dtype float16; or, for another provider, --dtype bfloat16",
        )
    return dtype


def _trace(module: Any, program: Program, model: Exportable, dtype: DType) -> Any:
    """The exporter's unoptimised onnx_ir model, with every parameter under its module's name."""
    import torch

    inputs = example(program, dtype)
    hints = torch.export.Dim
    dynamic = {
        each.parameter: {
            index: hints.AUTO if axis.startswith("total_") else hints.DYNAMIC  # a total is a sum of others
            for index, axis in enumerate(each.axes)
            if isinstance(axis, str)
        }
        for each in program.inputs
    }
    try:
        with torch.no_grad(), called(module, program):
            traced = torch.export.export(module, (), kwargs=inputs, dynamic_shapes=dynamic, strict=False)
        exported = torch.onnx.export(
            traced,
            (),
            kwargs=inputs,
            input_names=[each.name for each in program.inputs],
            output_names=_output_names(traced),
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    except Exception as error:  # torch raises many kinds; the first line is what a user can read
        raise Unsupported(
            f"torch cannot export {model.name} as one graph",
            where=model.where,
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
        ) from error
    assert exported is not None
    return exported.model


def _output_names(program: Any) -> list[str]:
    """`last_hidden_state`, `logits`: the field names of the model's output, in the graph's order."""
    from torch.utils import _pytree

    spec = program.call_spec.out_spec
    output = _pytree.tree_unflatten(range(spec.num_leaves), spec)
    names = [f"output_{index}" for index in range(spec.num_leaves)]
    for name, leaf in output.items() if isinstance(output, Mapping) else ():
        if isinstance(leaf, int):
            names[leaf] = str(name)
    return names


def _optimise(model: Any, stored: Mapping[str, TensorSpec]) -> None:
    """Runs the exporter's optimiser without access to the weights: they are graph inputs, in the order of the file."""
    import onnx_ir.passes.common as passes
    from onnxscript import rewriter

    graph = model.graph
    for name in [name for name in graph.initializers if name in stored]:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    passes.InlinePass()(model)
    _fold(model)
    rewriter.rewrite(model)  # folding has uncovered its patterns, and it uncovers constants
    _fold(model)
    for finish in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.OutputFixPass(),
        passes.TopologicalSortPass(),
        passes.NameFixPass(),
    ):
        finish(model)


def _fold(model: Any) -> None:
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    optimizer.fold_constants(model, onnx_shape_inference=True)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedFunctionsPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)


def _canonical(
    model: Any, stored: Mapping[str, TensorSpec], program: Program, source: Exportable
) -> tuple[onnx.ModelProto, list[TensorSpec]]:
    """The graph, without information on how it was made, and the weights it uses.

    Nodes are named after their module (`encoder.layer.0.attention.self.query/MatMul`), values after their node,
    constants by their order, axes as the program calls them.
    """
    import onnx
    import onnx_ir as ir

    graph = model.graph
    order_nodes(graph)
    weights = [value for value in graph.inputs if value.name in stored]
    used = {stored[value.name].name: value for value in weights if value.uses()}  # tied weights: one initialiser
    inputs = [value for value in graph.inputs if value.name not in stored]
    for value in weights:
        value.name = stored[value.name].name
    outputs = {id(value) for value in graph.outputs}
    between = [v for node in graph for v in node.outputs if id(v) not in outputs and v.type and v.shape]
    _rename_axes(inputs, [*between, *graph.outputs], program, source)
    counts: Counter[str] = Counter()
    for node in graph.all_nodes():
        node.name = _numbered(counts, "/".join(filter(None, (_scope(node), node.op_type))))
        for index, value in enumerate(node.outputs):
            if id(value) not in outputs:
                value.name = f"{node.name}:{index}" if index else node.name
    order = {id(value): index for index, value in enumerate(v for node in graph for v in _needs(node))}
    constants = sorted(graph.initializers.values(), key=lambda value: order.get(id(value), len(order)))
    for index, value in enumerate(constants):
        value.name = value.const_value.name = f"constant_{index}"

    proto = onnx.ModelProto(ir_version=IR_VERSION, producer_name=PRODUCER)
    for domain, version in sorted(model.opset_imports.items()):
        proto.opset_import.add(domain=domain, version=version)
    proto.graph.name = "model"
    for node in graph:
        proto.graph.node.append(_bare(ir.serde.serialize_node(node)))
    for target, values in ((proto.graph.input, inputs), (proto.graph.output, graph.outputs)):
        for value in values:
            target.append(_bare(ir.serde.serialize_value(value)))
    for value in between:  # without shapes, ONNX Runtime does not fuse Add and LayerNormalization
        proto.graph.value_info.append(_bare(ir.serde.serialize_value(value)))
    for value in constants:
        proto.graph.initializer.append(_bare(ir.serde.serialize_tensor(value.const_value)))
    for name in sorted(used):
        proto.graph.initializer.add(
            name=name,
            dims=used[name].shape.numpy(),
            data_type=int(used[name].dtype),
            data_location=onnx.TensorProto.EXTERNAL,
        )
    return proto, [spec for spec in {s.name: s for s in stored.values()}.values() if spec.name in used]


def order_nodes(graph: Any) -> None:
    """Sorts a graph's nodes in the order in which its outputs need them. The module's order is not deterministic:
    Gemma 3 iterates over a set of layer kinds, whose order differs between Python processes."""
    ordered: dict[Any, None] = {}
    open_nodes = [value.producer() for value in reversed(graph.outputs)]
    while open_nodes:
        node = open_nodes[-1]
        needed = [] if node is None or node in ordered else [value.producer() for value in _needs(node)]
        waiting = [each for each in needed if each is not None and each.graph is graph and each not in ordered]
        if waiting:
            open_nodes += reversed(waiting)
            continue
        open_nodes.pop()
        if node is not None:
            ordered[node] = None
    assert len(ordered) == len(graph)  # what is unused has been removed
    graph.remove(list(ordered))
    graph.extend(ordered)


def _needs(node: Any) -> list[Any]:
    """The values that a node reads, including those that its subgraphs read."""
    from onnx_ir import AttributeType

    read = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        inner = [attribute.value] if attribute.type == AttributeType.GRAPH else []
        inner = list(attribute.value) if attribute.type == AttributeType.GRAPHS else inner
        read += [value for graph in inner for each in graph.all_nodes() for value in _needs(each)]
        read += [value for graph in inner for value in graph.outputs]
    return read


def _rename_axes(inputs: list[Any], outputs: list[Any], program: Program, source: Exportable) -> None:
    """Renames torch.export's symbols (`s43`) to the program's axes; an axis derived from them only stays variable.

    Raises Unsupported if the model allows only one size for an axis that should vary.
    """
    import onnx_ir as ir

    names: dict[str, str] = {}
    declared = {each.name: each.axes for each in program.inputs}
    for value in inputs:
        for axis, name in zip(value.shape, declared[value.name], strict=True):
            if isinstance(name, str) and isinstance(axis, int):
                raise Unsupported(
                    f"{source.name} accepts only one size for an axis that should vary",
                    where=f"{source.where}: {value.name}",
                    expected=f"{name} of any size",
                    found=f"{axis} only",
                    then="declare that axis as a number",
                )
            if isinstance(name, str):
                names[str(axis)] = name

    def named(symbol: str) -> str | None:
        parts = [names.get(part) for part in symbol.split(" + ")]
        if sorted(map(str, parts)) == ["past_sequence", "sequence"]:
            return "total_sequence"
        return parts[0] if len(parts) == 1 else None

    for value in (*inputs, *outputs):
        if value.shape is not None:
            value.shape = ir.Shape([n if isinstance(n, int) else named(str(n)) for n in value.shape])


def _scope(node: Any) -> str:
    """The dotted path of the torch module that a node comes from; empty if the optimiser made the node."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    scope = scopes[-2] if len(scopes) > 1 else ""
    return "" if scope.startswith("_") else scope  # the exporter's own placeholder, where it knows no module


def _numbered(counts: Counter[str], name: str) -> str:
    counts[name] += 1
    return name if counts[name] == 1 else f"{name}_{counts[name] - 1}"


def _bare(proto: Any) -> Any:
    """Drops doc strings and metadata, also in subgraphs, and sorts attributes by name."""
    import onnx

    proto.ClearField("doc_string")
    if proto.DESCRIPTOR.fields_by_name.get("metadata_props"):
        proto.ClearField("metadata_props")
    if isinstance(proto, onnx.NodeProto):
        attributes = sorted(proto.attribute, key=lambda attribute: attribute.name)
        del proto.attribute[:]
        proto.attribute.extend(_bare(attribute) for attribute in attributes)
    if isinstance(proto, onnx.AttributeProto):
        for subgraph in (*([proto.g] if proto.HasField("g") else []), *proto.graphs):
            _bare(subgraph)
    if isinstance(proto, onnx.GraphProto):
        del proto.value_info[:]
        for child in (*proto.node, *proto.initializer, *proto.input, *proto.output):
            _bare(child)
    return proto
