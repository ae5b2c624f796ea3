"""HRA (Yuan et al., arXiv 2405.17484): W = W0 Π (I − 2 uᵢ uᵢᵀ), a chain of Householder reflections.

With `apply_GS`, the vectors are first made orthonormal by Gram–Schmidt, so that the reflections commute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.spec import DType, TensorSpec
from surgery.errors import NotFinite
from surgery.exact.fixed_order import matmul, multiplier, norms
from surgery.methods.base import TransformingMethod
from surgery.methods.shapes import PLAIN, change_outputs, check_matrix, factor_shape, matrix_shape

if TYPE_CHECKING:
    import torch


class Hra(TransformingMethod):
    """W = W0 H₁ H₂ …; a reflection is its own inverse.

    Factors: hra_u (in, rank), one vector per column. Settings: apply_GS.
    """

    name = "hra"
    title = "HRA"
    paper = "HRA, arXiv 2405.17484"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        into = factor_shape(module, "hra_u", 2)[0]
        check_matrix(module, weight, matrix_shape(module, weight)[0], into, PLAIN)

    def transform(
        self,
        module: AdapterModule,
        weight: torch.Tensor,
        factors: Mapping[str, torch.Tensor],
        dtype: DType,
        *,
        back: bool = False,
    ) -> torch.Tensor:
        """W0 Π H, or W with the reflections in reverse. Raises NotFinite for a vector of zeros."""
        vectors: list[torch.Tensor] = []  # (in, 1) each, of length 1
        for vector in factors["hra_u"].double().mT:
            column = vector[:, None]
            for earlier in vectors if module.settings["apply_GS"] else ():
                column = column - matmul(earlier.mT, column) * earlier
            length = norms(column.mT)
            if length == 0:
                raise NotFinite("a reflection's vector is zero, so it has no direction", where=module.target)
            vectors.append(column / length)

        steps = [(multiplier(vector), vector) for vector in vectors]

        def reflected(rows: torch.Tensor, _: int, __: int) -> torch.Tensor:
            for onto, vector in reversed(steps) if back else steps:
                rows = rows - 2 * onto(rows) * vector.mT
            return rows

        return change_outputs(module, weight, dtype, reflected)
