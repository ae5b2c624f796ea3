"""HiRA (Huang et al., ICLR 2025, openreview TwJrTz9cRS): W = W0 ∘ (1 + B A)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import AdapterFormatError
from formats.layers import LayerKind
from formats.spec import DType, TensorSpec
from surgery.errors import NotMerged
from surgery.exact.rounding import exact_product
from surgery.methods.base import TransformingMethod
from surgery.methods.shapes import TRANSPOSED, change_outputs, check_factor, check_matrix, factor_shape

if TYPE_CHECKING:
    import torch


class Hira(TransformingMethod):
    """W = W0 + W0 ∘ (B A).

    Factors: hira_A (rank, in, *kernel), hira_B (out, rank, 1, …); for an embedding hira_embedding_A (rank, vocabulary),
    hira_embedding_B (width, rank).
    """

    name = "hira"
    title = "HiRA"
    paper = "HiRA, openreview TwJrTz9cRS"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, AdapterFormatError if a factor is missing,
        ShapeMismatch if factors do not fit."""
        missing = [role for role in _roles(module) if role not in module.factors]
        if missing:
            raise AdapterFormatError("a factor is missing", where=weight.name, expected=", ".join(missing))
        dims = 2 if module.kind is not LayerKind.CONV else len(weight.shape)
        a, b = (factor_shape(module, role, dims) for role in _roles(module))
        check_factor(module, _roles(module)[1], b[0], a[0], *(1,) * (dims - 2))
        check_matrix(module, weight, b[0], math.prod(a[1:]))

    def transform(
        self,
        module: AdapterModule,
        weight: torch.Tensor,
        factors: Mapping[str, torch.Tensor],
        dtype: DType,
        *,
        back: bool = False,
    ) -> torch.Tensor:
        """W0 ∘ (1 + B A), or W / (1 + B A); the latter raises NotMerged if 1 + B A has a zero."""
        a, b = (factors[role].flatten(1) for role in _roles(module))  # (rank, in), (out, rank)
        transposed = module.kind in TRANSPOSED
        product = exact_product(a.mT, b.mT, 1.0) if transposed else exact_product(b, a, 1.0)  # as stored

        def scaled(rows: torch.Tensor, begin: int, end: int) -> torch.Tensor:
            factor = 1 + product.rows(begin, end)
            if back and not factor.all():
                raise NotMerged(
                    "HiRA multiplied by zero here: nothing is left to divide",
                    where=module.target,
                    then="go back to the base itself",
                )
            return rows / factor if back else rows * factor

        return change_outputs(module, weight, dtype, scaled, columns=transposed)


def _roles(module: AdapterModule) -> tuple[str, str]:
    return ("hira_embedding_A", "hira_embedding_B") if module.kind is LayerKind.EMBEDDING else ("hira_A", "hira_B")
