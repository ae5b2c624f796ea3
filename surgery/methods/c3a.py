"""C3A (Chen et al., arXiv 2407.19342): ΔW consists of circulant blocks, each given by its first row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.layers import LayerKind
from formats.spec import TensorSpec
from surgery.exact.rounding import Delta, RowsOf
from surgery.methods.base import AdditiveMethod
from surgery.methods.shapes import check_matrix, factor_shape

if TYPE_CHECKING:
    import torch


class C3a(AdditiveMethod):
    """ΔW[m b + i, n b + j] = kernel[m, n, (j − i) mod b] / in, as peft normalises it.

    Factors: c3a_kernel (out / b, in / b, b).
    """

    name = "c3a"
    title = "C3A"
    paper = "C3A, arXiv 2407.19342"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        down, along, size = factor_shape(module, "c3a_kernel", 3)
        check_matrix(module, weight, down * size, along * size, (LayerKind.LINEAR,))

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW, whose rows are computed on demand."""
        import torch

        kernel = factors["c3a_kernel"].double()
        _, along, size = kernel.shape
        kernel = kernel * weight / (along * size)

        def rows(begin: int, end: int) -> torch.Tensor:
            at = torch.arange(begin, end)
            shift = (torch.arange(size) - (at % size)[:, None]) % size  # (rows, b)
            return kernel[at // size].gather(2, shift[:, None, :].expand(-1, along, -1)).flatten(1)

        return RowsOf(along * size, rows)
