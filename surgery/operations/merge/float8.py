"""Merging into float8 weights with scales, and unmerging; each weight and its scales are the two outputs of one step.

Steps and ops only: `surgery.exact.scaled` has the arithmetic, `formats.quantized` the names and layouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from formats.adapter import AdapterModule
from formats.quantized import Scaled
from formats.spec import DType, TensorRef, TensorSpec
from formats.tensors import Bytes, bytes_from_tensor, tensor_from_bytes, torch_dtype
from surgery.errors import NotFinite
from surgery.exact.correction import correct_from, corrected, correction_workspace
from surgery.exact.finite import is_finite
from surgery.exact.rounding import round_once, sum_of
from surgery.exact.scaled import Dequantised, Rows, requantised
from surgery.exact.survival import Watch
from surgery.hashes import tensor_hash
from surgery.methods import additive
from surgery.operations.merge.figures import MergeFigures, UnmergeFigures
from surgery.operations.merge.ops import apply_modules, as_aside, deltas_of, negated, out_of_range
from surgery.pipeline.ops import Hashed
from surgery.pipeline.plan import Fate, Outcome, Step
from surgery.receipts.undo_file import changed_since, correction_spec, leads_elsewhere

if TYPE_CHECKING:
    import torch

Modules = tuple[tuple[AdapterModule, float], ...]
_ROWS = 256  # rows that are dequantised at once
_BLOCKS = 64 << 20  # bytes of float64 blocks in memory at a time


def merge_step(
    scaled: Scaled, inputs: tuple[TensorRef, TensorRef], modules: Modules, stored: DType | None, undo: bool
) -> Step:
    """The step of one weight. Args: `inputs` are weight and scales; `stored` is the new dtype, None to stay float8."""
    factors = _factors(modules)
    outputs: tuple[TensorSpec, ...] = (scaled.weight, scaled.scale)
    if stored is not None:
        outputs = (TensorSpec(scaled.weight.name, stored, scaled.weight.shape),)
    asides = (correction_spec(scaled.weight), correction_spec(scaled.scale)) if undo else ()
    op = MergeScaled(scaled, modules, stored, undo)
    return Step(scaled.weight.name, (*inputs, *factors), outputs, op, _workspace(scaled.weight, modules), asides=asides)


def subtract_step(scaled: Scaled, inputs: tuple[TensorRef, TensorRef], modules: Modules) -> Step:
    """The step that unmerges one weight without an undo file."""
    op = SubtractScaled(scaled, modules)
    outputs = (scaled.weight, scaled.scale)
    workspace = _workspace(scaled.weight, modules)
    return Step(scaled.weight.name, (*inputs, *_factors(modules)), outputs, op, workspace)


def restore_step(
    scaled: Scaled,
    base: tuple[str, str],
    merged: Sequence[tuple[TensorRef, str]],
    modules: Modules,
    corrections: Mapping[str, TensorRef],
    where: str,
) -> Step:
    """The step that unmerges one weight with an undo file.

    Args:
        scaled: the base's weight and scales.
        base: their BLAKE3.
        merged: the merged weight, and its scales if it is still float8, each with its BLAKE3.
        modules: the modules that were merged.
        corrections: the stored corrections, by name.
        where: the undo file.
    """
    stored = tuple(spec.name in corrections for spec in (scaled.weight, scaled.scale))
    op = CorrectScaled(scaled, base, tuple(digest for _, digest in merged), modules, (stored[0], stored[1]), where)
    held = (corrections[spec.name] for spec in (scaled.weight, scaled.scale) if spec.name in corrections)
    inputs = (*(ref for ref, _ in merged), *_factors(modules), *held)
    workspace = _workspace(scaled.weight, modules)
    return Step(scaled.weight.name, inputs, (scaled.weight, scaled.scale), op, workspace)


def _factors(modules: Modules) -> tuple[TensorRef, ...]:
    return tuple(ref for module, _ in modules for _, ref in sorted(module.factors.items()))


def _workspace(weight: TensorSpec, modules: Modules) -> int:
    """Bytes for blocks, factors and the prediction; a method without a delta also needs two float64 copies."""
    whole = 0 if all(additive(module) for module, _ in modules) else 16 * weight.size
    factors = sum(8 * ref.spec.size for ref in _factors(modules))
    return factors + whole + 2 * weight.nbytes + correction_workspace(1) + _BLOCKS


def _values(start: Rows, shape: tuple[int, ...], modules: Modules, factors: tuple[torch.Tensor, ...]) -> Rows:
    """start + ΣΔW, or a method's transform of start, in float64, by rows of the weight as a matrix."""
    if not modules:
        return start
    columns = shape[-1]
    deltas = deltas_of(modules, factors)
    if deltas is not None and all(delta.columns == columns for delta in deltas):
        return lambda begin, end: sum_of(deltas, begin, end).add_(start(begin, end))
    size = 1
    for side in shape[:-1]:
        size *= side
    whole = apply_modules(start(0, size).reshape(shape), modules, factors, DType.F64).reshape(size, columns)
    return lambda begin, end: whole[begin:end]


def _predicted(
    scaled: Scaled, grid: torch.Tensor, merged: Rows, modules: Modules, factors: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Predicts the base's float8 weight under the base's scales, from the merged weight."""
    import torch

    if not all(additive(module) for module, _ in modules):
        modules, factors = (), ()
    blank = torch.empty(scaled.weight.shape, dtype=torch_dtype(scaled.weight.dtype))
    base = Dequantised.of(blank, grid, scaled.block, scaled.scale.name)
    values = _values(merged, scaled.weight.shape, negated(modules), factors)
    return requantised(base, values, (scaled.weight.dtype, scaled.scale.dtype), fixed=True)[0]


def _plain(weight: torch.Tensor) -> Rows:
    import torch

    matrix = weight.reshape(-1, weight.shape[-1])
    return lambda begin, end: matrix[begin:end].to(torch.float64)


@dataclass(frozen=True)
class MergeScaled:
    """Adds the deltas of its modules to q · s, and stores the sum as float8 with scales or as a plain float.

    Inputs: weight, scales, then each module's factors in order of their roles. Outputs: weight and scales; only
    the weight if `stored` names another dtype.
    """

    scaled: Scaled
    modules: Modules
    stored: DType | None
    undo: bool

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Adds, rounds once, and hashes the tensors before and after."""
        weight, scale, *rest = (tensor.cpu() for tensor in inputs)
        names, factors, watch = (self.scaled.weight.name, self.scaled.scale.name), tuple(rest), Watch()
        base = Dequantised.of(weight, scale, self.scaled.block, names[1])
        values = _values(base.rows, tuple(weight.shape), self.modules, factors)
        tensors: tuple[torch.Tensor, ...]
        if self.stored is None:
            tensors = _stored(self.scaled, base, values, watch)
        else:
            tensors = (_dequantised(base, values, self.stored, watch).reshape(weight.shape),)
        for name, tensor in zip(names, tensors, strict=False):
            if not is_finite(tensor):
                raise out_of_range(name, tensor.dtype)
        before = {name: tensor_hash(tensor) for name, tensor in zip(names, inputs, strict=False)}
        after = {name: tensor_hash(tensor) for name, tensor in zip(names, tensors, strict=False)}
        fates = {name: Fate.MERGED if after.get(name) != before[name] else Fate.COPIED for name in names}
        fates[names[0]] = Fate.MERGED if self.modules else Fate.CONVERTED
        figures = MergeFigures(
            before=before,
            after=after,
            surviving={names[0]: watch.surviving} if self.modules else {},
            changed=bool(self.modules) and (before != after if self.stored is None else watch.asks),
        )
        if self.stored is not None:
            fates[names[1]] = Fate.REMOVED
        if not self.undo:
            return Outcome(tensors, fates, figures)
        known = bytes_from_tensor(scale)[:0]
        merged = _plain(tensors[0])
        if self.stored is None:
            scales = tensors[-1]
            merged = Dequantised.of(tensors[0], scales, self.scaled.block, names[1]).rows
            known = bytes_from_tensor(scales)
        guess = _predicted(self.scaled, scale, merged, self.modules, factors)
        asides = (
            as_aside(correct_from(bytes_from_tensor(weight), bytes_from_tensor(guess), 1)),
            as_aside(correct_from(bytes_from_tensor(scale), known, scale.element_size())),
        )
        return Outcome(tensors, fates, figures, asides)


def _stored(scaled: Scaled, base: Dequantised, values: Rows, watch: Watch) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and scales in their stored shapes. Raises NotFinite with the weight's name."""
    dtypes = (scaled.weight.dtype, scaled.scale.dtype)
    try:
        weight, scale = requantised(base, values, dtypes, power_of_two=scaled.power_of_two, watch=watch)
    except NotFinite as error:
        raise NotFinite(error.what, where=scaled.weight.name, then="repair or retrain that model") from error
    return weight.reshape(scaled.weight.shape), scale.reshape(scaled.scale.shape)


def _dequantised(base: Dequantised, values: Rows, dtype: DType, watch: Watch) -> torch.Tensor:
    """The values rounded once to another dtype."""
    import torch

    result = torch.empty(base.matrix.shape, dtype=torch_dtype(dtype))
    for begin in range(0, len(result), _ROWS):
        end = min(begin + _ROWS, len(result))
        exact, start = values(begin, end), base.rows(begin, end)
        result[begin:end] = round_once(exact.contiguous(), dtype)
        watch(start, exact - start, result[begin:end])
    return result


@dataclass(frozen=True)
class SubtractScaled:
    """Subtracts the deltas of its modules from q · s, stored as float8 with scales. Inputs: weight, scales, factors."""

    scaled: Scaled
    modules: Modules

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Subtracts, rounds once, hashes."""
        weight, scale, *factors = (tensor.cpu() for tensor in inputs)
        names = (self.scaled.weight.name, self.scaled.scale.name)
        base = Dequantised.of(weight, scale, self.scaled.block, names[1])
        values = _values(base.rows, tuple(weight.shape), negated(self.modules), tuple(factors))
        tensors = _stored(self.scaled, base, values, Watch())
        hashes = {name: tensor_hash(tensor) for name, tensor in zip(names, tensors, strict=True)}
        uncertain = {name: tensor.numel() for name, tensor in zip(names, tensors, strict=True)}
        figures = UnmergeFigures(after=hashes, uncertain=uncertain)
        return Outcome(tensors, dict.fromkeys(names, Fate.UNMERGED), figures)


@dataclass(frozen=True)
class CorrectScaled:
    """Restores the base's weight and scales: the scales first, because the weight was quantised with them.

    Inputs: the merged tensors, the factors, then the corrections that are `stored`, of weight and of scales.
    """

    scaled: Scaled
    base: tuple[str, str]
    merged: tuple[str, ...]
    modules: Modules
    stored: tuple[bool, bool]
    where: str

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Corrects the scales, predicts the weight, corrects it, checks both. Raises UndoMismatch, CorruptFile."""
        inputs = tuple(tensor.cpu() for tensor in inputs)
        count, held = sum(self.stored), len(self.merged)
        merged, factors = inputs[:held], inputs[held : len(inputs) - count]
        names = (self.scaled.weight.name, self.scaled.scale.name)
        for name, tensor, expected in zip(names, merged, self.merged, strict=False):
            if tensor_hash(tensor) != expected:
                raise changed_since(name)
        corrections = list(inputs[len(inputs) - count :])
        weight = corrections.pop(0) if self.stored[0] else None
        scale = corrections.pop(0) if self.stored[1] else None
        known = bytes_from_tensor(merged[1]) if held > 1 else bytes_from_tensor(merged[0])[:0]
        scales = self._corrected(self.scaled.scale, known, scale)
        rows = _plain(merged[0])
        if held > 1:
            rows = Dequantised.of(merged[0], merged[1], self.scaled.block, self.scaled.scale.name).rows
        guess = _predicted(self.scaled, scales, rows, self.modules, factors)
        result = (self._corrected(self.scaled.weight, bytes_from_tensor(guess), weight), scales)
        hashes = {name: tensor_hash(tensor) for name, tensor in zip(names, result, strict=True)}
        for name, expected in zip(names, self.base, strict=True):
            if hashes[name] != expected:
                raise leads_elsewhere(f"{self.where}: {name}", expected, hashes[name])
        return Outcome(result, dict.fromkeys(names, Fate.UNMERGED), Hashed(after=hashes))

    def _corrected(self, spec: TensorSpec, guess: Bytes, stored: torch.Tensor | None) -> torch.Tensor:
        """Corrects one tensor, starting from its prediction or from zeros."""
        if stored is None:
            payload = guess if guess.nbytes == spec.nbytes else np.zeros(spec.nbytes, np.uint8)
        else:
            where = f"{self.where}: {spec.name}"
            payload = corrected(guess, bytes_from_tensor(stored), spec.nbytes, spec.dtype.itemsize, where)
        return tensor_from_bytes(payload, spec)
