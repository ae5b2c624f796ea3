"""PEANuT (Zhong et al., arXiv 2410.01870): a small network is applied to each column of W0, and its output is added to
the column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.layers import LayerKind
from formats.spec import DType, TensorSpec
from surgery.errors import NotMergeable
from surgery.exact.fixed_order import matmul
from surgery.methods.base import TransformingMethod
from surgery.methods.shapes import change_outputs, check_factor, check_matrix, factor_shape, matrix_shape

if TYPE_CHECKING:
    import torch


class Peanut(TransformingMethod):
    """W = W0 + scaling · B f(… f(A W0)), with residuals around pairs of inner layers.

    Factors: peanut_A.weight (rank, out), peanut_B.weight (out, rank), peanut_encoders.n.weight and
    peanut_decoders.n.weight (rank, rank). Settings: scaling, depth, act_fn.
    """

    name = "peanut"
    title = "PEANuT"
    paper = "PEANuT, arXiv 2410.01870"
    forgets = "PEANuT adds a nonlinear function of W0, which cannot be solved for W0"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the activation is unknown or the weight is not stored as plain floats, ShapeMismatch
        if its shape does not fit."""
        if module.settings["act_fn"] not in ("relu", "tanh", "sigmoid", "silu"):
            raise NotMergeable(
                "this activation is not known here",
                where=weight.name,
                expected="relu, tanh, sigmoid or silu",
                found=module.settings["act_fn"],
            )
        rank, out = factor_shape(module, "peanut_A.weight", 2)
        check_factor(module, "peanut_B.weight", out, rank)
        for number in range(int(module.settings["depth"])):
            for side in ("encoders", "decoders"):
                check_factor(module, f"peanut_{side}.{number}.weight", rank, rank)
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
        """W0 + scaling · the network's output for each column."""
        import torch

        name, depth = module.settings["act_fn"], int(module.settings["depth"])
        activation = torch.nn.functional.silu if name == "silu" else getattr(torch, name)
        turned = {role: factor.double().mT for role, factor in factors.items()}

        def added(columns: torch.Tensor, _: int, __: int) -> torch.Tensor:
            hidden = activation(matmul(columns, turned["peanut_A.weight"]))  # (columns, rank)
            kept = []
            for number in range(depth):
                kept.append(hidden)
                hidden = activation(matmul(hidden, turned[f"peanut_encoders.{number}.weight"]))
            for number in range(depth):
                hidden = activation(matmul(hidden, turned[f"peanut_decoders.{number}.weight"])) + kept.pop()
            return columns + float(module.settings["scaling"]) * matmul(hidden, turned["peanut_B.weight"])

        return change_outputs(module, weight, dtype, added, columns=True)
