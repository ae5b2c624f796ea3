"""Changes the positions of a graph's tokens where an adapter requires it.

After a prefix, positions begin at a higher number. With a prompt among the word embeddings, RoBERTa counts all places
instead of the tokens that are not padding. This module knows names and shapes; no payload, no file.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from surgery.errors import Unsupported
from surgery.onnx.adapters.graph import Graph

if TYPE_CHECKING:
    import onnx

_THEN = "the model's class computes positions differently: report the class and its config.json"


def move_positions(graph: Graph, by: int) -> None:
    """Makes the input's positions begin at `by` instead of 0, where they are looked up in a table or used for angles.

    Raises:
        Unsupported: there is not exactly one such place with positions that depend only on the sequence's length.
    """
    tables = [node for node in graph.nodes if node.op_type == "Gather" and node.input[0] in graph.initialisers]
    along = [(node, node.input[1]) for node in tables if graph.axes(node.input[1])[-1:] == ("sequence",)]
    counts = [count[0].output[0] for _, positions in along if (count := _counted(graph, positions)) is not None]
    counted = [(reader, value) for value in counts for reader in graph.readers(value)]
    angles = {node.input[0] for node in graph.nodes if node.op_type == "Cos"}
    casts = [(node, node.input[0]) for node in graph.nodes if node.op_type == "Cast" and _leads_to(graph, node, angles)]
    found = counted + [(node, positions) for node, positions in along + casts if not _looks_at(graph, positions)]
    if len(found) != 1:
        raise Unsupported(
            "the prefix shifts the input's positions, but the graph does not use positions in exactly one place",
            expected="one Gather, or one Cast before the cosines, of positions that count the tokens",
            found=", ".join(node.name for node, _ in found) or "none",
            then=_THEN,
        )
    ((node, positions),) = found
    moved = graph.add("Add", [positions, graph.integers(by)], "prefix/positions", like=positions)
    graph.reroute(node, positions, moved)


def _leads_to(graph: Graph, node: onnx.NodeProto, values: Collection[str]) -> bool:
    """Whether a node's output reaches one of the values through products and changes of shape only."""
    pending = [node.output[0]]
    while pending:
        value = pending.pop()
        if value in values:
            return True
        pending += [
            reader.output[0]
            for reader in graph.readers(value)
            if reader.op_type in ("Mul", "MatMul", "Concat", "Transpose", "Unsqueeze", "Reshape")
        ]
    return False


def count_places(graph: Graph) -> None:
    """Makes positions that count non-padding tokens count all places instead, beginning at the same number."""
    for node in list(graph.nodes):
        count = _counted(graph, node.input[1]) if node.op_type == "Gather" else None
        if count is None:
            continue
        path, tokens, like = f"{node.name}/places", graph.inputs[0], node.input[1]
        first = graph.integer(count[1] + 1)
        length = graph.add("Shape", [tokens], f"{path}/Shape", [(f"{path}/Shape", like, (1,))], start=1, end=2)
        number = graph.add("Squeeze", [length], f"{path}/Squeeze", [(f"{path}/Squeeze", "", ())])
        end = graph.add("Add", [number, first], f"{path}/end", [(f"{path}/end", "", ())])
        numbers = graph.add("Range", [first, end, graph.integer(1)], path, [(path, like, ("sequence",))])
        graph.reroute(node, like, numbers)
        graph.drop_unread(like)
        graph.note(node.output[0], node.output[0], graph.axes(node.output[0])[1:])


def _counted(graph: Graph, positions: str) -> tuple[onnx.NodeProto, int] | None:
    """The node that counts tokens, and the padding index that RoBERTa adds to its count; None if the positions are not
    such a sum."""
    import onnx

    total = graph.maker(positions)
    if total is None or total.op_type != "Add" or total.input[1] not in graph.initialisers:
        return None
    node = graph.maker(total.input[0])
    while node is not None and node.op_type in ("Cast", "Mul"):
        node = graph.maker(node.input[0])
    if node is None or node.op_type != "CumSum" or graph.axes(total.input[1]):
        return None
    return node, int(onnx.numpy_helper.to_array(graph.initialisers[total.input[1]]))


def _looks_at(graph: Graph, value: str) -> list[str]:
    """The graph's inputs on whose content a value depends; dependence on their shapes does not count."""
    found, pending, seen = [], [value], set()
    while pending:
        name = pending.pop()
        if name in graph.inputs:
            found.append(name)
        node = graph.maker(name)
        if node is not None and node.op_type != "Shape" and name not in seen:
            pending += node.input
        seen.add(name)
    return found
