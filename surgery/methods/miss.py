"""MiSS (Kang et al., arXiv 2409.15371): ΔW repeats one block D (rank, out) along the inputs.

`mini` repeats a narrower block along the outputs too. `bat`, the paper's first form (Bone), is multiplicative: each
square block of W becomes W + W D + D, with one D per block of outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import ShapeMismatch
from formats.layers import LayerKind
from formats.spec import DType, TensorSpec
from surgery.exact.fixed_order import matmul
from surgery.exact.rounding import Delta, RowsOf
from surgery.methods.base import AdditiveMethod, TransformingMethod
from surgery.methods.shapes import change_outputs, check_factor, check_matrix, factor_shape, matrix_shape

if TYPE_CHECKING:
    import torch


class Miss(AdditiveMethod):
    """ΔW[o, i] = D[i mod rank, o], or D[i mod rank, o mod mini_r].

    Factors: miss_block (rank, out) or (rank, mini_r). Settings: init_weights, mini_r, out, in.
    """

    name = "miss"
    title = "MiSS"
    paper = "MiSS, arXiv 2409.15371"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        width = factor_shape(module, "miss_block", 2)[1]
        out, into = matrix_shape(module, weight)
        narrow = module.settings["init_weights"] == "mini" and width == module.settings["mini_r"] and out % width == 0
        check_matrix(module, weight, out if narrow else width, into, (LayerKind.LINEAR,))

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW, whose rows are computed on demand."""
        import torch

        block = factors["miss_block"].double() * weight
        rank, width = block.shape
        into = int(module.settings["in"])
        along = torch.arange(into) % rank
        return RowsOf(into, lambda begin, end: block.mT[torch.arange(begin, end) % width][:, along])


class MissBat(TransformingMethod):
    """W = W0 + W0 D + D for each square block.

    Factors: miss_block (out / rank, rank, rank).
    """

    name = "miss_bat"
    title = "MiSS"
    paper = "MiSS (bat), arXiv 2409.15371"
    forgets = "MiSS with init_weights=bat multiplies W0 by I + D, which need not have an inverse"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        blocks, rank, _ = factor_shape(module, "miss_block", 3)
        check_factor(module, "miss_block", blocks, rank, rank)
        into = matrix_shape(module, weight)[1]
        if into % rank:
            raise ShapeMismatch("the blocks do not fill the inputs", where=weight.name, expected=rank, found=into)
        check_matrix(module, weight, blocks * rank, into, (LayerKind.LINEAR,))

    def transform(
        self,
        module: AdapterModule,
        weight: torch.Tensor,
        factors: Mapping[str, torch.Tensor],
        dtype: DType,
        *,
        back: bool = False,
    ) -> torch.Tensor:
        """W0 + W0 D + D."""
        import torch

        blocks = factors["miss_block"].double()
        rank = blocks.shape[1]

        def added(rows: torch.Tensor, begin: int, end: int) -> torch.Tensor:
            split = rows.reshape(len(rows), -1, rank)  # (rows, in / rank, rank)
            parts = []
            for number in range(begin // rank, (end - 1) // rank + 1):
                first, last = max(begin, number * rank), min(end, (number + 1) * rank)
                ours, block = split[first - begin : last - begin], blocks[number]
                parts.append(ours + (matmul(ours, block) + block[first % rank :][: last - first, None]))
            return torch.cat(parts).flatten(1)

        return change_outputs(module, weight, dtype, added)
