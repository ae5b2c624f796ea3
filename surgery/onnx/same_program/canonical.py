"""A graph as the program it is: ops, attributes, declared shapes and wiring, without its numbers and without names.

Inputs of a node have an order, and so have the outputs of a graph. So a walk from the outputs back meets the nodes in
an order of its own, whatever their order and their names in the file; numbered by it, two graphs are the same program
if and only if their nodes are equal one by one. What is walked is exactly what the runtime needs for the outputs.

Numbers are payload: initialisers of floating point, or of the small integers that quantised weights are made of, that
have at least one axis. Their shapes count, and which are one and the same; not their values, nor whether they lie in
the graph, beside it, or in a Constant node. What decides shapes, indices and branches (integers, booleans, strings,
scalars) is part of the program, value for value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formats.errors import CorruptFile
from surgery.onnx.files.graph_file import constant_of, payload

if TYPE_CHECKING:
    import onnx

_DEFAULT_DOMAIN = ("", "ai.onnx")
_SHOWN = 8  # elements of a constant that a difference quotes


@dataclass(frozen=True)
class Type:
    """What a value is declared to be: element type and axes; None where nothing is said."""

    text: str


@dataclass(frozen=True)
class CanonicalInput:
    """An input of the graph, or of a subgraph's body at some depth, by its place."""

    depth: int
    index: int
    name: str = field(compare=False)

    def __str__(self) -> str:
        return f"input {self.name}"


@dataclass(frozen=True)
class Weight:
    """A number: the how-manieth, its type, and whether a caller may replace it by an input of that name."""

    number: int
    text: str
    is_input: bool
    name: str = field(compare=False)

    def __str__(self) -> str:
        return f"weight {self.name} {self.text}"


@dataclass(frozen=True)
class Constant:
    """A value that is part of the program."""

    text: str
    digest: str
    shown: str = field(compare=False)

    def __str__(self) -> str:
        return f"constant {self.text} {self.shown}"


@dataclass(frozen=True)
class Result:
    """An output of a node, the node by its number."""

    depth: int
    node: int
    index: int
    name: str = field(compare=False)

    def __str__(self) -> str:
        return f"output {self.index} of {self.name}"


Source = CanonicalInput | Weight | Constant | Result | None  # None where an optional input is left out


@dataclass(frozen=True)
class Node:
    """An op. `outputs` has a type for each output that is there, None for each that is not."""

    op: str
    attributes: tuple[tuple[str, Any], ...]
    inputs: tuple[Source, ...]
    outputs: tuple[Type | None, ...]
    name: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.op} ({self.name})" if self.name else self.op


@dataclass(frozen=True)
class Body:
    """A graph, or one that is a node's attribute.

    Attributes:
        inputs: name (the main graph's only) and type of each.
        nodes: in the order of the walk.
        outputs: name (the main graph's only), source and type of each.
        idle: ops that reach no output, sorted.
    """

    inputs: tuple[tuple[str, Type], ...]
    nodes: tuple[Node, ...]
    outputs: tuple[tuple[str, Source, Type], ...]
    idle: tuple[str, ...]


@dataclass(frozen=True)
class CanonicalProgram:
    """A whole model: the versions of the operator sets that its ops are of, and its main graph."""

    opsets: tuple[tuple[str, int], ...]
    body: Body


def canonical(model: onnx.ModelProto, where: Path, *, folded: bool = False) -> CanonicalProgram:
    """The program of a model.

    Args:
        model: as `load_graph` gives it.
        where: its path; integer constants may lie beside it.
        folded: whether an optimiser has computed constants: floating-point scalars then count as numbers too, since
            they may come from weights.

    Raises:
        CorruptFile: a value that nothing computes, or that is computed from itself.
        FormatError: a constant beside the graph that is not there or not allowed.
    """
    import onnx

    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    body = _Walk(where, folded).body(model.graph, None)
    used = {domain for domain, _ in _ops(body)}
    known = {_domain(entry.domain): entry.version for entry in model.opset_import}
    return CanonicalProgram(tuple(sorted((domain, known.get(domain, 0)) for domain in used)), body)


def _ops(body: Body) -> Iterator[tuple[str, str]]:
    for node in body.nodes:
        domain, _, op = node.op.rpartition("::")
        yield domain, op
        for _, value in node.attributes:
            for inner in value if isinstance(value, tuple) else (value,):
                if isinstance(inner, Body):
                    yield from _ops(inner)


def _domain(domain: str) -> str:
    return "" if domain in _DEFAULT_DOMAIN else domain


class _Scope:
    """One graph while it is walked: who makes each value, and what has been numbered."""

    def __init__(self, graph: onnx.GraphProto, outer: _Scope | None) -> None:
        self.outer = outer
        self.depth: int = 0 if outer is None else outer.depth + 1
        self.proto_nodes = list(graph.node)  # protobuf makes a new wrapper for each access
        self.makers = {name: at for at, node in enumerate(self.proto_nodes) for name in node.output if name}
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.declared = {value.name: value for value in (*graph.value_info, *graph.output)}
        self.given = {value.name for value in graph.input}
        self.sources: dict[str, Source] = {"": None}
        self.nodes: list[Node] = []
        self.walked: set[int] = set()

    def home(self, name: str) -> _Scope | None:
        """The scope that knows the name: this one or one around it."""
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.sources or name in scope.makers or name in scope.tensors:
                return scope
            scope = scope.outer
        return None


class _Walk:
    """What is numbered across all graphs of a model: weights, and the names of axes."""

    def __init__(self, where: Path, folded: bool) -> None:
        self.where = where
        self.folded = folded
        self.weights = 0
        self.axes: dict[str, str] = {}

    def body(self, graph: onnx.GraphProto, outer: _Scope | None) -> Body:
        scope = _Scope(graph, outer)
        inputs: list[tuple[str, Type]] = []
        for value in graph.input:
            if value.name not in scope.tensors:
                scope.sources[value.name] = CanonicalInput(scope.depth, len(inputs), value.name)
                inputs.append((value.name if outer is None else "", self.type_of(value)))
        outputs = []
        for value in graph.output:
            self.reach(scope, value.name)
            home = scope.home(value.name)
            assert home is not None  # or `reach` had raised
            name = value.name if outer is None else ""
            outputs.append((name, home.sources[value.name], self.type_of(value)))
        idle = [
            self.op_of(node)
            for at, node in enumerate(scope.proto_nodes)
            if at not in scope.walked and constant_of(node) is None
        ]
        return Body(tuple(inputs), tuple(scope.nodes), tuple(outputs), tuple(sorted(idle)))

    def reach(self, scope: _Scope, name: str) -> None:
        """Numbers a value and everything it needs, inputs before what they go into."""
        todo = [(scope, name)]
        under_way: set[tuple[int, int]] = set()
        while todo:
            scope, name = todo[-1]
            home = scope.home(name)
            if home is None:
                raise CorruptFile("a value that nothing in the graph computes", where=self.where, found=name)
            if name in home.sources:
                todo.pop()
                continue
            if name in home.tensors:
                home.sources[name] = self.leaf(home.tensors[name], name, name in home.given)
                continue
            at = home.makers[name]
            node = home.proto_nodes[at]
            held = constant_of(node)
            if held is not None:
                home.sources[name] = self.leaf(held, name, False)
                continue
            waiting = [(home, need) for need in node.input if not self.reached(home, need)]
            if not waiting:
                self.number(home, at)
            elif (home.depth, at) in under_way:
                raise CorruptFile("a value that is computed from itself", where=self.where, found=name)
            else:
                under_way.add((home.depth, at))
                todo.extend(reversed(waiting))

    def reached(self, scope: _Scope, name: str) -> bool:
        home = scope.home(name)
        return home is not None and name in home.sources

    def number(self, scope: _Scope, at: int) -> None:
        node = scope.proto_nodes[at]
        attributes = tuple(
            sorted(((a.name, self.value_of(a, scope)) for a in node.attribute), key=lambda pair: pair[0])
        )
        inputs = []
        for name in node.input:
            home = scope.home(name)
            assert home is not None  # or `reach` had raised
            inputs.append(home.sources[name])
        while inputs and inputs[-1] is None:
            inputs.pop()
        outputs = tuple(self.type_named(scope, name) if name else None for name in node.output)
        shown = node.name or (node.output[0] if node.output else "")
        for index, name in enumerate(node.output):
            if name:
                label = f"{node.op_type} ({shown})"
                scope.sources[name] = Result(scope.depth, len(scope.nodes), index, label)
        scope.walked.add(at)
        scope.nodes.append(Node(self.op_of(node), attributes, tuple(inputs), outputs, shown))

    def op_of(self, node: onnx.NodeProto) -> str:
        domain = _domain(node.domain)
        return f"{domain}::{node.op_type}" if domain else node.op_type

    def value_of(self, attribute: onnx.AttributeProto, scope: _Scope) -> Any:
        """An attribute's value as plain data: equal where it means the same."""
        import onnx

        kind = attribute.type
        if kind == onnx.AttributeProto.GRAPH:
            return self.body(attribute.g, scope)
        if kind == onnx.AttributeProto.GRAPHS:
            return tuple(self.body(graph, scope) for graph in attribute.graphs)
        if kind == onnx.AttributeProto.TENSOR:
            return self.constant(attribute.t)
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, (int, float, bytes)):
            return value
        if kind in (onnx.AttributeProto.FLOATS, onnx.AttributeProto.INTS, onnx.AttributeProto.STRINGS):
            return tuple(value)
        return attribute.SerializeToString(deterministic=True)

    def leaf(self, tensor: onnx.TensorProto, name: str, is_input: bool) -> Weight | Constant:
        import onnx

        kinds = onnx.TensorProto
        program = (kinds.INT64, kinds.INT32, kinds.INT16, kinds.UINT64, kinds.UINT32, kinds.BOOL, kinds.STRING)
        if (tensor.dims or self.folded) and tensor.data_type not in program:
            self.weights += 1
            return Weight(self.weights, _text(tensor), is_input, name)
        return self.constant(tensor)

    def constant(self, tensor: onnx.TensorProto) -> Constant:
        import onnx

        kinds = onnx.TensorProto
        data = payload(tensor, self.where)
        elements = [] if tensor.data_type == kinds.STRING else _elements(tensor, data)
        shown = ", ".join(map(str, elements[:_SHOWN])) + (", …" if len(elements) > _SHOWN else "")
        return Constant(_text(tensor), hashlib.sha256(data.data).hexdigest(), shown)

    def type_named(self, scope: _Scope, name: str) -> Type:
        return self.type_of(scope.declared[name]) if name in scope.declared else Type("undeclared")

    def type_of(self, value: onnx.ValueInfoProto) -> Type:
        """`float[?1,?2,32]`: axes without a length are numbered as they come, since their names mean nothing."""
        import onnx

        if not value.type.HasField("tensor_type"):
            return Type(value.type.SerializeToString(deterministic=True).hex() or "undeclared")
        tensor = value.type.tensor_type
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        return Type(f"{kind}[{','.join(map(self.axis, tensor.shape.dim))}]" if tensor.HasField("shape") else kind)

    def axis(self, dim: Any) -> str:
        if dim.HasField("dim_value"):
            return str(dim.dim_value)
        return self.axes.setdefault(dim.dim_param, f"?{len(self.axes) + 1}") if dim.dim_param else "?"


def _text(tensor: onnx.TensorProto) -> str:
    import onnx

    return f"{onnx.TensorProto.DataType.Name(tensor.data_type).lower()}[{','.join(map(str, tensor.dims))}]"


def _elements(tensor: onnx.TensorProto, data: Any) -> list[Any]:
    import onnx

    array = data.view(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return [each.item() for each in array[: _SHOWN + 1]]
