"""The positions of a graph's tokens, where an adapter makes them others.

Behind a prefix they begin at a later number. With a prompt among the words RoBERTa counts places, where it else counts
tokens that are no padding. Knows names and shapes; no payload, no file.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from surgery.errors import Unsupported
from surgery.onnx.adapters.graph import Graph

if TYPE_CHECKING:
    import onnx

_THEN = "the model's class embeds otherwise: report it and its config.json"


def move_positions(graph: Graph, by: int) -> None:
    """Has the input's positions begin at another number than 0: in a table of them, or where angles are made of them.

    Raises:
        Unsupported: neither is there just once, at numbers that depend on the sequence alone.
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
            "the prefix moves the input's positions, and the graph has not one place where it looks them up",
            expected="one Gather, or one Cast before the cosines, of positions that count the tokens",
            found=", ".join(node.name for node, _ in found) or "none",
            then=_THEN,
        )
    ((node, positions),) = found
    moved = graph.add("Add", [positions, graph.integers(by)], "prefix/positions", like=positions)
    graph.reroute(node, positions, moved)


def _leads_to(graph: Graph, node: onnx.NodeProto, values: Collection[str]) -> bool:
    """Whether what a node makes comes to one of the values by products, sums and changes of shape alone."""
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
    """Has positions that count tokens other than padding count places instead, beginning at the same number."""
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
    """The node that counts tokens, and what RoBERTa adds to its count, the number of padding; None where positions are
    no such sum."""
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
    """The graph's inputs whose contents a value depends on; their shapes do not count."""
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
