"""(IA)³ (Liu et al., arXiv 2205.05638, section 3.3): activations are multiplied by a learned vector.

A layer's outputs are scaled by scaling the rows of its weight and its bias; the inputs of a feed-forward layer by
scaling the columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.spec import DType, TensorSpec
from surgery.errors import NotMerged
from surgery.methods.lora import check_weight
from surgery.methods.shapes import change_outputs, check_matrix, matrix_shape

if TYPE_CHECKING:
    import torch


class Ia3:
    """W = l ∘ W0 by rows, the bias likewise; by columns where the layer is feed-forward.

    Factors: ia3_l (out, 1), or (1, in) if feed-forward; for a convolution (1, channels, 1, …). Settings: feedforward.
    """

    name = "ia3"
    paper = "(IA)³, arXiv 2205.05638"
    forgets = ""

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable for a weight not stored as a plain float, ShapeMismatch for one of other shape."""
        size = module.factors["ia3_l"].spec.size
        out, into = matrix_shape(module, weight)
        if not module.settings["feedforward"]:
            check_matrix(module, weight, size, into)
        elif len(weight.shape) > 2:
            check_weight(weight, (weight.shape[0], size, *weight.shape[2:]))
        else:
            check_matrix(module, weight, out, size)

    def transform(
        self,
        module: AdapterModule,
        weight: torch.Tensor,
        factors: Mapping[str, torch.Tensor],
        dtype: DType,
        *,
        back: bool = False,
    ) -> torch.Tensor:
        """l ∘ W0, or W / l; the latter raises NotMerged where l has a zero."""
        scale = factors["ia3_l"].double().flatten()
        if back and not scale.all():
            raise NotMerged(
                "(IA)³ multiplied by zero here: nothing is left to divide",
                where=module.target,
                then="go back to the base itself",
            )
        if module.settings["feedforward"]:
            if weight.dim() > 2:
                scale = scale.repeat_interleave(weight[0, 0].numel())  # (in · kernel,)
            return change_outputs(module, weight, dtype, lambda rows, _, __: rows / scale if back else rows * scale)

        def scaled(rows: torch.Tensor, begin: int, end: int) -> torch.Tensor:
            part = scale[begin:end, None]
            return rows / part if back else rows * part

        return change_outputs(module, weight, dtype, scaled)
