"""Finds how each weight of a graph is made from a checkpoint's tensors: unchanged, transposed, or concatenated.

A recipe is valid only if it makes exactly the graph's bytes from the base's tensors. Names, metadata and shapes prove
nothing: query, key, value and output share a shape. They only decide between tensors with equal bytes, the strongest
evidence first: the same name; the values that the optimiser says it folded; the module of the node that uses the
weight. Tensors are read one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from formats.spec import DType, TensorSpec
from formats.tensors import Bytes, bytes_from_tensor, torch_dtype
from surgery.hashes import payload_hash
from surgery.onnx.foreign.slots import Slot

if TYPE_CHECKING:
    import torch

Read = Callable[[str], "torch.Tensor"]


@dataclass(frozen=True)
class Piece:
    """One part of a recipe: a tensor, its transpose (of the last two axes), or some of its rows.

    Attributes:
        source: name of the base's tensor.
        transposed: whether it is transposed.
        rows: first row and end, if it is only a range of rows.
        rivals: tensors of the base with the same bytes that cannot be distinguished from this one.
    """

    source: str
    transposed: bool = False
    rows: tuple[int, int] | None = None
    rivals: tuple[Piece, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        part = "" if self.rows is None else f"[{self.rows[0]}:{self.rows[1]}]"
        return f"{self.source}{part}ᵀ" if self.transposed else f"{self.source}{part}"

    def take(self, read: Read, dtype: DType) -> torch.Tensor:
        """The part of the source, in this dtype."""
        tensor = read(self.source).to(torch_dtype(dtype))
        if self.rows is not None:
            tensor = tensor.reshape(-1, _width(tensor.shape))[slice(*self.rows)]
        return tensor.transpose(-1, -2) if self.transposed else tensor


@dataclass(frozen=True)
class Recipe:
    """How a weight is made from pieces.

    Attributes:
        pieces: the pieces, stacked by rows.
        transposed: whether the stack is then transposed, so that the pieces are side by side.
        doubtful: whether the weight could also be a constant of the graph, because all its elements are equal and
            nothing names it.
    """

    pieces: tuple[Piece, ...]
    transposed: bool = False
    doubtful: bool = False

    def __str__(self) -> str:
        if len(self.pieces) == 1:
            return str(self.pieces[0])
        return f"[{'; '.join(map(str, self.pieces))}]{'ᵀ' if self.transposed else ''}"

    def build(self, read: Read, dtype: DType) -> Bytes:
        """The bytes for a graph of this dtype; each element is rounded once if the dtype is narrower."""
        import torch

        parts = [piece.take(read, dtype) for piece in self.pieces]
        if len(parts) == 1:
            return bytes_from_tensor(parts[0])
        whole = torch.cat([part.reshape(-1, _width(part.shape)) for part in parts])  # (rows, width)
        return bytes_from_tensor(whole.T if self.transposed else whole)


def find_recipes(
    slots: Sequence[Slot], specs: Mapping[str, TensorSpec], read: Read, payload: Callable[[Slot], Bytes]
) -> dict[int, Recipe]:
    """The recipe of every slot that has one, by the slot's index.

    Args:
        slots: the graph's slots.
        specs: the base's tensors.
        read: reads one of the base's tensors.
        payload: reads a slot's bytes in the graph.
    """
    weights = [spec for spec in specs.values() if spec.dtype.is_weight and spec.shape and spec.size]
    found = {}
    exact = _same_bytes(slots, weights, read, payload)
    for slot in slots:
        if slot.index in exact:
            uniform = _is_uniform(payload(slot), slot.dtype)
            piece, told = _chosen(slot, exact[slot.index], uniform)
            found[slot.index] = Recipe((piece,), doubtful=uniform and not told)
    left = [slot for slot in slots if slot.index not in found and slot.size]
    heads = _Heads(left, weights, read)
    for slot in left:
        held = payload(slot)
        recipe = heads.assemble(slot, held) or _slice(slot, held, weights, read)
        if recipe is not None:
            found[slot.index] = replace(recipe, doubtful=recipe.doubtful or _is_uniform(held, slot.dtype))
    return found


def _same_bytes(
    slots: Sequence[Slot], weights: Iterable[TensorSpec], read: Read, payload: Callable[[Slot], Bytes]
) -> dict[int, list[Piece]]:
    """For each slot, the tensors or transposes with the same bytes."""
    sizes = {(slot.size, slot.dtype) for slot in slots}
    digests: dict[tuple[DType, str], list[Slot]] = {}
    for slot in slots:
        digests.setdefault((slot.dtype, payload_hash(payload(slot))), []).append(slot)
    found: dict[int, list[Piece]] = {}
    for spec in weights:
        dtypes = [dtype for size, dtype in sizes if size == spec.size]
        if not dtypes:
            continue
        tensor = read(spec.name)
        for dtype in dtypes:
            cast = tensor.to(torch_dtype(dtype))
            for transposed in (False, True) if len(spec.shape) > 1 and min(spec.shape[-2:]) > 1 else (False,):
                key = (dtype, payload_hash(bytes_from_tensor(_oriented(cast, transposed))))
                for slot in digests.get(key, ()):
                    found.setdefault(slot.index, []).append(Piece(spec.name, transposed))
    return found


def _chosen(slot: Slot, candidates: Sequence[Piece], uniform: bool) -> tuple[Piece, bool]:
    """The candidate with the strongest evidence, with rivals if it is not unique; and whether there is any evidence.

    The module is not used as evidence if all elements are equal: a fused node may use one module's zeros in another.
    """
    told = False
    for says in (_called, _named, _folded) if uniform else (_called, _named, _folded, _used_by_module):
        named = [piece for piece in candidates if says(slot, piece.source)]
        candidates, told = named or candidates, told or bool(named)
        if told and len(candidates) == 1:
            break
    first, *others = sorted(candidates, key=str)
    return replace(first, rivals=tuple(others)), told


def _is_uniform(payload: Bytes, dtype: DType) -> bool:
    elements = payload.reshape(-1, dtype.itemsize)
    return bool((elements == elements[0]).all())


def _called(slot: Slot, source: str) -> bool:
    return slot.name == source


def _named(slot: Slot, source: str) -> bool:
    return alike(slot.name, source)


def _folded(slot: Slot, source: str) -> bool:
    return any(alike(name, source) for name in slot.made_of)


def _used_by_module(slot: Slot, source: str) -> bool:
    module = source.rpartition(".")[0]
    return bool(module) and any(scope and alike(scope, module) for scope in slot.modules)


def alike(one: str, other: str) -> bool:
    """Whether two dotted names are equal, or one is the other with a prefix."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


class _Heads:
    """The base's tensors by their first rows, to find those that are concatenated in a slot."""

    def __init__(self, slots: Sequence[Slot], weights: Sequence[TensorSpec], read: Read) -> None:
        self._read = read
        self._pieces: dict[tuple[DType, bytes], list[tuple[Piece, int]]] = {}  # first row → piece and its rows
        wanted = {(slot.dtype, width) for slot in slots for width in _widths(slot.shape)}
        if not wanted:
            return
        for spec in weights:
            turns = [(False, spec.shape)] if len(spec.shape) != 2 else [(False, spec.shape), (True, spec.shape[::-1])]
            fitting = [
                (dtype, turn, spec.size // width)
                for turn, shape in turns
                for dtype, width in wanted
                if width == _width(shape)
            ]
            if not fitting:
                continue
            tensor = read(spec.name)
            for dtype, turn, rows in fitting:
                first = _oriented(tensor, turn).reshape(rows, -1)[0].to(torch_dtype(dtype))
                key = (dtype, bytes_from_tensor(first).tobytes())
                self._pieces.setdefault(key, []).append((Piece(spec.name, turn), rows))

    def assemble(self, slot: Slot, payload: Bytes) -> Recipe | None:
        """The recipe of at least two pieces that gives the slot's bytes; None if there is none."""
        for transposed in (False, True) if len(slot.shape) == 2 else (False,):
            shape = slot.shape[::-1] if transposed else slot.shape
            width = _width(shape)
            rows = payload.reshape(slot.shape[0], -1, slot.dtype.itemsize) if transposed else payload
            if transposed:  # (rows, columns, bytes) → (columns, rows, bytes)
                rows = np.ascontiguousarray(rows.transpose(1, 0, 2))
            pieces = self._stack(slot.dtype, rows.reshape(-1, width * slot.dtype.itemsize))
            if pieces is not None and len(pieces) > 1:
                return Recipe(pieces, transposed)
        return None

    def _stack(self, dtype: DType, rows: Bytes) -> tuple[Piece, ...] | None:
        """The pieces that lie one below the other; `rows` is (rows, bytes of a row)."""
        pieces: list[Piece] = []
        at = 0
        while at < len(rows):
            fitting: dict[int, list[Piece]] = {}
            for piece, height in self._pieces.get((dtype, rows[at].tobytes()), ()):
                if height <= len(rows) - at and self._is(piece, dtype, rows[at : at + height]):
                    fitting.setdefault(height, []).append(piece)
            if not fitting:
                return None
            height = max(fitting)
            first, *others = sorted(fitting[height], key=str)
            pieces.append(replace(first, rivals=tuple(others)))
            at += height
        return tuple(pieces)

    def _is(self, piece: Piece, dtype: DType, rows: Bytes) -> bool:
        return np.array_equal(bytes_from_tensor(piece.take(self._read, dtype)), rows.reshape(-1))


def _slice(slot: Slot, payload: Bytes, weights: Iterable[TensorSpec], read: Read) -> Recipe | None:
    """A range of rows of a tensor that the optimiser names as the source, such as positions of a fixed length."""
    for spec in weights:
        if not any(alike(name, spec.name) for name in slot.made_of):
            continue
        row = _width(spec.shape) * slot.dtype.itemsize
        whole, wanted = bytes_from_tensor(read(spec.name).to(torch_dtype(slot.dtype))).tobytes(), payload.tobytes()
        found = [begin for begin in range(0, len(whole), row) if whole.startswith(wanted, begin)]
        if found and len(wanted) % row == 0:
            first, rows = found[0] // row, len(wanted) // row
            return Recipe((Piece(spec.name, rows=(first, first + rows)),), doubtful=len(found) > 1)
    return None


def _width(shape: Sequence[int]) -> int:
    """The number of elements in a row; a vector counts as a column."""
    return shape[-1] if len(shape) > 1 else 1


def _widths(shape: Sequence[int]) -> set[int]:
    return {_width(shape), shape[0]} if len(shape) == 2 else {_width(shape)}


def _oriented(tensor: torch.Tensor, transposed: bool) -> torch.Tensor:
    return tensor.transpose(-1, -2) if transposed else tensor
