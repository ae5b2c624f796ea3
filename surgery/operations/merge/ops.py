"""The ops of merge, one tensor each: add a new tensor, drop one, or replace one and add deltas, rounded once.

Each op takes tensors and returns an Outcome. Knows no path, no plan, no method's mathematics, and nothing of receipts
except the originals that they keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.quantized import FLOAT8
from formats.spec import DType, TensorSpec
from formats.tensors import bytes_from_tensor, dtype_of, torch_dtype
from surgery.errors import NotFinite, NotMerged
from surgery.exact.correction import Coarsened, correct_from, uncertain
from surgery.exact.finite import check_finite, is_finite
from surgery.exact.rounded_sum import add_rounded, store_rounded
from surgery.exact.rounding import Delta, round_once
from surgery.exact.survival import Watch
from surgery.hashes import tensor_hash
from surgery.methods import additive, transforming
from surgery.operations.merge.figures import MergeFigures
from surgery.pipeline.ops import Hashed
from surgery.pipeline.plan import Fate, Outcome
from surgery.receipts.receipt import Original

if TYPE_CHECKING:
    import torch

FRACTION_BITS = {DType.F8_E4M3: 3, DType.F8_E5M2: 2, DType.BF16: 7, DType.F16: 10, DType.F32: 23, DType.F64: 52}


@dataclass(frozen=True)
class Add:
    """Adds a tensor that only the adapter has, stored as `dtype`."""

    name: str
    dtype: DType

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Casts and hashes the tensor."""
        result = _as_stored(inputs[0], self.dtype)
        _check_result(result, inputs[0], self.name)
        figures = MergeFigures(after={self.name: tensor_hash(result)}, changed=True)
        return Outcome((result,), {self.name: Fate.FULL}, figures)


@dataclass(frozen=True)
class Shed:
    """Drops a tensor of the base that the result does not need; `undo` keeps it for the undo file."""

    name: str
    undo: bool

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Hashes the tensor and leaves it out."""
        payload = bytes_from_tensor(inputs[0])
        aside = as_aside(correct_from(payload, payload[:0], inputs[0].element_size())) if self.undo else None
        figures = Hashed({self.name: tensor_hash(inputs[0])})
        return Outcome((), {self.name: Fate.REMOVED}, figures, (aside,) if self.undo else ())


@dataclass(frozen=True)
class Merge:
    """Adds the deltas of its modules to W0 or to its replacement; without either, casts W0 to another dtype.

    `keep` puts the base's tensor into the receipt; `undo` makes a correction that restores it.

    Inputs: the base's tensor; a replacement for each entry of `replaced`, for these rows or, if it is empty, for the
    whole tensor; then each module's factors in order of their roles. Output: the tensor in `dtype`.
    """

    name: str
    dtype: DType
    modules: tuple[tuple[AdapterModule, float], ...]
    replaced: tuple[tuple[int, ...], ...]
    keep: bool
    undo: bool = False

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Adds, rounds once, and hashes the tensor before and after."""
        base = inputs[0]
        spec = TensorSpec(self.name, dtype_of(base), tuple(base.shape))
        start = base
        for rows, source in zip(self.replaced, inputs[1:], strict=False):  # the factors come after
            wide = spec.dtype if spec.dtype is self.dtype else DType.F64
            start = _with_rows(start, rows, source, wide) if rows else source
        factors, watch = inputs[1 + len(self.replaced) :], Watch()
        if self.modules:
            result = apply_modules(start, self.modules, factors, self.dtype, watch)
        else:
            result = _as_stored(start, self.dtype)
        if not (self.modules and watch.is_finite):
            _check_result(result, start, self.name)
        before, after = tensor_hash(base), tensor_hash(result)
        replaced = bool(self.replaced)
        lost = replaced and (not self.modules or tensor_hash(_as_stored(start, spec.dtype)) != before)
        figures = MergeFigures(
            before={self.name: before},
            after={self.name: after},
            changed=before != after if spec.dtype is self.dtype else watch.asks or replaced,
            surviving={self.name: watch.surviving} if self.modules else {},
            originals={self.name: Original.of(base, spec)} if self.keep else {},
            lost=(self.name,) if lost and not self.keep else (),
        )
        fate = Fate.MERGED if self.modules else Fate.FULL if self.replaced else Fate.CONVERTED
        if not self.undo:
            return Outcome((result,), {self.name: fate}, figures)
        guess = prediction(result, self.modules, factors, spec)
        payloads = bytes_from_tensor(base), bytes_from_tensor(guess)
        correction = correct_from(*payloads, spec.dtype.itemsize, coarsened(result, guess, spec.dtype))
        return Outcome((result,), {self.name: fate}, figures, (as_aside(correction),))


def as_aside(correction: bytes | None) -> torch.Tensor | None:
    """A correction as the tensor that an undo file keeps."""
    import torch

    return None if correction is None else torch.frombuffer(bytearray(correction), dtype=torch.uint8)


def apply_modules(
    start: torch.Tensor,
    modules: tuple[tuple[AdapterModule, float], ...],
    factors: tuple[torch.Tensor, ...],
    dtype: DType,
    watch: Watch | None = None,
) -> torch.Tensor:
    """start + Σ weight · ΔW, or a method's transform of start, rounded once to `dtype`. A negative weight subtracts.

    Args:
        start: the stored weight.
        modules: the modules that adapt it, each with its weight: deltas, or a single transform, which a negative weight
            undoes.
        factors: each module's factors in order of their roles.
        dtype: dtype of the result.
        watch: measures how much of the change survives; a method without a delta is then computed in float64 as a
            whole.
    """
    deltas = deltas_of(modules, factors)
    if deltas is not None:
        return add_rounded(start, deltas, dtype, watch)
    ((module, weight),) = modules
    method = transforming(module)
    assert method is not None  # checked while planning
    named = {role: factor.cpu() for role, factor in zip(sorted(module.factors), factors, strict=True)}
    start = start.cpu()
    if watch is None:
        return method.transform(module, start, named, dtype, back=weight < 0)
    return store_rounded(start, method.transform(module, start, named, DType.F64, back=weight < 0), dtype, watch)


def deltas_of(
    modules: tuple[tuple[AdapterModule, float], ...], factors: tuple[torch.Tensor, ...]
) -> list[Delta] | None:
    """weight · ΔW of each module, in order; None if a method has no delta."""
    remaining = [factor.cpu() for factor in factors]  # small, and bits can differ between devices
    deltas = []
    for module, weight in modules:
        named = {role: remaining.pop(0) for role in sorted(module.factors)}
        adding = additive(module)
        if adding is None:
            return None
        deltas.append(adding.delta(module, named, weight))
    return deltas


def negated(modules: tuple[tuple[AdapterModule, float], ...]) -> tuple[tuple[AdapterModule, float], ...]:
    """The modules with negated weights, which subtract their deltas."""
    return tuple((module, -weight) for module, weight in modules)


def subtract(
    merged: torch.Tensor,
    modules: tuple[tuple[AdapterModule, float], ...],
    factors: tuple[torch.Tensor, ...],
    dtype: DType,
) -> torch.Tensor:
    """merged − Σ weight · ΔW, rounded once to `dtype`: the weight before merging, up to rounding."""
    if not modules:
        return _as_stored(merged, dtype)
    return apply_modules(merged, negated(modules), factors, dtype)


def prediction(
    merged: torch.Tensor,
    modules: tuple[tuple[AdapterModule, float], ...],
    factors: tuple[torch.Tensor, ...],
    base: TensorSpec,
) -> torch.Tensor:
    """Predicts the base's tensor: subtracts the deltas or undoes the product. Returns the merged tensor itself if there
    are no modules or they cannot be undone; a method that reads another weight finds it changed after merging."""
    methods = [transforming(module) for module, _ in modules]
    lost = any(module.reads for module, _ in modules) or any(method and method.forgets for method in methods)
    if not modules or lost or tuple(merged.shape) != base.shape:
        return _as_stored(merged, base.dtype)
    try:
        guess = subtract(merged, modules, factors, base.dtype)
    except NotMerged:  # a division by zero
        return _as_stored(merged, base.dtype)
    return guess if not any(methods) or is_finite(guess) else _as_stored(merged, base.dtype)


def coarsened(merged: torch.Tensor, guess: torch.Tensor, dtype: DType) -> Coarsened | None:
    """Hints where a prediction is likely to be wrong; None if the prediction is the merged tensor itself."""
    tells = guess is not merged and guess.dtype == merged.dtype
    return Coarsened(bytes_from_tensor(merged), FRACTION_BITS[dtype]) if tells else None


def uncertain_elements(
    merged: torch.Tensor, result: torch.Tensor, modules: tuple[tuple[AdapterModule, float], ...], dtype: DType
) -> int:
    """The number of elements in the result of `subtract` that can differ from the base's; all of them if a product was
    undone instead of a delta subtracted."""
    hints = coarsened(merged, result, dtype)
    if hints is None or any(transforming(module) for module, _ in modules):
        return result.numel()
    return uncertain(bytes_from_tensor(result), dtype.itemsize, hints)


def _with_rows(tensor: torch.Tensor, rows: tuple[int, ...], source: torch.Tensor, dtype: DType) -> torch.Tensor:
    """A copy of the tensor in `dtype` with some rows replaced by the rows of source."""
    tensor = _as_stored(tensor, dtype).clone()
    tensor[list(rows)] = _as_stored(source, dtype)
    return tensor


def _as_stored(tensor: torch.Tensor, dtype: DType) -> torch.Tensor:
    """The tensor in `dtype`, rounded once. torch casts through float32, which is exact for all but float64."""
    import torch

    if tensor.dtype == torch_dtype(dtype):
        return tensor
    plain = tensor.dtype != torch.float64 and dtype not in FLOAT8
    return tensor.to(torch_dtype(dtype)) if plain else round_once(tensor.to(torch.float64), dtype)


def _check_result(result: torch.Tensor, start: torch.Tensor, name: str) -> None:
    if result.is_floating_point() and not is_finite(result):
        check_finite(start, name)
        raise out_of_range(name, result.dtype)


def out_of_range(name: str, dtype: torch.dtype) -> NotFinite:
    """The error for a result that its dtype cannot hold."""
    return NotFinite(
        "the merged weight exceeds the range of its stored dtype",
        where=name,
        found=dtype,
        then="store the result in a wider dtype: --dtype bfloat16 or float32",
    )
