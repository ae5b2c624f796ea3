"""The difference of two weights as an operator for matrix products, never held as a whole float32 matrix.

This module knows tensors only: no file, no rank, no decomposition.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

_BLOCK_ELEMENTS = 1 << 17  # of a block of rows, which stays in the cache while it is formed, measured and multiplied
_DEVICE_BLOCK_ELEMENTS = 1 << 25  # on an accelerator, where calls cost more than memory
_SAFE = 1e-30, 1e30  # range of ‖ΔW‖² in which no part under- or overflows in float32


class DeltaMatrix:
    """ΔW = tuned − base, (rows, columns), for products with thin matrices.

    Each float32 block of rows is recomputed from the stored tensors whenever it is needed: reading them from memory
    costs less than a float32 copy would. In addition there is one copy in a fast dtype, for products that need no more
    precision: bfloat16 if the processor multiplies it many times faster, else float32.

    Attributes:
        shape: (rows, columns).
        total: ‖ΔW‖², summed in float64; NaN or Inf if the difference contains one.
        scale: factor by which products must be multiplied: a power of two. It differs from 1 only if the squares of
            ΔW's elements would leave float32's range.
    """

    def __init__(self, base: torch.Tensor | None, tuned: torch.Tensor, flipped: bool, scale: float = 1.0) -> None:
        """Use `between` or `of`. `base` and `tuned` are as stored; `flipped` means that ΔW is the transpose."""
        rows, columns = tuned.shape
        self.shape = (columns, rows) if flipped else (rows, columns)
        self.scale = scale
        self._flipped = flipped
        self._base, self._tuned = base, tuned
        self._fast, self.total = self._survey()
        self.total *= scale * scale

    @classmethod
    def between(cls, base: torch.Tensor, tuned: torch.Tensor) -> DeltaMatrix | None:
        """tuned − base; None if it is zero everywhere.

        Args:
            base, tuned: (rows, columns) of any floating-point dtypes, as stored. Views are allowed, also transposed
                ones. If one is float64, the difference is taken in float64 and then rounded to float32.
        """
        flipped = tuned.stride(1) != 1 and tuned.stride(0) == 1
        delta = cls(base.mT, tuned.mT, True) if flipped else cls(base, tuned, False)
        if delta.total == 0 or not math.isfinite(delta.total) or _SAFE[0] < delta.total < _SAFE[1]:
            return delta if delta.total else None
        return cls.of(delta.matrix())

    @classmethod
    def of(cls, matrix: torch.Tensor) -> DeltaMatrix:
        """A matrix in memory, (rows, columns) float32, as the difference to zero."""
        import torch

        flipped = matrix.stride(1) != 1 and matrix.stride(0) == 1
        stored = matrix.mT if flipped else matrix
        delta = cls(None, stored, flipped)
        if delta.total == 0 or not math.isfinite(delta.total) or _SAFE[0] < delta.total < _SAFE[1]:
            return delta
        scale = 2.0 ** (math.frexp(delta.total)[1] // 2)
        return cls(None, (stored.to(torch.float64) / scale).to(torch.float32), flipped, scale)

    @property
    def is_precise(self) -> bool:
        """Whether the fast dtype is float32, so that all products are precise."""
        return self._fast.dtype.itemsize == 4

    @property
    def device(self) -> torch.device:
        """The device of the tensors, and of everything that is multiplied with them."""
        return self._tuned.device

    def product(
        self, thin: torch.Tensor, *, adjoint: bool, precise: bool, near: torch.Tensor | None = None
    ) -> torch.Tensor:
        """ΔW @ thin or, with `adjoint`, ΔWᵀ @ thin, in thin's dtype.

        Args:
            thin: (columns, width) float32 or float64, or (rows, width) for the adjoint.
            adjoint: multiply by the transpose.
            precise: multiply in thin's dtype, else in the fast dtype.
            near: an approximation of the product. Then only the distance to it is rounded to the fast dtype, so that
                the result suffers only from the rounding of ΔW and of `thin`.
        """
        import torch

        plain = adjoint == self._flipped  # whether the product needs the tensors as stored, not transposed
        if not precise:
            narrow = thin.to(self._fast.dtype)
            # A contiguous left factor is twice as fast as a view.
            pair = (self._fast, narrow) if plain else (narrow.mT.contiguous(), self._fast)
            if near is None:
                out = torch.mm(*pair).to(torch.float32)
            else:
                rounded = (near if plain else near.mT).to(self._fast.dtype)
                out = rounded.to(torch.float32) + torch.addmm(rounded, *pair, beta=-1)
            return out if plain else out.mT
        width, (rows, columns) = thin.shape[1], self._tuned.shape
        if plain:
            out = thin.new_empty(rows, width)
            for part, block in self._blocks():
                torch.mm(block.to(thin.dtype), thin, out=out[part])  # (part, width)
            return out
        out = thin.new_zeros(width, columns)
        for part, block in self._blocks():
            out.addmm_(thin[part].mT, block.to(thin.dtype))  # (width, columns)
        return out.mT

    def matrix(self) -> torch.Tensor:
        """ΔW as a whole, (rows, columns) float32, with its scale applied."""
        import torch

        whole = torch.cat([block.clone() for _, block in self._blocks()]).mul_(self.scale)
        return whole.mT if self._flipped else whole

    def squared_distance(self, b: torch.Tensor, a: torch.Tensor) -> float:
        """‖ΔW − BA‖², computed from the difference itself. B is (rows, rank) and A (rank, columns), both float32."""
        import torch

        left, right = (a.mT, b.mT) if self._flipped else (b, a)
        norms = self._tuned.new_empty(len(self._tuned), dtype=torch.float64)
        for part, block in self._blocks():
            difference = block.mul_(self.scale).addmm_(left[part], right, alpha=-1.0)
            norms[part] = torch.linalg.vector_norm(difference, dim=1, dtype=torch.float64)
        return float(norms.square().sum())

    def _survey(self) -> tuple[torch.Tensor, float]:
        """One pass over everything: the copy in the fast dtype, and ‖ΔW‖² before scaling.

        Each row's float32 norm is accurate to 1e-8, and the squares are summed in float64. If a row's square would
        under- or overflow, everything is done in float64.
        """
        import torch

        fast = _roomy(self._tuned.shape, _fast_dtype(self.device.type), self.device)
        norms = self._tuned.new_empty(len(self._tuned), dtype=torch.float32)
        for part, block in self._blocks():
            fast[part] = block
            torch.linalg.vector_norm(block, dim=1, out=norms[part])
        total = float(norms.to(torch.float64).square().sum())
        if not _SAFE[0] < total < _SAFE[1]:
            blocks = (torch.linalg.vector_norm(block, dim=1, dtype=torch.float64) for _, block in self._blocks())
            total = sum(float(norms.square().sum()) for norms in blocks)
        return fast, total

    def _blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of rows as stored, in float32. Each block reuses the memory of the last one."""
        import torch

        rows, columns = self._tuned.shape
        elements = _BLOCK_ELEMENTS if self.device.type == "cpu" else _DEVICE_BLOCK_ELEMENTS
        step = max(1, elements // max(1, columns))
        buffer = torch.empty(min(step, rows), columns, dtype=torch.float32, device=self.device)
        for begin in range(0, rows, step):
            part = slice(begin, min(begin + step, rows))
            block = buffer[: part.stop - begin]
            if self._base is None:
                block.copy_(self._tuned[part])
            elif torch.float64 in (self._base.dtype, self._tuned.dtype):
                block.copy_(self._tuned[part].to(torch.float64) - self._base[part].to(torch.float64))
            else:
                block.copy_(self._tuned[part]).sub_(self._base[part])
            yield part, block


def _roomy(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor. On the CPU it is made by numpy, which, unlike torch, asks the kernel for huge pages."""
    import torch

    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


@functools.cache
def _fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where the processor has instructions that multiply it, and oneDNN may use them."""
    import torch

    if device == "cpu":  # the first knows nothing of ONEDNN_MAX_CPU_ISA, the second nothing of AVX512-BF16
        capable = torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        capable = torch.cuda.is_bf16_supported()
    return torch.bfloat16 if capable else torch.float32
