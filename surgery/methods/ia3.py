"""(IA)³ (Liu et al., arXiv 2205.05638, section 3.3): activations are multiplied by a learned vector.

Scaling a layer's outputs means scaling the rows of its weight and its bias. Scaling the inputs of a feed-forward layer
means scaling the columns of its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.spec import DType, TensorSpec
from surgery.errors import NotMerged
from surgery.methods.base import TransformingMethod
from surgery.methods.lora import check_weight
from surgery.methods.shapes import change_outputs, check_matrix, matrix_shape

if TYPE_CHECKING:
    import torch


class Ia3(TransformingMethod):
    """W = s · l ∘ W0 by rows, the bias likewise; by columns where the layer is feed-forward; s = alpha, 1 in peft.

    Factors: ia3_l (out, 1), or (1, in) if feed-forward; for a convolution (1, channels, 1, …). Settings: feedforward;
    for a fused layer also `enabled`, one boolean per slice of the outputs: ia3_l (height · n, 1) has the n enabled
    slices, and l is 1 in the others.
    """

    name = "ia3"
    title = "(IA)³"
    paper = "(IA)³, arXiv 2205.05638"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        enabled = module.settings.get("enabled", (True,))
        size = module.factors["ia3_l"].spec.size // sum(enabled) * len(enabled)
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
        """s · l ∘ W0, or W / (s · l); the latter raises NotMerged if l has a zero."""
        scale = _whole(module, factors["ia3_l"].double().flatten()) * module.scaling
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


def _whole(module: AdapterModule, scale: torch.Tensor) -> torch.Tensor:
    """l, with ones in the slices of a fused layer that are not adapted."""
    import torch

    enabled = module.settings.get("enabled", (True,))
    parts = iter(scale.chunk(sum(enabled)))
    height = scale.numel() // sum(enabled)
    return torch.cat([next(parts) if each else scale.new_ones(height) for each in enabled])
