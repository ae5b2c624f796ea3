"""The ops of extract: store a changed tensor as factors or in full, or leave it out.

Each takes tensors of base and tuned and returns an Outcome; none knows a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from formats.dialects.peft_writing import magnitude_shape
from formats.layers import LayerKind
from formats.spec import DType
from formats.tensors import torch_dtype
from surgery.errors import NotFinite
from surgery.exact.finite import check_finite
from surgery.linalg.difference import DeltaMatrix
from surgery.linalg.truncated import factorise
from surgery.methods.lora import pack_experts
from surgery.operations.extract.dora import add_magnitude
from surgery.operations.extract.pairing import Matrix
from surgery.operations.extract.results import FactorFigures
from surgery.pipeline.plan import Fate, Outcome
from surgery.ranks import FixedRank, RankRule
from surgery.ranks.spectra import Spectrum

if TYPE_CHECKING:
    import torch

    from surgery.linalg.truncated import Factors


@dataclass(frozen=True)
class ModuleReport:
    """One weight that became factors.

    Attributes:
        name: name of the tensor.
        shape: its shape in the file.
        kind: how its layer stores it.
        method: "lora" or "dora".
        rank: rank of the factors.
        energy: share of ‖ΔW‖² that the factors hold.
        residual: ‖ΔW − BA‖ / ‖ΔW‖, or with a magnitude ‖tuned − W′‖ / ‖ΔW‖; rounding included.
        delta_norm: ‖ΔW‖.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    method: str
    rank: int
    energy: float
    residual: float
    delta_norm: float


@dataclass(frozen=True)
class Decomposition:
    """How a change is decomposed.

    Attributes:
        rule: the rule for the rank.
        dtype: dtype of the factors.
        seed: seed for the randomised SVD.
        exact: whether to compute a full SVD instead of one in a Krylov space.
        dora: whether to add a magnitude for every row.
        lora_bias: whether to store the change of the layer's bias with the factors instead of the full bias.
    """

    rule: RankRule
    dtype: DType
    seed: int = 0
    exact: bool = False
    dora: bool = False
    lora_bias: bool = False

    @property
    def may_be_full(self) -> bool:
        """Whether the weight may be stored in full after all: a rule may choose a rank beyond the break-even, and a row
        without a direction has no magnitude."""
        return self.dora or not isinstance(self.rule, FixedRank)


@dataclass(frozen=True)
class Factored:
    """A changed weight's factors as peft stores them, with their report and spectrum."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    magnitude: torch.Tensor | None
    report: ModuleReport
    spectrum: Spectrum


@dataclass(frozen=True)
class Factorise:
    """Factors a layer's changed weight into lora_A and lora_B; the layer's other tensors are stored in full if changed.

    Inputs: base and tuned weight, then base and tuned of each other tensor.
    Outputs: lora_A, lora_B, the magnitude if `dora`, the weight itself if it `may_be_full`. Then two for each other
    tensor: its change if `lora_bias`, else the tensor under its key in an adapted layer; and under its plain key.
    """

    matrix: Matrix
    how: Decomposition

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Factors the difference; identical weights have no outputs."""
        name = self.matrix.spec.name
        factored, fate = factor(self.matrix, self.how, inputs[0], inputs[1])
        fates = {name: fate}
        tensors: list[torch.Tensor | None] = [None, None]
        if factored is not None:
            tensors = [factored.lora_A, factored.lora_B]
        if self.how.dora:
            tensors.append(factored.magnitude if factored is not None else None)
        if self.how.may_be_full:
            tensors.append(inputs[1] if fate is Fate.FULL else None)
        for index, other in enumerate(self.matrix.beside):
            before, after = inputs[2 + 2 * index : 4 + 2 * index]
            changed = has_changed(before, after, other)
            if self.how.lora_bias and factored is not None:
                # peft expects a bias in every adapted layer, changed or not.
                tensors += [(after.double() - before.double()).to(torch_dtype(self.how.dtype)), None]
                fates[other] = Fate.LOW_RANK if changed else Fate.IDENTICAL
                continue
            fates[other] = Fate.FULL if changed else Fate.IDENTICAL
            kept = after if changed else None
            tensors += [kept, None] if factored is not None else [None, kept]
        return Outcome(tuple(tensors), fates, _figures(fates, () if factored is None else (factored,)))

    def unchanged(self) -> Outcome:
        """Nothing to carry."""
        outputs = 2 + self.how.dora + self.how.may_be_full + 2 * len(self.matrix.beside)
        return Outcome((None,) * outputs, identical((self.matrix.spec.name, *self.matrix.beside)))


@dataclass(frozen=True)
class FactoriseParameters:
    """Factors the changed matrices among a module's parameters.

    peft wraps the module once for each adapted parameter, the first innermost. A parameter's keys therefore depend on
    how many later parameters changed, so one step handles all of them.

    Inputs: base and tuned of each parameter, in the order in which the module registers them; then of other tensors.
    Outputs: lora_A and lora_B of the innermost wrapper, of the next, and so on; then each parameter itself and each
    other tensor, under its key with no wrapper around it, with one, and so on up to all.
    """

    matrices: tuple[Matrix, ...]
    hows: tuple[Decomposition, ...]

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Factors the differences; identical parameters have no outputs."""
        pairs = list(zip(inputs[::2], inputs[1::2], strict=True))
        count = len(self.matrices)
        found = [
            factor(matrix, how, *pair)
            for matrix, how, pair in zip(self.matrices, self.hows, pairs[:count], strict=True)
        ]
        adapted = [factored for factored, _ in found if factored is not None]
        tensors: list[torch.Tensor | None] = [None] * (2 * (count - len(adapted)))  # for wrappers that do not exist
        for factored in adapted:
            tensors += [factored.lora_A, factored.lora_B]
        fates = {matrix.spec.name: fate for matrix, (_, fate) in zip(self.matrices, found, strict=True)}
        for name, pair in zip(self.matrices[0].beside, pairs[count:], strict=True):
            fates[name] = Fate.FULL if has_changed(*pair, name) else Fate.IDENTICAL
        for fate, (_, after) in zip(fates.values(), pairs, strict=True):
            kept: list[torch.Tensor | None] = [None] * (count + 1)
            kept[len(adapted)] = after if fate is Fate.FULL else None
            tensors += kept
        return Outcome(tuple(tensors), fates, _figures(fates, adapted))

    def unchanged(self) -> Outcome:
        """Nothing to carry."""
        names = (*(matrix.spec.name for matrix in self.matrices), *self.matrices[0].beside)
        outputs = 2 * len(self.matrices) + (len(self.matrices) + 1) * len(names)
        return Outcome((None,) * outputs, identical(names))


def _figures(fates: Mapping[str, Fate], factored: Iterable[Factored]) -> FactorFigures[ModuleReport]:
    factored = tuple(factored)
    return FactorFigures(
        modules=tuple(each.report for each in factored),
        spectra=tuple(each.spectrum for each in factored),
        full=in_full(fates),
    )


def in_full(fates: Mapping[str, Fate]) -> tuple[str, ...]:
    """The tensors that are stored in full."""
    return tuple(name for name, fate in fates.items() if fate is Fate.FULL)


def identical(names: Iterable[str]) -> dict[str, Fate]:
    """The fates of tensors that are the same in both files."""
    return dict.fromkeys(names, Fate.IDENTICAL)


def factor(
    matrix: Matrix, how: Decomposition, before: torch.Tensor, after: torch.Tensor
) -> tuple[Factored | None, Fate]:
    """The factors of a weight's change; None if nothing changed or the factors would be larger than the weight.

    Raises:
        NotFinite: a weight holds NaN or Inf, or factors exceed their dtype.
    """
    name, dtype = matrix.spec.name, torch_dtype(how.dtype)
    pairs = list(zip(matrices_of(before, matrix), matrices_of(after, matrix), strict=True))
    deltas = [delta_of(*pair, name) for pair in pairs]
    changed = [delta for delta in deltas if delta is not None]
    if not changed:
        return None, Fate.IDENTICAL
    found = [
        None if delta is None else factorise(delta, how.rule, dtype, how.seed, exact=how.exact) for delta in deltas
    ]
    factored = [factors for factors in found if factors is not None]
    rank = max(factors.rank for factors in factored)
    if rank > matrix.break_even:
        return None, Fate.FULL
    total = sum(delta.total for delta in changed)
    left_out = sum(factors.residual**2 * delta.total for factors, delta in zip(factored, changed, strict=True))
    spectrum = spectrum_of(matrix, how.dtype, total, [factors.singular_values for factors in factored])
    magnitude, kept = None, False
    if how.dora:
        done = add_magnitude(*pairs[0], factored[0], total, how.seed)
        if done is None:  # a row without a direction
            return None, Fate.FULL
        found, magnitude, kept = [done.factors], done.magnitude, done.kept_lora
        left_out = done.factors.residual**2 * total
    lora_a, lora_b = as_stored(found, matrix, rank, dtype)
    for role, tensor in (("lora_A", lora_a), ("lora_B", lora_b)):
        check_finite(tensor, f"{role} of {name}", "the factors overflow their dtype: --dtype float32")
    if magnitude is not None:
        magnitude = magnitude.reshape(magnitude_shape(matrix.kind, matrix.spec.shape))
    report = ModuleReport(
        name=name,
        shape=matrix.spec.shape,
        kind=matrix.kind,
        method="dora" if how.dora and not kept else "lora",
        rank=rank,
        energy=1.0 - left_out / total,
        residual=math.sqrt(left_out / total),
        delta_norm=math.sqrt(total),
    )
    return Factored(lora_a, lora_b, magnitude, report, spectrum), Fate.LOW_RANK


def spectrum_of(
    matrix: Matrix, dtype: DType, total: float, spectra: Sequence[np.ndarray], limit: int | None = None
) -> Spectrum:
    """The spectrum of a weight's change. Experts of a stack share a rank, so theirs are combined: the root of the sum
    of squared singular values, rank by rank, up to the rank known for all."""
    known = min(len(values) for values in spectra)
    energies = np.sum([values[:known] ** 2 for values in spectra], axis=0)[:limit]
    return Spectrum(
        name=matrix.spec.name,
        shape=matrix.spec.shape,
        size=min(matrix.sides),
        bytes_per_rank=matrix.bytes_per_rank(dtype),
        total=total,
        values=tuple(np.sqrt(energies).tolist()),
    )


def matrices_of(weight: torch.Tensor, matrix: Matrix) -> list[torch.Tensor]:
    """The weight as a list of (out, in) matrices."""
    if matrix.kind is LayerKind.CONV:
        return [weight.flatten(1)]
    stack = list(weight) if weight.dim() == 3 else [weight]
    swapped = matrix.swapped or matrix.kind in (LayerKind.TRANSPOSED, LayerKind.EMBEDDING)
    return [one.mT for one in stack] if swapped else stack


def as_stored(
    found: Sequence[Factors | None], matrix: Matrix, rank: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors as peft stores them; factors of a stack of experts are zero-padded to their common rank."""
    import torch

    out, into = matrix.sides
    a = torch.zeros(len(found), rank, into, dtype=dtype)
    b = torch.zeros(len(found), out, rank, dtype=dtype)
    for index, factors in enumerate(found):
        if factors is not None:
            a[index, : factors.rank] = factors.lora_A
            b[index, :, : factors.rank] = factors.lora_B
    if matrix.kind is LayerKind.CONV:
        ones = (1,) * (len(matrix.spec.shape) - 2)
        return a.reshape(rank, *matrix.spec.shape[1:]), b.reshape(out, rank, *ones)
    return pack_experts(a, b)


@dataclass(frozen=True)
class KeepWhole:
    """Stores tensors in full if they changed or if base lacks them.

    Inputs: tuned's tensors in order, each preceded by base's where `known`.
    Outputs: the tensors under their keys. A `module` (peft's `modules_to_save`) is stored whole or not at all.
    """

    names: tuple[str, ...]
    known: tuple[bool, ...]
    module: str | None

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Compares and keeps."""
        remaining = list(inputs)
        tensors: list[torch.Tensor | None] = []
        fates: dict[str, Fate] = {}
        for name, paired in zip(self.names, self.known, strict=True):
            before = remaining.pop(0) if paired else None
            after = remaining.pop(0)
            changed = before is None or has_changed(before, after, name)
            fates[name] = Fate.FULL if changed else Fate.IDENTICAL
            tensors.append(after)
        full = in_full(fates)
        if not full:
            return Outcome((None,) * len(tensors), fates)
        kept = (
            tensors
            if self.module
            else [tensor if name in full else None for name, tensor in zip(self.names, tensors, strict=True)]
        )
        saved = (self.module,) if self.module else ()
        return Outcome(tuple(kept), fates, FactorFigures[ModuleReport](full=full, saved=saved))

    def unchanged(self) -> Outcome | None:
        """Nothing to carry, where base has them all."""
        return Outcome((None,) * len(self.names), identical(self.names)) if all(self.known) else None


@dataclass(frozen=True)
class LeaveBehind:
    """Records the tensors that are left out: not chosen, or removed in tuned with the user's consent."""

    names: tuple[str, ...]

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Adds them to the ledger; reads no input."""
        return Outcome((), dict.fromkeys(self.names, Fate.REFUSED))


def delta_of(before: torch.Tensor, after: torch.Tensor, name: str) -> DeltaMatrix | None:
    """tuned − base, None if it is zero everywhere. Raises NotFinite."""
    delta = DeltaMatrix.between(before, after)
    if delta is not None and not math.isfinite(delta.total):
        check_finite(before, f"{name} of base")
        check_finite(after, f"{name} of tuned")
        raise NotFinite(
            "the difference overflows float32", where=name, then=f"check both files, or leave it out: --exclude {name}"
        )
    return delta


def has_changed(before: torch.Tensor, after: torch.Tensor, name: str) -> bool:
    """Whether a tensor that is stored in full differs from base's. Raises NotFinite."""
    import torch

    if after.is_floating_point():
        check_finite(after, f"{name} of tuned")
    return before.shape != after.shape or not torch.equal(before.to(after.dtype), after)
