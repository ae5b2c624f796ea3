"""Pairs base and tuned, tensor by tensor: which changes become factors, which are stored in full, which are left out.

Shared by extract and spectrum. Reads headers only; errors that names and shapes reveal are raised here, all together.
Knows no linear algebra and no output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from formats.checkpoint import Checkpoint
from formats.errors import ShapeMismatch
from formats.layers import LayerKind, ancestors, owner
from formats.spec import DType, TensorSpec, shape_text
from surgery.errors import NothingToDo, SurgeryError
from surgery.model.base_model import BaseModel
from surgery.model.layer_kinds import ASKED, Structure, learn_structure
from surgery.model.patterns import select
from surgery.model.stored_dtype import refuse_quantised


@dataclass(frozen=True)
class Choice:
    """The tensors of a pair to consider.

    Attributes:
        include, exclude: patterns over tensor names; an empty `include` means all.
        kinds: pattern → kind of weight, where it is ambiguous (see `surgery.model.layer_kinds`).
        allow_removed: extract even if tuned lacks tensors of base, which an adapter cannot remove.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)
    allow_removed: bool = False


@dataclass(frozen=True)
class Matrix:
    """A weight whose change can become factors.

    Attributes:
        module: the layer that holds it.
        spec: its spec in the file.
        kind: how the layer stores it.
        swapped: whether it is a stack of experts stored as (experts, in, out).
        beside: the layer's other tensors, which have no factors, in the order of the file.
    """

    module: str
    spec: TensorSpec
    kind: LayerKind
    swapped: bool
    beside: tuple[str, ...] = ()

    def alone(self) -> Matrix:
        """The weight without the layer's other tensors."""
        return replace(self, beside=())

    @property
    def matrices(self) -> int:
        """The number of matrices in the weight; more than one for a stack of experts."""
        return self.spec.shape[0] if self.kind is LayerKind.PARAMETER and len(self.spec.shape) == 3 else 1

    @property
    def sides(self) -> tuple[int, int]:
        """(out, in) of each of its matrices."""
        shape = self.spec.shape
        if self.kind is LayerKind.CONV:
            return shape[0], self.spec.size // shape[0]
        rows, columns = shape[-2:]
        swapped = self.swapped or self.kind in (LayerKind.TRANSPOSED, LayerKind.EMBEDDING)
        return (columns, rows) if swapped else (rows, columns)

    @property
    def break_even(self) -> int:
        """The largest rank at which factors are smaller than the weight; 0 if none is."""
        out, into = self.sides
        return (out * into - 1) // (out + into)

    def bytes_per_rank(self, dtype: DType) -> int:
        """Bytes of one column of lora_B and one row of lora_A, for all matrices in the weight."""
        return self.matrices * sum(self.sides) * dtype.itemsize


@dataclass(frozen=True)
class FullTensors:
    """Tensors that are stored in full if they changed; with `together`, all of a module's tensors or none."""

    label: str
    names: tuple[str, ...]
    together: bool


@dataclass(frozen=True)
class Pairing:
    """Every tensor of both files, once.

    Attributes:
        base, tuned: the files.
        matrices, wholes: the weights and other tensors to compare.
        left: tensors that are left out because the user asked for it.
        removed: tensors of base that tuned lacks.
        structure: the kinds of the weights.
        notes: remarks for the user.
    """

    base: Checkpoint
    tuned: Checkpoint
    matrices: tuple[Matrix, ...]
    wholes: tuple[FullTensors, ...]
    left: tuple[str, ...]
    removed: tuple[str, ...]
    structure: Structure
    notes: tuple[str, ...]

    def known_as(self, name: str) -> str:
        """The model's own name for a tensor of the file; transformers renames some while loading."""
        return self.structure.names.get(name, name)

    @property
    def parameters(self) -> dict[str, tuple[Matrix, ...]]:
        """The matrices outside of layers, by module, in the order in which the module registers them."""
        found: dict[str, list[Matrix]] = {}
        for matrix in self.matrices:
            if matrix.kind is LayerKind.PARAMETER:
                found.setdefault(matrix.module, []).append(matrix)
        order = {name: place for place, name in enumerate(self.structure.order)}
        return {
            module: tuple(sorted(matrices, key=lambda matrix: order.get(matrix.spec.name, 0)))
            for module, matrices in found.items()
        }


def pair(
    before: BaseModel,
    after: BaseModel,
    choice: Choice,
    pays: Callable[[Matrix], bool] = lambda matrix: matrix.break_even > 0,
) -> Pairing:
    """Pairs the tensors of both files, module by module.

    Args:
        before, after: base and tuned; only their specs and the config.json of either are used.
        choice: the user's choice.
        pays: whether a weight's factors are smaller than the weight; otherwise it is stored in full.

    Raises:
        Quantised: weights of base or tuned are not plain floats.
        ShapeMismatch: tensors of the same name differ in shape; all of them are listed.
        NothingToDo: there are no names in common.
        SurgeryError: a pattern matches nothing, a weight's kind is ambiguous, or tensors were removed without
            `allow_removed`.
    """
    base, tuned = before.checkpoint, after.checkpoint
    where = f"{base.ref.path} and {tuned.ref.path}"
    removed = tuple(name for name in base.specs if name not in tuned.specs)
    chosen = set(select([*tuned.specs, *removed], choice.include, choice.exclude))
    for model in (before, after):
        refuse_quantised(model, chosen)
    _check_names(base, tuned, where)
    structure = learn_structure((after, before), choice.kinds)
    grown = _check_shapes(base, tuned, structure, where)
    _check_removed([name for name in removed if name in chosen], choice.allow_removed, where)
    tied = [
        name
        for name, kind in structure.kinds.items()
        if kind is LayerKind.EMBEDDING and _is_tied(name, tuned, structure)
    ]
    modules: dict[str, list[str]] = {}
    for name in tuned.specs:
        if name in chosen:
            modules.setdefault(owner(name), []).append(name)
    found = [
        matrix
        for module, names in modules.items()
        for matrix in _matrices(base, tuned, module, names, structure)
        if matrix.spec.name not in (*grown, *tied)
    ]
    matrices = [matrix for matrix in found if pays(matrix)]
    awkward = _awkward_parameters(matrices, modules)
    matrices = _with_rest([matrix for matrix in matrices if matrix.spec.name not in awkward], modules)
    _check_doubts(matrices, structure, where)
    carried = {name for matrix in matrices for name in (matrix.spec.name, *matrix.beside)}
    # A layer that could have factors is stored under its own name: as a saved module it would no longer be tied.
    layers = {owner(name) for name in structure.kinds if name in base.specs}
    wholes = _wholes(base, tuned, modules, carried, layers)
    left = tuple(name for name in (*tuned.specs, *removed) if name not in chosen)
    notes = _notes(tied, grown, tuned, base, removed, left)
    small = len(found) - len(matrices) - len(awkward)
    if small:
        weights = "1 weight is" if small == 1 else f"{small} weights are"
        notes.append(f"{weights} smaller than the factors would be: stored in full if changed")
    convolutions = sum(matrix.kind is LayerKind.CONV for matrix in matrices)
    if convolutions and not structure.names:
        notes.append(
            f"{convolutions} convolutions are assumed to have no groups or dilation, which files do not record; peft "
            "cannot adapt others: --kind 'PATTERN=full'"
        )
    if awkward:
        notes.append(f"{', '.join(sorted(awkward))}: peft cannot adapt these parameters: stored in full if changed")
    experts = sum(matrix.spec.name in structure.fused for matrix in matrices)
    if experts:
        notes.append(
            f"{experts} weights become parts of others when transformers loads the model: peft takes their factors "
            "only where all such parts of a layer are adapted, at one rank"
        )
    unfound = [name for whole in wholes for name in whole.names if name in structure.fused]
    if unfound:
        names = ", ".join(unfound[:3]) + (" …" if len(unfound) > 3 else "")
        notes.append(
            f"transformers makes {names} a part of another tensor: stored in full if changed; surgery merges it, but "
            "peft silently ignores it"
        )
    gone = tuple(name for name in removed if name in chosen)
    return Pairing(base, tuned, tuple(matrices), wholes, left, gone, structure, tuple(notes))


def _check_names(base: Checkpoint, tuned: Checkpoint, where: str) -> None:
    if not any(name in base.specs for name in tuned.specs):
        raise NothingToDo(
            "base and tuned have no tensor names in common",
            where=where,
            expected=", ".join(list(base.specs)[:2]),
            found=", ".join(list(tuned.specs)[:2]),
            then="save both from the same model class",
        )
    homes = {owner(name) for name in base.specs}
    orphans = [name for name in tuned.specs if name not in base.specs and owner(name) in homes]
    if orphans:
        raise SurgeryError(
            "tuned has tensors that base lacks in modules that base has; no adapter can add them",
            where=where,
            found=", ".join(orphans[:5]),
            then="save both from the same model class, or start from a base that has them",
        )


def _check_shapes(base: Checkpoint, tuned: Checkpoint, structure: Structure, where: str) -> tuple[str, ...]:
    """The tensors that grew with the vocabulary. Raises ShapeMismatch for all other differences in shape together."""
    differing = [
        name for name in tuned.specs if name in base.specs and base.specs[name].shape != tuned.specs[name].shape
    ]
    rows = {
        (base.specs[name].shape[0], tuned.specs[name].shape[0])
        for name in differing
        if structure.kinds.get(name) is LayerKind.EMBEDDING
    }

    def grew(name: str) -> bool:
        before, after = base.specs[name].shape, tuned.specs[name].shape
        return len(rows) == 1 and (before[:1] + after[:1]) in rows and before[1:] == after[1:] and before[0] < after[0]

    if all(map(grew, differing)):
        return tuple(differing)
    raise ShapeMismatch(
        f"{len(differing)} tensors differ in shape between base and tuned",
        where=where,
        found="\n            ".join(
            f"{name}: base {shape_text(base.specs[name].shape)}, tuned {shape_text(tuned.specs[name].shape)}"
            for name in differing
        ),
        expected="equal shapes, or a vocabulary that grew by the same number of rows in embedding and head",
        then="pass as base the model from which tuned was trained",
    )


def _check_removed(removed: Sequence[str], allowed: bool, where: str) -> None:
    if removed and not allowed:
        raise SurgeryError(
            f"{len(removed)} tensors of base are not in tuned, and no adapter can remove them",
            where=where,
            found=", ".join(removed[:5]),
            then="--allow-removed extracts the rest; the merged model keeps these tensors of base",
        )


def _check_doubts(matrices: Sequence[Matrix], structure: Structure, where: str) -> None:
    doubts = [m.spec.name for m in matrices if m.spec.name in structure.doubtful]
    if doubts:
        raise SurgeryError(
            f"the kind of {len(doubts)} weights is ambiguous",
            where=where,
            found="\n            ".join(f"{name}: {structure.doubtful[name]}" for name in doubts[:8]),
            then=f"--kind '{doubts[0]}=KIND' where KIND is one of {', '.join(ASKED)}; or install transformers, which "
            "knows most models",
        )


def _matrices(
    base: Checkpoint, tuned: Checkpoint, module: str, names: Sequence[str], structure: Structure
) -> list[Matrix]:
    """The module's weights that can become factors: stored as plain floats in both files."""
    found = [
        name
        for name in names
        if name in structure.kinds and name in base.specs
        and base.specs[name].dtype.is_weight and tuned.specs[name].dtype.is_weight
    ]  # fmt: skip
    return [Matrix(module, tuned.specs[name], structure.kinds[name], name in structure.swapped) for name in found]


def _with_rest(matrices: Sequence[Matrix], modules: Mapping[str, list[str]]) -> list[Matrix]:
    """Adds the other tensors of their modules to the matrices: peft renames these when it wraps the module."""
    factored = {matrix.spec.name for matrix in matrices}
    return [
        replace(matrix, beside=tuple(name for name in modules[matrix.module] if name not in factored))
        for matrix in matrices
    ]


def _awkward_parameters(matrices: Sequence[Matrix], modules: Iterable[str]) -> set[str]:
    """Parameters that peft's wrapper cannot adapt. They belong to the model itself, to an adapted layer, or to a module
    with submodules, whose keys would all change; or the adapter also has layers that store (in, out)."""
    transposed = any(matrix.kind is LayerKind.TRANSPOSED for matrix in matrices)
    above = {prefix for module in modules for prefix in ancestors(module)}
    above |= {matrix.module for matrix in matrices if matrix.kind is not LayerKind.PARAMETER}
    return {
        matrix.spec.name
        for matrix in matrices
        if matrix.kind is LayerKind.PARAMETER and (transposed or not matrix.module or matrix.module in above)
    }


def _wholes(
    base: Checkpoint, tuned: Checkpoint, modules: Mapping[str, list[str]], carried: set[str], layers: set[str]
) -> tuple[FullTensors, ...]:
    saved = _saved_modules(base, tuned, layers)
    wholes = []
    for module, names in modules.items():
        rest = tuple(name for name in names if name not in carried)
        complete = len(rest) == sum(owner(name) == module for name in tuned.specs)
        if rest and module in saved and complete:
            wholes.append(FullTensors(module, rest, together=True))
        else:
            wholes += [FullTensors(name, (name,), together=False) for name in rest]
    return tuple(wholes)


def _saved_modules(base: Checkpoint, tuned: Checkpoint, layers: set[str]) -> frozenset[str]:
    """Modules that peft's `modules_to_save` can store: leaves that are not in `layers` and whose name is not the end of
    another name."""
    holders = {owner(name) for name in (*tuned.specs, *base.specs)}
    parents = {prefix for module in holders for prefix in ancestors(module)}
    plain = {module for module in holders if module and module not in parents} - layers
    # peft compares ends of names and ignores dots: `norm` would also match `input_layernorm`.
    return frozenset(
        module for module in plain if not any(other != module and other.endswith(module) for other in holders | parents)
    )


def _is_tied(name: str, tuned: Checkpoint, structure: Structure) -> bool:
    """Whether an embedding is also a language model's head: the config ties them and no other weight has its shape."""
    shape = tuned.specs[name].shape
    config: Mapping[str, Any] = structure.config
    alone = not any(spec.shape == shape for other, spec in tuned.specs.items() if other != name)
    generates = re.search("LM|ConditionalGeneration", " ".join(map(str, config.get("architectures") or ())))
    vocabulary = config.get("vocab_size", shape[0]) == shape[0]
    return alone and vocabulary and generates is not None and config.get("tie_word_embeddings", True) is True


def _notes(
    tied: Sequence[str],
    grown: Sequence[str],
    tuned: Checkpoint,
    base: Checkpoint,
    removed: Sequence[str],
    left: Sequence[str],
) -> list[str]:
    notes = list(dict.fromkeys((*base.notes, *tuned.notes)))
    notes += [
        f"{owner(name)} is also the head: stored in full if changed, because peft merges the factors of tied weights "
        "twice"
        for name in tied
    ]
    if grown:
        before, after = (checkpoint.specs[grown[0]].shape[0] for checkpoint in (base, tuned))
        notes.append(
            f"the vocabulary grew from {before} to {after}: {', '.join(grown)} stored in full; peft loads the adapter "
            f"after resize_token_embeddings({after}) on the base, surgery merges it directly"
        )
    if removed:
        notes.append(f"{len(removed)} tensors of base are not in tuned; no adapter can remove them")
    if left:
        notes.append(f"{len(left)} tensors are left out, as requested")
    return notes
