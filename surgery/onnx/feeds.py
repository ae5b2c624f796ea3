"""What a graph wants to be fed, and random tokens of that description.

Reads the graph alone: input names, types and shapes, and the size of the embedding that the tokens index. Knows
nothing of sessions and clocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import InputsDiffer, Unsupported

if TYPE_CHECKING:
    import numpy as np

    Feeds = dict[str, np.ndarray[Any, np.dtype[Any]]]  # input name → (batch, sequence)

TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class GraphInput:
    """An input as the graph declares it: name, ONNX element type, and shape (a name or None where it varies)."""

    name: str
    element: int
    shape: tuple[int | str | None, ...]


def graph_inputs(model: Any) -> tuple[GraphInput, ...]:
    """The inputs of a loaded ModelProto, initialisers that are listed as inputs left out."""
    initialisers = {tensor.name for tensor in model.graph.initializer}
    return tuple(
        GraphInput(
            value.name,
            value.type.tensor_type.elem_type,
            tuple(
                axis.dim_value if axis.HasField("dim_value") else axis.dim_param or None
                for axis in value.type.tensor_type.shape.dim
            ),
        )
        for value in model.graph.input
        if value.name not in initialisers
    )


def require_same_inputs(a: Path, b: Path, first: Sequence[GraphInput], second: Sequence[GraphInput]) -> None:
    """Raises InputsDiffer unless both graphs take the same names, types and shapes; axis names do not matter."""

    def plain(inputs: Sequence[GraphInput]) -> set[tuple[str, int, tuple[int | None, ...]]]:
        return {(i.name, i.element, tuple(n if isinstance(n, int) else None for n in i.shape)) for i in inputs}

    if plain(first) != plain(second):
        raise InputsDiffer(
            "the two graphs take different inputs, so nothing can be compared",
            where=f"{a} and {b}",
            expected=_described(first),
            found=_described(second),
        )


def _described(inputs: Sequence[GraphInput]) -> str:
    return ", ".join(f"{i.name}{[n if n is not None else '?' for n in i.shape]}" for i in inputs)


def make_feeds(model: Any, path: Path, shape: tuple[int, int], seed: int) -> Feeds:
    """The same inputs for every session: random tokens below the vocabulary's size, masks of ones, no padding.

    Raises:
        Unsupported: an input that is none of those a language model takes, or a shape that the graph does not allow.
    """
    import numpy as np
    import onnx

    rng = np.random.default_rng(seed)
    feeds: Feeds = {}
    for entry in graph_inputs(model):
        if entry.name not in TOKEN_INPUTS:
            raise Unsupported(
                "do not know what to feed this input",
                where=f"{path}: {entry.name}",
                expected=", ".join(TOKEN_INPUTS),
                found=_described([entry]),
            )
        if len(entry.shape) != 2 or any(isinstance(n, int) and n != m for n, m in zip(entry.shape, shape, strict=True)):
            raise Unsupported(
                "the graph does not take this shape",
                where=f"{path}: {entry.name}",
                expected=_described([entry]),
                found=" × ".join(map(str, shape)),
                then="choose another --shape",
            )
        if entry.name == "input_ids":
            array = rng.integers(0, vocabulary(model), shape)  # (batch, sequence)
        elif entry.name == "position_ids":
            array = np.broadcast_to(np.arange(shape[1]), shape)
        else:
            array = np.full(shape, int(entry.name == "attention_mask"))
        feeds[entry.name] = np.ascontiguousarray(array, onnx.helper.tensor_dtype_to_np_dtype(entry.element))
    return feeds


def vocabulary(model: Any) -> int:
    """Rows of the embedding that input_ids index; 100 where the graph hides it."""
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[1] == "input_ids" and node.input[0] in rows:
            return int(rows[node.input[0]])
    return 100
