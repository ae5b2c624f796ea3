"""Merging by rows: a weight is read, merged, hashed, written and corrected in pieces of about a megabyte.

This serves weights that only receive deltas, which is nearly all of them. It writes the same bytes as `ops.Merge`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.spec import DType, TensorSpec
from formats.tensors import bytes_from_tensor, torch_dtype
from surgery.exact.correction import Corrections
from surgery.exact.finite import check_finite, is_finite
from surgery.exact.rounded_sum import BLOCK_ELEMENTS, RoundedSum, segments
from surgery.exact.survival import Watch
from surgery.hashes import new_hash
from surgery.operations.merge.figures import MergeFigures
from surgery.operations.merge.ops import FRACTION_BITS, as_aside, deltas_of, negated, out_of_range
from surgery.pipeline.plan import Fate, Outcome, Sink, Source

if TYPE_CHECKING:
    import torch


def piece_workspace(base: TensorSpec) -> int:
    """Bytes that one piece of a weight needs: as read, as merged, as predicted, and two float32 sums."""
    return BLOCK_ELEMENTS * (3 * base.dtype.itemsize + 32)


@dataclass(frozen=True)
class MergeRows:
    """Adds the deltas of its modules to W0 and stores the sum as `dtype`; `undo` makes a correction that restores W0.

    Inputs: the base's tensor, then each module's factors in order of their roles. Output: the tensor in `dtype`.
    """

    base: TensorSpec
    dtype: DType
    modules: tuple[tuple[AdapterModule, float], ...]
    undo: bool = False

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Merges a whole tensor at once."""
        import torch

        base, *factors = inputs
        flat = base.reshape(-1)
        result = torch.empty(flat.shape, dtype=torch_dtype(self.dtype), device=base.device)

        def sink(begin: int, tensor: torch.Tensor) -> None:
            result[begin : begin + tensor.numel()] = tensor.reshape(-1)

        outcome = self.streamed(lambda begin, count: flat[begin : begin + count], tuple(factors), sink)
        return Outcome((result.view(base.shape),), outcome.fates, outcome.figures, outcome.asides)

    def streamed(self, source: Source, rest: tuple[torch.Tensor, ...], sink: Sink) -> Outcome:
        """Adds, rounds once, and hashes the tensor before and after."""
        import torch

        watch, before, after = Watch(), new_hash(), new_hash()
        corrections = Corrections(self.base.dtype.itemsize, self._fraction) if self.undo else None
        for begin, rows, forward, back in self._pieces(source, rest):
            columns = rows.shape[1]
            merged = torch.empty(rows.shape, dtype=torch_dtype(self.dtype), device=rows.device)
            certain = forward.round(rows, begin[1], merged, watch)
            if not watch.is_finite and not is_finite(merged):
                check_finite(rows, self.base.name)
                raise out_of_range(self.base.name, merged.dtype)
            here = bytes_from_tensor(rows)
            before.update(here.data)
            after.update(bytes_from_tensor(merged).data)
            sink(begin[0] * columns, merged)
            if corrections is None or back is None:
                continue
            told = bytes_from_tensor(merged) if self._fraction is not None else None
            guess = torch.empty(rows.shape, dtype=torch_dtype(self.base.dtype), device=rows.device)
            if certain and told is not None:
                back.back(merged, begin[1], guess, forward)
            else:
                back.round(merged, begin[1], guess)
            corrections.add(here, bytes_from_tensor(guess), told)
        figures = MergeFigures(
            before={self.base.name: before.hexdigest()},
            after={self.base.name: after.hexdigest()},
            surviving={self.base.name: watch.surviving},
            changed=watch.asks if self._fraction is None else before.digest() != after.digest(),
        )
        asides = () if corrections is None else (as_aside(corrections.finished()),)
        return Outcome((), {self.base.name: Fate.MERGED}, figures, asides)

    @property
    def _fraction(self) -> int | None:
        """Fraction bits of the dtype, if the result keeps the base's dtype and so shows where rounding coarsened it."""
        return FRACTION_BITS[self.dtype] if self.dtype is self.base.dtype else None

    def _pieces(
        self, source: Source, factors: tuple[torch.Tensor, ...]
    ) -> Iterator[tuple[tuple[int, int], torch.Tensor, RoundedSum, RoundedSum | None]]:
        """Yields the weight's rows in order: the first row's index in the weight and in its segment, the rows, the sum
        that adds the deltas and the sum that subtracts them."""
        deltas, backward = deltas_of(self.modules, factors), deltas_of(negated(self.modules), factors)
        assert deltas is not None  # ensured by the plan
        assert backward is not None
        columns = max(1, deltas[0].columns)
        height = max(1, BLOCK_ELEMENTS // columns)
        rows = self.base.size // columns
        both = zip(segments(deltas, rows), segments(backward, rows), strict=True)
        for (first, last, parts), (_, _, negative) in both:
            sums: tuple[RoundedSum, RoundedSum | None] | None = None
            for begin in range(first, last, height):
                end = min(last, begin + height)
                piece = source(begin * columns, (end - begin) * columns).view(-1, columns)
                if sums is None:
                    back = RoundedSum(negative, self.base.dtype, piece.device) if self.undo else None
                    sums = RoundedSum(parts, self.dtype, piece.device), back
                yield (begin, begin - first), piece, *sums
