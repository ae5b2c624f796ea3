"""RoAd (Liao and Monz, arXiv 2409.00119, equation 4): W = R W0, R rotates and scales pairs of outputs; the bias too.

The outputs of a pair are half a group apart. The three variants differ in the number of angles and lengths per pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import ShapeMismatch
from formats.layers import LayerKind
from formats.spec import DType, TensorSpec
from surgery.errors import NotMergeable, NotMerged
from surgery.methods.base import TransformingMethod
from surgery.methods.shapes import change_outputs, check_factor, check_matrix, matrix_shape

if TYPE_CHECKING:
    import torch

_PER_OUTPUT = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # number of angles, and of lengths


class Road(TransformingMethod):
    """Of each pair of outputs y₁ = c₁ x₁ − s₁ x₂, y₂ = s₂ x₁ + c₂ x₂; c = α cos θ, s = α sin θ.

    Factors: road_theta and road_alpha, each with ½, 1 or 2 values per output. Settings: variant, group_size.
    """

    name = "road"
    title = "RoAd"
    paper = "RoAd, arXiv 2409.00119"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the variant is unknown or the weight is not stored as plain floats, ShapeMismatch if
        its shape does not fit."""
        variant, group = module.settings["variant"], int(module.settings["group_size"])
        if variant not in _PER_OUTPUT:
            raise NotMergeable(
                "no such variant of RoAd", where=weight.name, expected=", ".join(_PER_OUTPUT), found=variant
            )
        size = module.factors["road_theta"].spec.size
        check_factor(module, "road_alpha", size)
        out = int(size / _PER_OUTPUT[variant])
        if out % group or group % 2:
            raise ShapeMismatch("the groups do not fill the outputs", where=weight.name, expected=group, found=out)
        check_matrix(module, weight, out, matrix_shape(module, weight)[1], (LayerKind.LINEAR,))

    def transform(
        self,
        module: AdapterModule,
        weight: torch.Tensor,
        factors: Mapping[str, torch.Tensor],
        dtype: DType,
        *,
        back: bool = False,
    ) -> torch.Tensor:
        """R W0, or R⁻¹ W; the latter raises NotMerged if both outputs of a pair were mapped to one line."""
        import torch

        half = int(module.settings["group_size"]) // 2
        theta, alpha = factors["road_theta"].double(), factors["road_alpha"].double()
        if module.settings["variant"] == "road_4":
            (angle, turn), (length, stretch) = (
                values.view(-1, 2, 2 * half).transpose(0, 1).flatten(1) for values in (theta, alpha)
            )
        elif module.settings["variant"] == "road_1":
            angle = turn = theta.view(-1, half).repeat_interleave(2, 0).flatten()
            length = stretch = alpha.view(-1, half).repeat_interleave(2, 0).flatten()
        else:
            angle, turn, length, stretch = theta, theta, alpha, alpha
        c1, c2 = (length * angle.cos()).view(-1, 2, half).unbind(1)  # (groups, half) each
        s1, s2 = (stretch * turn.sin()).view(-1, 2, half).unbind(1)
        if back:
            area = c1 * c2 + s1 * s2
            if not area.all():
                raise NotMerged(
                    "RoAd laid both outputs of a pair on one line here: there is no way back",
                    where=module.target,
                    then="go back to the base itself",
                )
            c1, c2, s1, s2 = c2 / area, c1 / area, -s1 / area, -s2 / area

        def turned(columns: torch.Tensor, _: int, __: int) -> torch.Tensor:
            first, second = columns.reshape(len(columns), -1, 2, half).unbind(2)  # (columns, groups, half) each
            return torch.stack([c1 * first - s1 * second, s2 * first + c2 * second], 2).flatten(1)

        return change_outputs(module, weight, dtype, turned, columns=True)
