"""GraLoRA (Jung et al., arXiv 2505.20355): ΔW is cut into k × k blocks, each with low-rank factors.

Together these are one product with k · rank terms, most of them zero. A hybrid adapter also has LoRA's factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import ShapeMismatch
from formats.spec import TensorSpec
from surgery.exact.rounding import Delta, exact_product
from surgery.methods.base import AdditiveMethod
from surgery.methods.lora import outward
from surgery.methods.shapes import check_factor, check_matrix, factor_shape

if TYPE_CHECKING:
    import torch

_GENERAL = ("gralora_A_general.weight", "gralora_B_general.weight")


class GraLora(AdditiveMethod):
    """Block (j, n) of ΔW = s · B[j, n-th part]ᵀ A[n, :, j-th part]ᵀ, s = alpha / (rank + hybrid rank).

    Factors: gralora_A (k, in / k, rank), gralora_B (k, rank, out / k), with the rank in k parts; for a hybrid adapter
    also gralora_A_general.weight (hybrid, in), gralora_B_general.weight (out, hybrid). Settings: alpha, hybrid_r.
    """

    name = "gralora"
    title = "GraLoRA"
    paper = "GraLoRA, arXiv 2505.20355"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        (blocks, width, rank), (_, _, height) = (factor_shape(module, f"gralora_{side}", 3) for side in "AB")
        if rank % blocks:
            raise ShapeMismatch("the rank is not divided by the blocks", where=weight.name, expected=blocks, found=rank)
        check_factor(module, "gralora_B", blocks, rank, height)
        if _GENERAL[0] in module.factors and _GENERAL[1] in module.factors:
            hybrid = int(module.settings["hybrid_r"])
            check_factor(module, _GENERAL[0], hybrid, blocks * width)
            check_factor(module, _GENERAL[1], blocks * height, hybrid)
        check_matrix(module, weight, blocks * height, blocks * width)

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """Bytes for both factors including their zeros, and again in fixed point."""
        (blocks, width, rank), height = factor_shape(module, "gralora_A", 3), factor_shape(module, "gralora_B", 3)[2]
        return 3 * 8 * blocks * rank * blocks * (width + height)

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW as one product."""
        import torch

        a, b = factors["gralora_A"].double(), factors["gralora_B"].double()
        blocks, width, rank = a.shape
        part, height = rank // blocks, b.shape[2]
        right = torch.zeros(blocks, blocks, part, blocks, width, dtype=torch.float64)  # terms (j, n, t), inputs (n, i)
        left = torch.zeros(blocks, height, blocks, blocks, part, dtype=torch.float64)  # outputs (j, o), terms (j, n, t)
        for each in range(blocks):
            right[:, each, :, each] = a[each].view(width, blocks, part).permute(1, 2, 0)
            left[each, :, each] = b[each].view(blocks, part, height).permute(2, 0, 1)
        left, right = left.view(blocks * height, -1), right.view(-1, blocks * width)
        if _GENERAL[0] in factors:
            left = torch.cat([left, factors[_GENERAL[1]].double()], 1)
            right = torch.cat([right, factors[_GENERAL[0]].double()])
        scaling = float(module.settings["alpha"]) / (rank + int(module.settings["hybrid_r"]))
        return exact_product(*outward(module.kind, right, left), weight * scaling)
