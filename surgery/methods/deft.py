"""DEFT (peft.tuners.deft): removes W0's component in a learned subspace, and adds another one there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.spec import DType, TensorSpec
from surgery.errors import NotMergeable
from surgery.exact.fixed_order import multiplier
from surgery.methods.shapes import change_outputs, check_factor, check_matrix, factor_shape, matrix_shape

if TYPE_CHECKING:
    import torch


class Deft:
    """W = W0 − P relu(P)ᵀ W0 + s · P R, with s = alpha / rank if there is an alpha, else 1; with `para` there is no R.

    Factors: deft_P (out, rank), deft_R (rank, in). Settings: alpha, para, decomposition_method.
    """

    name = "deft"
    paper = "DEFT, peft.tuners.deft"
    forgets = "DEFT removes W0's component in a subspace, which is lost"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable for the other decomposition, or if the weight is not stored as plain floats;
        ShapeMismatch if its shape does not fit."""
        if module.settings["decomposition_method"] != "relu":
            raise NotMergeable(
                "this adapter rests on an orthogonal basis of P, whose signs are any QR routine's choice and not "
                "in the file",
                where=weight.name,
                expected="decomposition_method = relu",
                found=module.settings["decomposition_method"],
            )
        out, rank = factor_shape(module, "deft_P", 2)
        into = matrix_shape(module, weight)[1]
        if not module.settings["para"]:
            check_factor(module, "deft_R", rank, into)
        check_matrix(module, weight, out, into)

    def transform(
        self,
        module: AdapterModule,
        weight: torch.Tensor,
        factors: Mapping[str, torch.Tensor],
        dtype: DType,
        *,
        back: bool = False,
    ) -> torch.Tensor:
        """W0 − P relu(P)ᵀ W0 + s P R."""
        import torch

        p = factors["deft_P"].double()  # (out, rank)
        alpha = module.settings["alpha"]
        scale = float(alpha) / p.shape[1] if alpha else 1.0
        r = torch.zeros(1, 1) if module.settings["para"] else factors["deft_R"].double().mT * scale  # (in, rank)

        inward, outward = multiplier(p.clamp(min=0)), multiplier(p.mT)

        def replaced(columns: torch.Tensor, begin: int, end: int) -> torch.Tensor:
            new = 0 if module.settings["para"] else r[begin:end]
            return columns + outward(new - inward(columns))

        return change_outputs(module, weight, dtype, replaced, columns=True)
