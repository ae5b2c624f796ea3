"""Puts prefixes into a graph: constant keys and values in an attention, to which every token attends.

An attention is found by going backwards from its output projection: the product with the values, the softmax, the sum
with the mask, the product of queries and keys. The prefix is concatenated at the last place where keys and values are
(batch, sequence, heads, size), or, if nodes rotate or repeat the heads in between, (batch, heads, sequence, size). This
module knows names and shapes; no payload, no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from formats.grafts import PrefixGraft
from formats.spec import TensorSpec
from surgery.errors import Unsupported
from surgery.onnx.adapters.graph import Graph, attribute
from surgery.onnx.files.made import Made, Part

if TYPE_CHECKING:
    import onnx

_THEN = "the model's attention is built differently: report the class and its config.json"


@dataclass(frozen=True)
class Joint:
    """Where keys or values are concatenated with a prefix.

    Attributes:
        node: the node that reads them.
        value: the keys or values: a value with axes for batch, tokens, heads and size.
        sequence: the axis of tokens: 1 if it comes before the heads, 2 if after them.
    """

    node: onnx.NodeProto
    value: str
    sequence: int


@dataclass(frozen=True)
class Attention:
    """The nodes of one attention.

    Attributes:
        keys, values: where the prefix is concatenated.
        masked: the node that adds the mask to the scores; None without a mask.
        mask: the mask that it adds, (batch, 1, sequence, sequence).
        wide: values whose last axis is the keys' sequence: the scores, and what is computed from them.
    """

    keys: Joint
    values: Joint
    masked: onnx.NodeProto | None
    mask: str
    wide: tuple[str, ...]


def graft_prefix(
    graph: Graph, site: PrefixGraft, tensors: Mapping[str, TensorSpec], *, turned: bool
) -> tuple[Made, ...]:
    """Puts a prefix into a graph, and returns the tensors that the payload then needs.

    Args:
        graph: the graph, changed in place.
        site: the prefix and its attention.
        tensors: the grafts' tensors.
        turned: whether the projection's weight is stored (in, out).

    Raises:
        Unsupported: the attention is not built as expected, or its width differs from the prefix's.
    """
    attention, made = find_attention(graph, site.module, turned=turned), []
    length, width = tensors[site.keys].shape
    for joint, role, source in ((attention.keys, "keys", site.keys), (attention.values, "values", site.values)):
        before = graph.axes(joint.value)
        heads, size = int(before[3 - joint.sequence]), int(before[3])  # found with them
        # If heads were repeated before this place, because several queries share keys, the prefix's are repeated too.
        own = width // size
        if width % size or heads % own or (joint.sequence == 1 and heads != own):
            raise Unsupported(
                "the prefix is not as wide as the attention's keys",
                where=site.module,
                expected=f"{heads} heads of {size}",
                found=width,
                then="check that the adapter was made for this model",
            )
        shape, part = (1, length, heads, size), Part(source)
        if joint.sequence == 2:
            shape, part = (1, heads, length, size), Part(source, heads=own, copies=heads // own)
        spec = TensorSpec(f"{site.module}.prefix.{role}", tensors[source].dtype, shape)
        made.append(Made(spec, (part,)))
        _join(graph, joint, graph.declare(spec, f"{site.module}.weight"), f"{site.module}/prefix/{role}", length)
    longer = _longer(length, graph.axes(attention.keys.value)[attention.keys.sequence])
    for value in attention.wide:
        graph.note(value, value, (*graph.axes(value)[:-1], longer))
    if attention.masked is not None:
        mask = attention.mask
        padded = f"{mask}/prefix_{length}"  # all attentions with the same mask share one
        if graph.maker(padded) is None:
            pads = graph.integers(0, 0, 0, length, 0, 0, 0, 0)
            graph.add("Pad", [mask, pads], padded, [(padded, mask, (*graph.axes(mask)[:-1], longer))])
        graph.reroute(attention.masked, mask, padded)
    return tuple(made)


def _join(graph: Graph, joint: Joint, prefix: str, path: str, length: int) -> None:
    """Lets a node read keys or values with the prefix before them."""
    node, own, axis = joint.node, joint.value, joint.sequence
    before = graph.axes(own)
    every = graph.add(
        "Expand", [prefix, batches(graph, 4)], f"{path}/Expand", [(path, own, ("batch", *graph.axes(prefix)[1:]))]
    )
    joined = list(before)
    joined[axis] = _longer(length, before[axis])
    both = graph.add("Concat", [every, own], f"{path}/Concat", [(f"{path}/Concat", own, joined)], axis=axis)
    graph.reroute(node, own, both)
    if node.op_type == "Transpose":
        turned = [joined[each] for each in attribute(node, "perm")]
        graph.note(node.output[0], node.output[0], turned)


def _longer(length: int, axis: int | str) -> int | str:
    return length + axis if isinstance(axis, int) else f"{length} + {axis}"


def batches(graph: Graph, rank: int) -> str:
    """The shape (batch, 1, …), to which a constant is expanded."""
    name, ones = f"batch_{rank}", graph.integers(*[1] * (rank - 1))
    if graph.maker(name) is None:
        if graph.maker("batch") is None:
            graph.add("Shape", [graph.inputs[0]], "batch", [("batch", ones, (1,))], start=0, end=1)
        graph.add("Concat", ["batch", ones], name, [(name, ones, (rank,))], axis=0)
    return name


def find_attention(graph: Graph, module: str, *, turned: bool) -> Attention:
    """The attention before an output projection. Raises Unsupported if it is not built in a known way."""
    products = graph.products(f"{module}.weight", turned, _THEN)
    walk = _Walk(graph, module)
    context = walk.back(products[0].input[0], "MatMul", over=("Reshape", "Transpose"))
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
    return Attention(walk.joint(inner, -1), walk.joint(context, -2), masked, mask, tuple(wide))


@dataclass(frozen=True)
class _Walk:
    """Walks backwards through an attention's graph."""

    graph: Graph
    module: str

    def back(self, value: str, *kinds: str, over: tuple[str, ...] = ()) -> onnx.NodeProto:
        """The node of one of these kinds that makes a value, skipping nodes of the kinds in `over`. Raises
        Unsupported."""
        node = self.graph.maker(value)
        while node is not None and node.op_type in over:
            node = self.graph.maker(node.input[0])
        if node is None or node.op_type not in kinds:
            raise self.unexpected(" or ".join(kinds), node)
        return node

    def between(self, value: str, node: onnx.NodeProto) -> list[str]:
        """The values from `value` backwards to the node's own value, which is excluded."""
        found = []
        while value != node.output[0]:
            found.append(value)
            value = self.graph.makers[value].input[0]
        return found

    def joint(self, product: onnx.NodeProto, tokens: int) -> Joint:
        """Where the second factor of a product is concatenated; `tokens` is its axis of tokens. Raises Unsupported."""
        node, value, places = product, product.input[1], list(range(4))
        maker = self.graph.maker(value)
        if maker is not None and maker.op_type == "Transpose":
            node, value, places = maker, maker.input[0], attribute(maker, "perm")
        sequence, axes = places[tokens], self.graph.axes(value)
        heads_and_size = (axes[3 - sequence], axes[3]) if sequence in (1, 2) and len(axes) == 4 else ()
        if not heads_and_size or not all(isinstance(axis, int) and axis for axis in heads_and_size):
            raise self.unexpected("keys and values with heads, size, and an axis of tokens", node)
        return Joint(node, value, sequence)

    def unexpected(self, expected: str, node: onnx.NodeProto | None) -> Unsupported:
        return Unsupported(
            "the graph's attention is not built as a prefix needs it",
            where=self.module,
            expected=expected,
            found="an input" if node is None else f"{node.op_type} ({node.name})",
            then=_THEN,
        )
