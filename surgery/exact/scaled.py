"""float8 weights with scales, W = q · s: read by rows in float64, and stored again with one rounding per element.

A block keeps its scale as long as float8 can represent everything in the block with it. float8 is a floating-point
type, so a scale that is larger than necessary costs no precision down to the subnormal range. A new scale would move
every element of the block by up to half a step, even elements that the merge does not change, and mostly by more than
the change itself. So unchanged elements keep their bytes. Only a block that exceeds its scale by more than half a step,
or that was all zeros, gets the scale that the format's own quantiser would choose: the block's largest magnitude
divided by float8's largest value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from formats.spec import DType
from formats.tensors import torch_dtype
from surgery.errors import NotFinite
from surgery.exact.rounding import round_once

if TYPE_CHECKING:
    import torch

    from surgery.exact.survival import Watch

Rows = Callable[[int, int], "torch.Tensor"]
# The largest values that still round to float8's largest, 448 or 57344: half a step beyond it.
_LARGEST = {DType.F8_E4M3: 464.0, DType.F8_E5M2: 61440.0}
_AT_ONCE = 1 << 17  # float64 elements of one block, as in `rounding`
_HELD = 1 << 20  # the most elements that are kept until their scales are known; more are computed twice


@dataclass(frozen=True)
class Dequantised:
    """q · s, exact in float64, by blocks of rows.

    Attributes:
        matrix: (rows, columns) float8.
        grid: (⌈rows/block⌉, ⌈columns/block⌉) float64, the scales.
        block: number of rows and columns that share a scale.
    """

    matrix: torch.Tensor
    grid: torch.Tensor
    block: tuple[int, int]

    @classmethod
    def of(cls, weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], name: str) -> Dequantised:
        """Wraps a stored weight and its scales. Raises NotFinite for a scale that is negative, NaN or Inf."""
        import torch

        matrix = weight.reshape(-1, weight.shape[-1] if weight.dim() else 1)
        grid = scale.to(torch.float64).reshape(-1, math.ceil(matrix.shape[1] / block[1]))
        if not bool(((grid >= 0) & torch.isfinite(grid)).all()):
            raise NotFinite(
                "a scale that is negative, NaN or Inf", where=name, then="repair or quantise that model again"
            )
        return cls(matrix, grid, block)

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows begin to end.  # (end - begin, columns) float64"""
        import torch

        return spread(self.grid, self.block, begin, end, self.matrix.shape[1]).mul_(
            self.matrix[begin:end].to(torch.float64)
        )


def spread(grid: torch.Tensor, block: tuple[int, int], begin: int, end: int, columns: int) -> torch.Tensor:
    """The scale of each element of rows begin to end.  # (end - begin, columns) float64"""
    import torch

    lines = grid[torch.arange(begin, end) // block[0]]  # (end - begin, blocks across)
    return lines.repeat_interleave(block[1], dim=1)[:, :columns].contiguous()


def requantised(
    base: Dequantised,
    values: Rows,
    dtypes: tuple[DType, DType],
    *,
    power_of_two: bool = False,
    watch: Watch | None = None,
    fixed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stores float64 values as float8 with scales again.

    Args:
        base: the weight as stored before; its scales are kept where possible.
        values: computes rows begin to end, (end - begin, columns) float64. It is called twice for the same rows if a
            block is large. Its result is not overwritten.
        dtypes: dtypes of the weight and of its scales.
        power_of_two: whether new scales must be powers of two.
        watch: is passed each block: before, change, stored, in float64.
        fixed: keep every scale; values beyond it are clamped to the largest float8.

    Returns:
        (rows, columns) float8, and the scales, (⌈rows/block⌉, ⌈columns/block⌉).

    Raises:
        NotFinite: the values hold NaN or Inf.
    """
    import torch

    rows, columns = base.matrix.shape
    top = torch.finfo(torch_dtype(dtypes[0])).max
    result = torch.empty_like(base.matrix, memory_format=torch.contiguous_format)
    grid = base.grid.clone()
    for begin, end in _bands(rows, columns, base.block[0]):
        parts = list(_parts(begin, end, columns))
        held = values(begin, end) if len(parts) == 1 else None
        if not fixed:
            chosen = slice(begin // base.block[0], math.ceil(end / base.block[0]))
            peaks = _peaks((values(*part) if held is None else held for part in parts), base.block, grid.shape[1])
            before = _peaks((base.matrix[first:last] for first, last in parts), base.block, grid.shape[1])
            if not bool(torch.isfinite(peaks).all()):
                raise NotFinite(
                    "NaN or Inf among the values of a float8 weight", then="repair or quantise that model again"
                )
            old = grid[chosen]
            keep = (peaks == 0) | ((peaks <= _LARGEST[dtypes[0]] * old) & (before > 0))
            grid[chosen] = torch.where(keep, old, _scales(peaks / top, dtypes[1], power_of_two))
        for first, last in parts:
            exact = values(first, last) if held is None else held
            scales = spread(grid, base.block, first, last, columns)
            safe = torch.where(scales > 0, scales, 1.0)  # a scale is zero only if the whole block is zero
            result[first:last] = round_once((exact / safe).clamp_(-top, top), dtypes[0])
            if watch is not None:
                start = base.rows(first, last)
                watch(start, exact - start, scales.mul_(result[first:last].to(torch.float64)))
    return result, grid.to(torch_dtype(dtypes[1]))


def _bands(rows: int, columns: int, height: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows made of whole blocks."""
    step = height * max(1, _AT_ONCE // max(1, columns * height))
    for begin in range(0, rows, step):
        yield begin, min(rows, begin + step)


def _parts(begin: int, end: int, columns: int) -> Iterator[tuple[int, int]]:
    """A band as one range, or as several if it would take too much memory."""
    whole = (end - begin) * columns <= _HELD
    step = end - begin if whole else max(1, _AT_ONCE // columns)
    for first in range(begin, end, step):
        yield first, min(end, first + step)


def _peaks(parts: Iterable[torch.Tensor], block: tuple[int, int], across: int) -> torch.Tensor:
    """The largest magnitude of each block of a band.  # (blocks down, blocks across) float64"""
    import torch

    lines = []
    for part in parts:
        magnitudes = part.to(torch.float64).abs()
        padded = torch.nn.functional.pad(magnitudes, (0, across * block[1] - part.shape[1]))
        lines.append(padded.view(len(part), across, block[1]).amax(2))  # (rows, across)
    if len(lines) > 1:  # a single block, in parts
        return torch.stack([line.amax(0) for line in lines]).amax(0)[None]
    line = lines[0]
    down = math.ceil(len(line) / block[0])
    return torch.nn.functional.pad(line, (0, 0, 0, down * block[0] - len(line))).view(down, block[0], -1).amax(1)


def _scales(wanted: torch.Tensor, dtype: DType, power_of_two: bool) -> torch.Tensor:
    """Scales rounded as the format stores them, never zero.  # float64"""
    import torch

    if power_of_two:
        fraction, exponent = torch.frexp(wanted)
        wanted = torch.ldexp(torch.ones_like(wanted), exponent - (fraction == 0.5).to(exponent.dtype))
    stored = round_once(wanted.contiguous(), dtype).to(torch.float64)
    return stored.clamp_min(torch.finfo(torch_dtype(dtype)).tiny)
