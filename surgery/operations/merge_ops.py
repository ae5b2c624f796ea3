"""What merging does to one tensor: copy it, add it, or replace it and add the deltas, rounded once.

Ops only: tensors in, an Outcome out. Knows no path, no plan, no receipt but the originals it keeps, and no method's
mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from formats.adapter import AdapterModule
from formats.spec import DType, TensorSpec
from formats.tensors import bytes_from_tensor, torch_dtype
from surgery.checks import check_finite, is_finite
from surgery.correction import Coarsened, correct_from, uncertain
from surgery.errors import NotFinite, NotMerged
from surgery.methods import additive, transforming
from surgery.plan import Fate, Outcome
from surgery.provenance import Original, tensor_hash
from surgery.rounding import add_rounded, round_once

if TYPE_CHECKING:
    import torch

_FRACTION_BITS = {DType.BF16: 7, DType.F16: 10, DType.F32: 23, DType.F64: 52}


@dataclass(frozen=True)
class Copy:
    """A tensor taken over byte for byte."""

    name: str

    def taken(self, digest: str) -> Outcome:
        """Of both ends."""
        return Outcome((), {self.name: Fate.COPIED}, {"base": {self.name: digest}, "hashes": {self.name: digest}})


@dataclass(frozen=True)
class Add:
    """A tensor that only the adapter has."""

    name: str

    def taken(self, digest: str) -> Outcome:
        """Of the output."""
        return Outcome((), {self.name: Fate.FULL}, {"hashes": {self.name: digest}, "changed": True})


@dataclass(frozen=True)
class Drop:
    """A tensor that the adapter had added."""

    name: str

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Leaves it out."""
        return Outcome((), {self.name: Fate.REMOVED})


@dataclass(frozen=True)
class Merge:
    """W0, or what replaces it, plus the deltas of its modules.

    `keep` puts the base's tensor into the receipt; `undo` makes a correction that leads back to it.

    Inputs: the base's tensor, then what replaces it or, where `replaced` has any, these rows of it, then each module's
    factors in order of their roles. Output: the tensor in the base's dtype.
    """

    name: str
    dtype: DType
    modules: tuple[tuple[AdapterModule, float], ...]
    replaced: tuple[tuple[int, ...], ...]
    keep: bool
    undo: bool = False

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Adds, rounds once, hashes both ends."""
        import torch

        base = inputs[0]
        start = base
        for rows, source in zip(self.replaced, inputs[1:], strict=False):  # the factors come after
            start = _with_rows(start, rows, source, self.dtype) if rows else source
        factors = inputs[1 + len(self.replaced) :]
        if self.modules:
            result = apply_modules(start, self.modules, factors, self.dtype)
        else:
            result = start if start.dtype == base.dtype else _as_stored(start, self.dtype)
        _check_result(result, start, self.name)
        before, after = tensor_hash(base), tensor_hash(result)
        figures: dict[str, Any] = {"base": {self.name: before}, "hashes": {self.name: after}}
        figures["changed"] = before != after
        if self.keep:
            figures["original"] = {self.name: Original.of(base, TensorSpec(self.name, self.dtype, tuple(base.shape)))}
        elif self.replaced and (not self.modules or tensor_hash(_as_stored(start, self.dtype)) != before):
            figures["lost"] = [self.name]
        fate = Fate.MERGED if self.modules else Fate.FULL
        if not self.undo:
            return Outcome((result,), {self.name: fate}, figures)
        guess = prediction(result, self.modules, factors, TensorSpec(self.name, self.dtype, tuple(base.shape)))
        payloads = bytes_from_tensor(base), bytes_from_tensor(guess)
        correction = correct_from(*payloads, self.dtype.itemsize, coarsened(result, guess, self.dtype))
        aside = None if correction is None else torch.frombuffer(bytearray(correction), dtype=torch.uint8)
        return Outcome((result,), {self.name: fate}, figures, (aside,))


def apply_modules(
    start: torch.Tensor,
    modules: tuple[tuple[AdapterModule, float], ...],
    factors: tuple[torch.Tensor, ...],
    dtype: DType,
) -> torch.Tensor:
    """start + Σ weight · ΔW, or what a method makes of start, rounded once to `dtype`; a negative weight takes a
    delta off.

    Args:
        start: the stored weight.
        modules: what adapts it, each with its weight; deltas, or one that is none and that a negative weight undoes.
        factors: each module's factors in order of their roles.
        dtype: of the result.
    """
    remaining = [factor.cpu() for factor in factors]  # small, and not every function has the same bits elsewhere
    deltas = []
    for module, weight in modules:
        named = {role: remaining.pop(0) for role in sorted(module.factors)}
        if method := transforming(module):
            return method.transform(module, start.cpu(), named, dtype, back=weight < 0)
        if adding := additive(module):
            deltas.append(adding.delta(module, named, weight))
    return add_rounded(start, deltas, dtype)


def subtract(
    merged: torch.Tensor,
    modules: tuple[tuple[AdapterModule, float], ...],
    factors: tuple[torch.Tensor, ...],
    dtype: DType,
) -> torch.Tensor:
    """merged − Σ weight · ΔW, rounded once to `dtype`: what merging those modules started from, up to rounding."""
    return apply_modules(merged, tuple((module, -weight) for module, weight in modules), factors, dtype)


def prediction(
    merged: torch.Tensor,
    modules: tuple[tuple[AdapterModule, float], ...],
    factors: tuple[torch.Tensor, ...],
    base: TensorSpec,
) -> torch.Tensor:
    """What tells most of the base's tensor: the deltas subtracted, or the product undone; the merged tensor itself
    where there are none, or no way back: a method that reads another weight reads another one after merging."""
    methods = [transforming(module) for module, _ in modules]
    lost = any(module.reads for module, _ in modules) or any(method and method.forgets for method in methods)
    if not modules or lost or tuple(merged.shape) != base.shape:
        return merged
    try:
        guess = subtract(merged, modules, factors, base.dtype)
    except NotMerged:  # a zero that nothing can be divided by
        return merged
    return guess if not any(methods) or is_finite(guess) else merged


def coarsened(merged: torch.Tensor, guess: torch.Tensor, dtype: DType) -> Coarsened | None:
    """What tells where a prediction is likely to be wrong; nothing does where it is the merged tensor itself."""
    return None if guess is merged else Coarsened(bytes_from_tensor(merged), _FRACTION_BITS[dtype])


def uncertain_elements(
    merged: torch.Tensor, result: torch.Tensor, modules: tuple[tuple[AdapterModule, float], ...], dtype: DType
) -> int:
    """How many elements of what `subtract` gave can differ from the base's: all of them where no delta was taken off
    but a product undone."""
    hints = coarsened(merged, result, dtype)
    if hints is None or any(transforming(module) for module, _ in modules):
        return result.numel()
    return uncertain(bytes_from_tensor(result), dtype.itemsize, hints)


def _with_rows(tensor: torch.Tensor, rows: tuple[int, ...], source: torch.Tensor, dtype: DType) -> torch.Tensor:
    """A copy of the tensor in `dtype` with some rows replaced by those of source."""
    tensor = _as_stored(tensor, dtype).clone()
    tensor[list(rows)] = _as_stored(source, dtype)
    return tensor


def _as_stored(tensor: torch.Tensor, dtype: DType) -> torch.Tensor:
    import torch

    return tensor if tensor.dtype == torch_dtype(dtype) else round_once(tensor.to(torch.float64), dtype)


def _check_result(result: torch.Tensor, start: torch.Tensor, name: str) -> None:
    if result.is_floating_point() and not is_finite(result):
        check_finite(start, name)
        raise NotFinite(
            "the merged weight exceeds the range of its stored dtype",
            where=name,
            found=result.dtype,
            then="merge into a base stored as bfloat16 or float32",
        )
