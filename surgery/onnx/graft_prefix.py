"""Prefixes left in a graph: constant keys and values before those of an attention, which every token attends to.

An attention is found from the projection of its outputs, backwards: the product with the values, the softmax, the sum
with the mask, the product of queries and keys. Knows names and shapes; no payload, no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from formats.grafts import PrefixGraft
from formats.spec import TensorSpec
from surgery.errors import Unsupported
from surgery.onnx.graph import Graph, attribute
from surgery.onnx.made import Made, Part

if TYPE_CHECKING:
    import onnx

_SEQUENCE = 1  # the axis of tokens in keys and values (batch, sequence, heads, size)
_THEN = "the model's attention has another shape: report the class and its config.json"


@dataclass(frozen=True)
class Attention:
    """The nodes of one attention.

    Attributes:
        keys, values: the nodes that transpose (batch, sequence, heads, size).
        masked: the node that adds the mask to the scores; None without a mask.
        mask: the mask (batch, 1, sequence, sequence), what it adds.
        wide: values whose last axis is the keys' sequence, scores and what comes of them.
    """

    keys: onnx.NodeProto
    values: onnx.NodeProto
    masked: onnx.NodeProto | None
    mask: str
    wide: tuple[str, ...]


def graft_prefix(
    graph: Graph, site: PrefixGraft, tensors: Mapping[str, TensorSpec], *, turned: bool
) -> tuple[Made, ...]:
    """Puts a prefix into a graph, and says which tensors that needs.

    Args:
        graph: changed in place.
        site: which attention.
        tensors: the grafts' own.
        turned: whether the projection's weight is stored (in, out).

    Raises:
        Unsupported: an attention that does not look as expected, or is not as wide as the prefix.
    """
    attention = find_attention(graph, site.module, turned=turned)
    length, width = tensors[site.keys].shape
    heads, size = (int(axis) for axis in graph.axes(attention.keys.input[0])[2:])  # found with them
    if heads * size != width:
        raise Unsupported(
            "the prefix is not as wide as the attention's keys",
            where=site.module,
            expected=f"{heads} heads of {size}",
            found=width,
            then="check that the adapter was made for this model",
        )
    shape, path, made = (1, length, heads, size), f"{site.module}/prefix", []
    longer = f"{length} + {graph.axes(attention.keys.input[0])[_SEQUENCE]}"
    for node, role, source, last in (
        (attention.keys, "keys", site.keys, 3),
        (attention.values, "values", site.values, 2),
    ):
        own, spec = node.input[0], TensorSpec(f"{site.module}.prefix.{role}", tensors[source].dtype, shape)
        made.append(Made(spec, (Part(source),)))
        name = graph.declare(spec, f"{site.module}.weight")
        every = graph.add(
            "Expand",
            [name, batches(graph, 4)],
            f"{path}/{role}/Expand",
            [(f"{path}/{role}", own, ("batch", *shape[1:]))],
        )
        before = graph.axes(own)
        joined = graph.add(
            "Concat",
            [every, own],
            f"{path}/{role}/Concat",
            [(f"{path}/{role}/Concat", own, ("batch", longer, *before[2:]))],
            axis=_SEQUENCE,
        )
        graph.reroute(node, own, joined)
        axes = list(graph.axes(node.output[0]))
        axes[last] = longer
        graph.note(node.output[0], node.output[0], axes)
    for value in attention.wide:
        graph.note(value, value, (*graph.axes(value)[:-1], longer))
    if attention.masked is not None:
        mask = attention.mask
        padded = f"{mask}/prefix_{length}"  # one for all attentions with the same mask
        if graph.maker(padded) is None:
            pads = graph.integers(0, 0, 0, length, 0, 0, 0, 0)
            graph.add("Pad", [mask, pads], padded, [(padded, mask, (*graph.axes(mask)[:-1], longer))])
        graph.reroute(attention.masked, mask, padded)
    return tuple(made)


def batches(graph: Graph, rank: int) -> str:
    """The shape (batch, 1, …), to expand a constant to."""
    name, ones = f"batch_{rank}", graph.integers(*[1] * (rank - 1))
    if graph.maker(name) is None:
        if graph.maker("batch") is None:
            graph.add("Shape", [graph.inputs[0]], "batch", [("batch", ones, (1,))], start=0, end=1)
        graph.add("Concat", ["batch", ones], name, [(name, ones, (rank,))], axis=0)
    return name


def find_attention(graph: Graph, module: str, *, turned: bool) -> Attention:
    """The attention whose outputs a projection takes. Raises Unsupported where it is none that we know."""
    products = graph.products(f"{module}.weight", turned, _THEN)
    walk = _Walk(graph, module)
    context = walk.back(products[0].input[0], "MatMul", over=("Reshape", "Transpose"))
    values = walk.back(context.input[1], "Transpose")
    softmax = walk.back(context.input[0], "Softmax", over=("Cast",))
    wide = [*walk.between(context.input[0], softmax), softmax.output[0]]
    scores, masked, mask = softmax.input[0], None, ""
    inner = walk.back(scores, "Add", "Mul", "Div", "MatMul", over=("Cast",))
    wide += [*walk.between(scores, inner), inner.output[0]]
    if inner.op_type == "Add":
        masked = inner
        sides = [name for name in inner.input if graph.axes(name)[1:2] != (1,)]
        if len(sides) != 1:
            raise walk.unexpected("scores and a mask (batch, 1, sequence, sequence)", inner)
        (mask,) = [name for name in inner.input if name != sides[0]]
        inner = walk.back(sides[0], "Mul", "Div", "MatMul")
        wide.append(inner.output[0])
    if inner.op_type != "MatMul":
        inner = walk.back(inner.input[0], "MatMul")
        wide.append(inner.output[0])
    keys = walk.back(inner.input[1], "Transpose")
    for node in (keys, values):
        axes = graph.axes(node.input[0])
        if len(axes) != 4 or not all(isinstance(axis, int) and axis for axis in axes[2:]):
            raise walk.unexpected("keys and values (batch, sequence, heads, size)", node)
    if _permuted(graph, keys) != 3 or _permuted(graph, values) != 2:
        raise walk.unexpected("keys and values whose sequence comes last, and last but one", keys)
    return Attention(keys, values, masked, mask, tuple(wide))


def _permuted(graph: Graph, node: onnx.NodeProto) -> int:
    """Where the axis of tokens goes."""
    permutation: list[int] = attribute(node, "perm")
    return permutation.index(_SEQUENCE)


@dataclass(frozen=True)
class _Walk:
    """Going back in an attention's graph."""

    graph: Graph
    module: str

    def back(self, value: str, *kinds: str, over: tuple[str, ...] = ()) -> onnx.NodeProto:
        """The node of one of these kinds that makes a value, perhaps by way of others. Raises Unsupported."""
        node = self.graph.maker(value)
        while node is not None and node.op_type in over:
            node = self.graph.maker(node.input[0])
        if node is None or node.op_type not in kinds:
            raise self.unexpected(" or ".join(kinds), node)
        return node

    def between(self, value: str, node: onnx.NodeProto) -> list[str]:
        """The values from one back to a node's own, which is left out."""
        found = []
        while value != node.output[0]:
            found.append(value)
            value = self.graph.makers[value].input[0]
        return found

    def unexpected(self, expected: str, node: onnx.NodeProto | None) -> Unsupported:
        return Unsupported(
            "the graph's attention does not look as a prefix needs it",
            where=self.module,
            expected=expected,
            found="an input" if node is None else f"{node.op_type} ({node.name})",
            then=_THEN,
        )
