"""Base and tuned, tensor by tensor: which change is worth factors, which goes along in full, which stays behind.

What extract and spectrum share. Headers only: whatever names and shapes alone show to be wrong is refused here, all of
it at once. Knows no linear algebra and no output.
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
    """What of a pair is to be looked at.

    Attributes:
        include, exclude: patterns over tensor names; nothing included means everything.
        kinds: pattern → kind of weight, where the evidence does not tell (see `surgery.model.layer_kinds`).
        allow_removed: accept that tensors of base which tuned lacks cannot be taken away by an adapter.
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
        spec: as stored.
        kind: how the layer stores it.
        swapped: a stack of experts stored (experts, in, out).
        beside: what else the layer holds and no factors carry, in the order of the file.
    """

    module: str
    spec: TensorSpec
    kind: LayerKind
    swapped: bool
    beside: tuple[str, ...] = ()

    def alone(self) -> Matrix:
        """The weight without what is beside it."""
        return replace(self, beside=())

    @property
    def matrices(self) -> int:
        """How many matrices the weight holds: more than one for a stack of experts."""
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
        """Of a column of lora_B and a row of lora_A together, for every matrix it holds."""
        return self.matrices * sum(self.sides) * dtype.itemsize


@dataclass(frozen=True)
class FullTensors:
    """Tensors carried in full if they changed; `together`, all of a module's or none."""

    label: str
    names: tuple[str, ...]
    together: bool


@dataclass(frozen=True)
class Pairing:
    """Every tensor of both files, once.

    Attributes:
        base, tuned: the files.
        matrices, wholes: what is compared.
        left: tensors that stay behind because the user said so.
        removed: tensors of base that tuned lacks.
        structure: what the weights are.
        notes: what the user should know.
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
        """What the model itself calls a tensor of the file: transformers renames some on loading."""
        return self.structure.names.get(name, name)

    @property
    def parameters(self) -> dict[str, tuple[Matrix, ...]]:
        """The matrices that no layer holds, by module, in the order in which the module registers them."""
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
        before, after: base and tuned; only their specs are used, and a config.json beside tuned or base.
        choice: what the user asked for.
        pays: whether factors of a weight are smaller than the weight; otherwise it goes in full.

    Raises:
        Quantised: weights of base or tuned that are no plain floats.
        ShapeMismatch: tensors of one name and different shapes, all of them listed.
        NothingToDo: no names in common.
        SurgeryError: a pattern that matches nothing, a weight whose kind nothing tells, removed tensors without leave.
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
    # A layer that could have factors is carried under its own name: saved as a module, it would no longer be tied.
    layers = {owner(name) for name in structure.kinds if name in base.specs}
    wholes = _wholes(base, tuned, modules, carried, layers)
    left = tuple(name for name in (*tuned.specs, *removed) if name not in chosen)
    notes = _notes(tied, grown, tuned, base, removed, left)
    small = len(found) - len(matrices) - len(awkward)
    if small:
        weights = "1 weight is" if small == 1 else f"{small} weights are"
        notes.append(f"{weights} smaller than the factors would be: carried in full if changed")
    convolutions = sum(matrix.kind is LayerKind.CONV for matrix in matrices)
    if convolutions and not structure.names:
        notes.append(
            f"{convolutions} convolutions are taken to be without groups and dilation, which no file tells; peft "
            "cannot adapt others: --kind 'PATTERN=full'"
        )
    if awkward:
        notes.append(
            f"{', '.join(sorted(awkward))}: peft cannot adapt these parameters, carried in full if they changed"
        )
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
            f"transformers makes {names} a part of another tensor: carried in full if changed, which surgery merges, "
            "but peft silently leaves out"
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
            "tuned has tensors in modules of base that base itself lacks; no adapter can add them",
            where=where,
            found=", ".join(orphans[:5]),
            then="save both from the same model class, or start from a base that has them",
        )


def _check_shapes(base: Checkpoint, tuned: Checkpoint, structure: Structure, where: str) -> tuple[str, ...]:
    """Tensors that grew with the vocabulary; any other difference of shapes is refused, all of them at once."""
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
        expected="equal shapes, or a vocabulary that grew by as many rows in the embedding as in the head",
        then="base must be the very model that was tuned",
    )


def _check_removed(removed: Sequence[str], allowed: bool, where: str) -> None:
    if removed and not allowed:
        raise SurgeryError(
            f"{len(removed)} tensors of base are not in tuned, and no adapter can remove them",
            where=where,
            found=", ".join(removed[:5]),
            then="--allow-removed extracts the rest and leaves them as they are in base",
        )


def _check_doubts(matrices: Sequence[Matrix], structure: Structure, where: str) -> None:
    doubts = [m.spec.name for m in matrices if m.spec.name in structure.doubtful]
    if doubts:
        raise SurgeryError(
            f"{len(doubts)} weights could be of more than one kind",
            where=where,
            found="\n            ".join(f"{name}: {structure.doubtful[name]}" for name in doubts[:8]),
            then=f"--kind '{doubts[0]}=KIND' with KIND one of {', '.join(ASKED)}; or install transformers, which knows "
            "most models",
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
    """The matrices with what else their modules hold: peft moves it along when it wraps the module."""
    factored = {matrix.spec.name for matrix in matrices}
    return [
        replace(matrix, beside=tuple(name for name in modules[matrix.module] if name not in factored))
        for matrix in matrices
    ]


def _awkward_parameters(matrices: Sequence[Matrix], modules: Iterable[str]) -> set[str]:
    """Parameters that peft's wrapper cannot adapt: of the model itself, of an adapted layer, and beside layers that
    store (in, out); or of a module with modules inside, the keys of all of which would change with it."""
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
    """Modules that peft's `modules_to_save` can carry: leaves, none of `layers`, whose name it cannot mistake for
    another's tail."""
    holders = {owner(name) for name in (*tuned.specs, *base.specs)}
    parents = {prefix for module in holders for prefix in ancestors(module)}
    plain = {module for module in holders if module and module not in parents} - layers
    # peft compares ends of names without regard to dots: `norm` would take `input_layernorm` too.
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
        f"{owner(name)} is also the head: carried in full if it changed, since peft, which merges the factors of tied "
        "weights twice, could not both load and merge them"
        for name in tied
    ]
    if grown:
        before, after = (checkpoint.specs[grown[0]].shape[0] for checkpoint in (base, tuned))
        notes.append(
            f"the vocabulary grew from {before} to {after}: {', '.join(grown)} carried in full; peft loads the adapter "
            f"once the base is resized (resize_token_embeddings({after})), surgery merges it as it is"
        )
    if removed:
        notes.append(f"{len(removed)} tensors of base are not in tuned; an adapter cannot remove them")
    if left:
        notes.append(f"{len(left)} tensors left behind, as asked")
    return notes
