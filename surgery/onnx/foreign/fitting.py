"""Finds the base's weights in a graph, and checks that a merged model can replace them.

Every float tensor of the graph must be explained: either a recipe makes exactly its bytes from the base's tensors, or
it is a small constant of the graph. A tensor that is neither is refused and named, and so is a merged model with
changes that the graph cannot hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from formats.errors import ShapeMismatch
from formats.spec import TensorSpec, shape_text
from formats.tensors import Bytes, bytes_from_tensor
from surgery.errors import MissingTensors, TemplateMismatch
from surgery.hashes import tensor_hash
from surgery.onnx.files.graph_file import payload
from surgery.onnx.foreign.recipes import Piece, Recipe, alike, find_recipes
from surgery.onnx.foreign.slots import Slot, find_slots

if TYPE_CHECKING:
    import onnx
    import torch

_CONSTANT = 1 << 16  # the most elements of a float constant of the graph
_NAMED = 5  # the most tensors that an error names


class Tensors(Protocol):
    """Named tensors that can be read: a checkpoint, or a model that is merged while it is read."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor, by name."""

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor to the CPU."""


@dataclass(frozen=True)
class Fitting:
    """What a graph's float tensors are.

    Attributes:
        slots: all float tensors, in the order of the file.
        recipes: how each weight is made from the base's tensors, by the slot's index.
    """

    slots: tuple[Slot, ...]
    recipes: Mapping[int, Recipe]

    @property
    def sources(self) -> set[str]:
        """Tensors of the base that are in the graph."""
        return {piece.source for recipe in self.recipes.values() for piece in recipe.pieces}


def fit(model: onnx.ModelProto, where: Path, base: Tensors, base_path: object) -> Fitting:
    """Explains the graph at `where` by the base's tensors.

    Raises:
        TemplateMismatch: a float tensor is neither made from the base's tensors nor a small constant.
        Quantised, UnsafeFile, PathNotFound, CorruptFile: as `find_slots`.
    """
    slots = find_slots(model, where)
    recipes = find_recipes(slots, base.specs, base.read, lambda slot: payload(slot.tensor, where))
    fitting = Fitting(slots, recipes)
    missing = [spec for spec in base.specs.values() if spec.name not in fitting.sources and spec.dtype.is_weight]
    wrong = [
        (slot, reason) for slot in slots if slot.index not in recipes and (reason := _no_constant(slot, missing, base))
    ]
    if wrong or not recipes:
        named = "; ".join(f"{slot}: {reason}" for slot, reason in wrong[:_NAMED])
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise TemplateMismatch(
            "the graph's weights are not all made from the base's tensors",
            where=where,
            expected=f"each to be, byte for byte, a tensor of {base_path}, its transpose, or several concatenated",
            found=f"{named}{more}" if wrong else "none of them",
            then="pass the exact checkpoint from which the graph was exported as --base",
        )
    return fitting


def _no_constant(slot: Slot, missing: Sequence[TensorSpec], base: Tensors) -> str | None:
    """Why a slot without a recipe cannot be a constant of the graph; None if it can."""
    of = next((spec.name for spec in missing if alike(slot.name, spec.name)), None)
    if of is not None:
        return f"has other values than {of}"
    of = next((name for made in slot.made_of for name in base.specs if alike(made, name)), None)
    if of is not None:
        return f"was computed from {of}"
    plain = sorted(axis for axis in slot.shape if axis != 1)
    for spec in missing:
        if slot.size > 1 and sorted(axis for axis in spec.shape if axis != 1) == plain:
            return f"has the shape of {spec.name}, {shape_text(spec.shape)}, but other values"
    if slot.size > _CONSTANT and not slot.is_table:
        return f"is not made from the base, and is too large for a constant of the graph ({slot.size:,} elements)"
    return None


class Change:
    """Compares the merged model with the base: finds tensors that differ, and refuses what the graph cannot hold."""

    def __init__(self, fitting: Fitting, base: Tensors, merged: Tensors, where: Path) -> None:
        _check_specs(fitting, base, merged, where)
        self._fitting, self._base, self._merged, self._where = fitting, base, merged, where
        self._same: dict[str, bool] = {}

    def differs(self, name: str) -> bool:
        """Whether a tensor's values differ between merged model and base, in the merged model's dtype."""
        if name not in self._same:
            before, after = self._base.read(name), self._merged.read(name)
            self._same[name] = tensor_hash(before.to(after.dtype)) == tensor_hash(after)
        return not self._same[name]

    def payload(self, slot: Slot, held: Bytes) -> Bytes:
        """A weight's bytes for the merged model; `held` are the bytes in the graph.

        Raises:
            TemplateMismatch: the weight could be several tensors, and the merge makes them differ.
        """
        recipe = self._fitting.recipes[slot.index]
        result = recipe.build(self._merged.read, slot.dtype)
        changed = not np.array_equal(result, held)
        if len(recipe.pieces) == 1 and recipe.pieces[0].rows is None:
            self._same[recipe.pieces[0].source] = not changed
        for piece in recipe.pieces:
            for rival in piece.rivals:
                if not self._equal(piece, rival, slot):
                    raise self._unclear(slot, f"{piece} or {rival}: equal in the base, not when merged")
        if changed and recipe.doubtful:
            raise self._unclear(slot, f"{recipe}, or a constant of the graph: all its elements are equal")
        if changed and slot.uses > 1:
            self._refuse_shared(slot, recipe)
        return result

    def _equal(self, one: Piece, other: Piece, slot: Slot) -> bool:
        a, b = (Recipe((piece,)).build(self._merged.read, slot.dtype) for piece in (one, other))
        return np.array_equal(a, b)

    def _refuse_shared(self, slot: Slot, recipe: Recipe) -> None:
        """Refuses a weight that several equal tensors of the base may share, as optimisers merge equal tensors, if the
        merge changes these tensors differently."""
        for piece in recipe.pieces:
            module = piece.source.rpartition(".")[0]
            if slot.modules and all(scope and alike(scope, module) for scope in slot.modules):
                continue
            for name in self._twins(piece.source):
                if name not in self._fitting.sources and not self._equal(piece, Piece(name, piece.transposed), slot):
                    raise self._unclear(slot, f"both {piece.source} and {name}: equal in the base, not when merged")

    def _twins(self, name: str) -> list[str]:
        """Other tensors of the base with the same shape, dtype and bytes."""
        spec, own = self._base.specs[name], bytes_from_tensor(self._base.read(name))
        alikes = [
            other.name
            for other in self._base.specs.values()
            if other.name != name and (other.dtype, other.shape) == (spec.dtype, spec.shape)
        ]
        return [other for other in alikes if np.array_equal(own, bytes_from_tensor(self._base.read(other)))]

    def _unclear(self, slot: Slot, found: str) -> TemplateMismatch:
        return TemplateMismatch(
            "nothing tells which of the base's tensors a weight of the graph is",
            where=f"{self._where}: {slot.name}",
            found=found,
            then="export the merged model: surgery export-onnx MERGED -o OUT.onnx",
        )

    def refuse_lost(self) -> None:
        """Raises TemplateMismatch if the merge changed a tensor that is not in the graph."""
        lost = []
        sources = self._fitting.sources
        for name in self._base.specs:
            if name in self._merged.specs and name not in sources and self.differs(name):
                twins = [twin for twin in self._twins(name) if twin in sources]
                after = tensor_hash(self._merged.read(name))
                if not any(tensor_hash(self._merged.read(twin)) == after for twin in twins):
                    lost.append(name)
        if lost:
            raise TemplateMismatch(
                "the merge changes tensors that the graph does not hold in a recognisable form",
                where=self._where,
                found=", ".join(lost[:_NAMED]) + (f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""),
                then="export the merged model: surgery export-onnx MERGED -o OUT.onnx",
            )


def _check_specs(fitting: Fitting, base: Tensors, merged: Tensors, where: Path) -> None:
    for name in sorted(fitting.sources):
        if name not in merged.specs:
            raise MissingTensors(
                "the merged model lacks a tensor that the graph holds",
                where=where,
                expected=name,
                then="export the merged model: surgery export-onnx MERGED -o OUT.onnx",
            )
        before, after = base.specs[name], merged.specs[name]
        if before.shape != after.shape:
            raise ShapeMismatch(
                "a merged tensor has another shape than in the graph",
                where=f"{where}: {name}",
                expected=shape_text(before.shape),
                found=shape_text(after.shape),
                then="export the merged model: surgery export-onnx MERGED -o OUT.onnx",
            )
    added = sorted(merged.specs.keys() - base.specs.keys())
    if added:
        raise TemplateMismatch(
            "the merged model has tensors that the base, and so the graph, does not have",
            where=where,
            found=", ".join(added[:_NAMED]),
            then="export the merged model: surgery export-onnx MERGED -o OUT.onnx",
        )
