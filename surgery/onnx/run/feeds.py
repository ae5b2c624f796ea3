"""Reads which inputs a graph needs, and makes random tokens, pixels and caches for them.

Reads only the graph: input names, types and shapes, and the size of the embedding that the tokens index. Knows nothing
of sessions and clocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import InputsDiffer, Unsupported

if TYPE_CHECKING:
    import numpy as np

    Feeds = dict[str, np.ndarray[Any, np.dtype[Any]]]  # input name → its array

_SAME_VALUES = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class GraphInput:
    """An input as the graph declares it: name, ONNX element type, and shape (a name or None where it varies)."""

    name: str
    element: int
    shape: tuple[int | str | None, ...]


def graph_inputs(model: Any) -> tuple[GraphInput, ...]:
    """The inputs of a loaded ModelProto, without initialisers that are listed as inputs."""
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
            then="export both graphs in the same way",
        )


def _described(inputs: Sequence[GraphInput]) -> str:
    return ", ".join(f"{i.name}{[n if n is not None else '?' for n in i.shape]}" for i in inputs)


def make_feeds(model: Any, path: Path, shape: tuple[int, int], seed: int) -> Feeds:
    """Makes the same inputs for every session, from each input's name, element type and shape.

    Token ids are random below the vocabulary's size, masks are ones (no padding), and float inputs are standard normal.
    With a cache, batch B and sequence S mean that one new token follows S cached tokens.

    Raises:
        Unsupported: an unknown input, an axis that B and S do not determine, or an axis of another fixed length.
    """
    import numpy as np
    import onnx

    rng = np.random.default_rng(seed)
    inputs = graph_inputs(model)
    extents = _extents(inputs, shape)
    feeds: Feeds = {}
    for entry in inputs:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(entry.element)
        floats = dtype in (np.float16, np.float32, np.float64)
        if entry.name not in TOKEN_INPUTS and not floats:
            raise Unsupported(
                "this input's name and type do not say which values it needs",
                where=f"{path}: {entry.name}",
                expected=f"{', '.join(TOKEN_INPUTS)}, or an input of float16, float32 or float64",
                found=f"{_described([entry])} {dtype}",
                then="export the graph with inputs that have these names or types",
            )
        size = _sizes(entry, extents, path)
        array: np.ndarray[Any, np.dtype[Any]]
        if entry.name == "input_ids":
            array = rng.integers(0, vocabulary(model), size)
        elif entry.name == "position_ids":
            array = np.broadcast_to(np.arange(extents.cached, extents.cached + size[1]), size)
        elif entry.name in TOKEN_INPUTS:
            array = np.full(size, int(entry.name == "attention_mask"))
        else:
            array = rng.standard_normal(size)
        feeds[entry.name] = np.ascontiguousarray(array, dtype)
    return feeds


@dataclass(frozen=True)
class _Extents:
    """The meaning of --shape for one graph: the batch, the tokens of a run, and the number of cached tokens."""

    batch: int
    tokens: int
    cached: int


def tokens_per_run(model: Any, shape: tuple[int, int]) -> int | None:
    """Number of tokens that one run computes; None if the graph takes no tokens."""
    inputs = graph_inputs(model)
    extents = _extents(inputs, shape)
    return extents.batch * extents.tokens if any(entry.name == "input_ids" for entry in inputs) else None


def _extents(inputs: Sequence[GraphInput], shape: tuple[int, int]) -> _Extents:
    if any(map(_is_cache, inputs)):
        return _Extents(shape[0], 1, shape[1])
    return _Extents(shape[0], shape[1], 0)


def _is_cache(entry: GraphInput) -> bool:
    return entry.name.startswith(("past", "cache"))


def _sizes(entry: GraphInput, extents: _Extents, path: Path) -> tuple[int, ...]:
    """The lengths of an input's axes; an axis is fixed, or batch and sequence determine it."""
    wanted = [_length(entry, axis, extents) for axis in range(len(entry.shape))]
    rank_fits = entry.name not in TOKEN_INPUTS or len(wanted) == 2
    sizes = tuple(n for n in wanted if n is not None)
    fits = all(n == m for n, m in zip(entry.shape, wanted, strict=True) if isinstance(n, int))
    if not rank_fits or not fits:
        raise Unsupported(
            "the graph does not take this shape",
            where=f"{path}: {entry.name}",
            expected=_described([entry]),
            found=" × ".join("?" if n is None else str(n) for n in wanted),
            then="choose another --shape",
        )
    if len(sizes) < len(wanted):
        raise Unsupported(
            "batch and sequence do not determine the lengths of this input's axes",
            where=f"{path}: {entry.name}",
            expected="axes that are fixed, or named batch, sequence or past",
            found=_described([entry]),
            then="export the graph with those axes fixed",
        )
    return sizes


def _length(entry: GraphInput, axis: int, extents: _Extents) -> int | None:
    """The length of an axis; None if unknown. Axes other than batch and sequence keep their fixed lengths."""
    said = entry.shape[axis]
    if axis == 0:
        return extents.batch
    if entry.name in TOKEN_INPUTS:
        return extents.tokens + (extents.cached if entry.name == "attention_mask" else 0)
    if isinstance(said, int):
        return said
    name = (said or "").lower()
    if "past" in name or "cache" in name or ("seq" in name and _is_cache(entry)):
        return extents.cached
    return extents.tokens if "seq" in name else None


def vocabulary(model: Any) -> int:
    """Number of rows of the embedding that input_ids index; 100 if the graph does not show it."""
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    tokens = {"input_ids"}  # and reshaped or cast copies
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[1] in tokens and node.input[0] in rows:
            return int(rows[node.input[0]])
        if node.op_type in _SAME_VALUES and node.input[0] in tokens:
            tokens.update(node.output)
    return 100
