"""Checks that a graph holds the base's weights, and finds where each of them goes.

Every float tensor of the graph must be explained: either a recipe makes its exact bytes from the base's tensors, or it
is a small constant of the graph. A tensor that is neither is refused by name; so is a merged model with changes that
have no place in the graph.
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
from surgery.onnx.foreign.recipes import Recipe, RecipePiece, alike, find_recipes
from surgery.onnx.foreign.slots import Slot

if TYPE_CHECKING:
    import torch

_CONSTANT = 1 << 16  # elements; the largest float table that may be a constant of the graph
_NAMED = 5  # number of tensors that an error names


class Tensors(Protocol):
    """Named tensors that can be read: a checkpoint, or one that is merged while it is read."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor, by name."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""


@dataclass(frozen=True)
class Fitting:
    """How a graph's float tensors are explained.

    Attributes:
        slots: all float tensors, in the order of the file.
        recipes: how each weight is made of the base's tensors, by the slot's index.
    """

    slots: tuple[Slot, ...]
    recipes: Mapping[int, Recipe]

    @property
    def sources(self) -> set[str]:
        """Names of the base's tensors that are in the graph."""
        return {piece.source for recipe in self.recipes.values() for piece in recipe.pieces}


def fit(slots: tuple[Slot, ...], where: Path, base: Tensors, base_path: object) -> Fitting:
    """Explains the float tensors of the graph at `where` by the base's.

    Raises TemplateMismatch if a tensor is neither made of the base's tensors nor a small constant.
    """
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
            "some weights of the graph cannot be made from the base's tensors",
            where=where,
            expected=f"every weight is, byte for byte, a tensor of {base_path}, its transpose, or several joined",
            found=f"{named}{more}" if wrong else "none of them",
            then="pass the exact checkpoint that the graph was exported from as --base",
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
        return f"matches no tensor of the base, and is too large for a constant of the graph ({slot.size:,} elements)"
    return None


class MergedChange:
    """Compares the merged model with the base while it is read: which tensors differ, and which must be refused."""

    def __init__(self, fitting: Fitting, base: Tensors, merged: Tensors, where: Path) -> None:
        _check_specs(fitting, base, merged, where)
        self._fitting, self._base, self._merged, self._where = fitting, base, merged, where
        self._same: dict[str, bool] = {}

    def differs(self, name: str) -> bool:
        """Whether a tensor of the merged model differs in value from the base's, in the merged model's dtype."""
        if name not in self._same:
            before, after = self._base.read(name), self._merged.read(name)
            self._same[name] = tensor_hash(before.to(after.dtype)) == tensor_hash(after)
        return not self._same[name]

    def payload(self, slot: Slot, held: Bytes) -> Bytes:
        """A weight's bytes for the merged model; `held` are the bytes in the graph.

        Raises:
            TemplateMismatch: it could be several tensors, and the merge makes them differ.
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

    def _equal(self, one: RecipePiece, other: RecipePiece, slot: Slot) -> bool:
        a, b = (Recipe((piece,)).build(self._merged.read, slot.dtype) for piece in (one, other))
        return np.array_equal(a, b)

    def _refuse_shared(self, slot: Slot, recipe: Recipe) -> None:
        """Refuses a change to only some of several equal tensors, because optimisers store equal tensors once."""
        for piece in recipe.pieces:
            module = piece.source.rpartition(".")[0]
            if slot.modules and all(scope and alike(scope, module) for scope in slot.modules):
                continue
            for name in self._twins(piece.source):
                if name not in self._fitting.sources and not self._equal(
                    piece, RecipePiece(name, piece.transposed), slot
                ):
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
            "a weight of the graph matches several of the base's tensors equally well",
            where=f"{self._where}: {slot.name}",
            found=found,
            then="export the merged model: surgery export-onnx MERGED -o OUT.onnx",
        )

    def refuse_lost(self) -> None:
        """Raises TemplateMismatch for a tensor that the merge changed and that is not in the graph."""
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
                "the merge changes tensors that are not in the graph, or not in a recognisable form",
                where=self._where,
                found=", ".join(lost[:_NAMED]) + (f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""),
                then="export the merged model: surgery export-onnx MERGED -o OUT.onnx",
            )


def _check_specs(fitting: Fitting, base: Tensors, merged: Tensors, where: Path) -> None:
    for name in sorted(fitting.sources):
        if name not in merged.specs:
            raise MissingTensors("the merged model lacks a tensor that the graph holds", where=where, expected=name)
        before, after = base.specs[name], merged.specs[name]
        if before.shape != after.shape:
            raise ShapeMismatch(
                "a merged tensor does not have the shape that it has in the graph",
                where=f"{where}: {name}",
                expected=shape_text(before.shape),
                found=shape_text(after.shape),
                then="export the merged model: surgery export-onnx MERGED -o OUT.onnx",
            )
    added = sorted(merged.specs.keys() - base.specs.keys())
    if added:
        raise TemplateMismatch(
            "the merged model has tensors that the base does not have, so the graph cannot hold them",
            where=where,
            found=", ".join(added[:_NAMED]),
            then="export the merged model: surgery export-onnx MERGED -o OUT.onnx",
        )
