"""Puts prompts into the graph of an image model: constant embeddings before those of the patches.

An image has a fixed number of tokens, so the graph contains this number as a constant, in shapes and in the targets of
reshapes. After the embeddings, each of them is increased; a mask is padded with zeros. This module knows names and
shapes; no payload, no file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from surgery.errors import Unsupported
from surgery.onnx.adapters.graph import Graph

if TYPE_CHECKING:
    import onnx

_THEN = "the model's class computes embeddings differently: report the class and its config.json"


def find_embeddings(graph: Graph) -> str:
    """The value of an image's embeddings including positions, (batch, tokens, width). Raises Unsupported if there is
    not exactly one."""
    sums = [node for node in graph.nodes if node.op_type == "Add" and len(graph.axes(node.output[0])) == 3]
    found = [
        str(node.output[0])
        for node in sums
        for table in node.input
        if table in graph.initialisers and graph.axes(table) == (1, *graph.axes(node.output[0])[1:])
    ]
    if len(found) != 1 or not all(isinstance(axis, int) for axis in graph.axes(found[0])[1:]):
        raise _unexpected("one Add of a table of positions (1, tokens, width)", ", ".join(found) or "none")
    return found[0]


def lengthen(graph: Graph, end: str, length: int) -> None:
    """Makes everything after a value expect more tokens, in shapes and in masks.

    Args:
        graph: the graph, changed in place.
        end: the value of the embeddings.
        length: number of additional tokens.

    Raises:
        Unsupported: it is unclear which number in a reshape is the number of tokens.
    """
    tokens = int(graph.axes(end)[1])
    behind = list(_behind(graph, end))
    made = {end, *(name for node in behind for name in node.output)}
    for node in behind:
        if node.op_type == "Reshape":
            _reshape(graph, node, tokens, length)
            continue
        for name in dict.fromkeys(node.input):
            if name not in made and name not in graph.initialisers and graph.axes(name)[-2:] == (tokens, tokens):
                graph.reroute(node, name, _padded(graph, name, tokens, length))
    for node in behind:
        for name in node.output:
            _note(graph, name, tokens, length)


def _behind(graph: Graph, end: str) -> Iterator[onnx.NodeProto]:
    """The nodes that depend on a value."""
    pending, seen = [end], set()
    while pending:
        for node in graph.readers(pending.pop()):
            if node.output[0] not in seen:
                seen.add(node.output[0])
                pending += node.output
                yield node


def _reshape(graph: Graph, node: onnx.NodeProto, tokens: int, length: int) -> None:
    import onnx

    before = list(graph.axes(node.input[0]))
    if node.input[1] not in graph.initialisers:
        raise _unexpected("a Reshape to numbers", node.name)
    shape = onnx.numpy_helper.to_array(graph.initialisers[node.input[1]]).tolist()
    if before.count(tokens) != shape.count(tokens) or shape.count(tokens) > 1:
        raise _unexpected(f"a Reshape with {tokens} tokens in one place", f"{node.name}: {before} to {shape}")
    if tokens in shape:
        shape[shape.index(tokens)] += length
        graph.reroute(node, node.input[1], graph.integers(*shape))


def _padded(graph: Graph, mask: str, tokens: int, length: int) -> str:
    """A mask that is added to scores, padded with zeros at the front. All its readers share one."""
    name = f"{mask}/prompt"
    if graph.maker(name) is None:
        axes = graph.axes(mask)
        pads = graph.integers(*([0] * (len(axes) - 2)), length, length, *([0] * len(axes)))
        graph.add("Pad", [mask, pads], name, [(name, mask, (*axes[:-2], tokens + length, tokens + length))])
    return name


def _note(graph: Graph, name: str, tokens: int, length: int) -> None:
    axes = list(graph.axes(name))
    for place in [1] if len(axes) == 3 else range(1, len(axes)):
        if axes[place] == tokens:
            axes[place] = tokens + length
    graph.note(name, name, axes)


def _unexpected(expected: str, found: str) -> Unsupported:
    return Unsupported(
        "the image model's graph is not built as a prompt needs it", expected=expected, found=found, then=_THEN
    )
