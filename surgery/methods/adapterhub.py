"""VeRA and DoRA as the library adapters applies them (adapters.methods.lora, 1.3).

Its VeRA (arXiv 2310.11454) trains square matrices instead of vectors: ΔW = s · (V_B B) (V_D A). Its DoRA (arXiv
2402.09353) scales the layer's outputs including the bias, and leaves s out of the norm: with P = BA, or VeRA's product,
W = m ∘ (W0 + s P) / ‖W0 + P‖ and b = m ∘ b0 / ‖W0 + P‖, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.layers import LayerKind
from formats.spec import DType, TensorSpec
from surgery.errors import NotFinite
from surgery.exact.fixed_order import fine_product, matmul
from surgery.exact.rounding import Delta, blocks, round_once, row_norms
from surgery.methods.base import AdditiveMethod, TransformingMethod
from surgery.methods.dora import Dora
from surgery.methods.lora import check_weight, outward
from surgery.methods.shapes import change_outputs, check_factor, check_matrix, factor_shape

if TYPE_CHECKING:
    import torch


class SquareVera(AdditiveMethod):
    """ΔW = s · (V_B B) (V_D A), s = alpha / rank.

    Factors: vera_B (out, out), lora_B (out, rank), vera_D (rank, rank), lora_A (rank, in).
    """

    name = "vera_square"
    title = "VeRA"
    frozen = frozenset({"lora_A", "lora_B"})
    paper = "VeRA with square matrices, adapters 1.3"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if the factors do not fit."""
        out, into = _check_product(module)
        check_matrix(module, weight, out, into)

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW, transposed if the base stores (in, out)."""
        return fine_product(*outward(module.kind, *_sides(factors)), weight * module.scaling)


class OutputDora(TransformingMethod):
    """W = m ∘ (W0 + s P) / ‖W0 + P‖; of a bias b = m ∘ b0 / ‖W0 + P‖, which reads its layer's weight.

    Factors: m (out, 1), lora_A (rank, in) and lora_B (out, rank); for VeRA's product also vera_B (out, out) and vera_D
    (rank, rank); for a bias also weight (out, in).
    """

    name = "dora_outputs"
    title = "DoRA"
    paper = "DoRA of a layer's outputs, adapters 1.3"
    forgets = Dora.forgets

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """As SquareVera's check. Also raises NotMergeable for a weight stored (in, out), for which the library has no
        DoRA."""
        out, into = _check_product(module)
        check_factor(module, "m", out, 1)
        if len(weight.shape) == 1:
            check_factor(module, "weight", out, into)
            check_weight(weight, (out,))
        else:
            check_matrix(module, weight, out, into, (LayerKind.LINEAR,))

    def transform(
        self,
        module: AdapterModule,
        weight: torch.Tensor,
        factors: Mapping[str, torch.Tensor],
        dtype: DType,
        *,
        back: bool = False,
    ) -> torch.Tensor:
        """W or b. Raises NotFinite if W0 + P is zero for some output."""
        import torch

        right, left = _sides(factors)
        product, lengths = fine_product(left, right, 1.0), factors["m"].flatten()  # (out,)

        def factor(rows: torch.Tensor, added: torch.Tensor, begin: int, end: int) -> torch.Tensor:
            norms = row_norms(rows + added)
            if not norms.all():
                raise NotFinite("W0 + BA is zero for some output, so DoRA gives it no direction", where=module.target)
            return lengths[begin:end].to(norms.dtype) / norms  # (end - begin,)

        def change(rows: torch.Tensor, begin: int, end: int) -> torch.Tensor:
            added = product.rows(begin, end)
            return (rows + module.scaling * added) * factor(rows, added, begin, end)[:, None]

        if weight.dim() == 2:
            return change_outputs(module, weight, dtype, change)
        stored = factors["weight"]
        parts = [
            factor(stored[begin:end].double(), product.rows(begin, end), begin, end) for begin, end in blocks(stored)
        ]
        return round_once(weight.double() * torch.cat(parts), dtype)


def _check_product(module: AdapterModule) -> tuple[int, int]:
    """The sides (out, in) of P. Raises ShapeMismatch."""
    (rank, into), (out, _) = (factor_shape(module, role, 2) for role in ("lora_A", "lora_B"))
    check_factor(module, "lora_B", out, rank)
    if "vera_B" in module.factors:
        check_factor(module, "vera_B", out, out)
        check_factor(module, "vera_D", rank, rank)
    return out, into


def _sides(factors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of P: (rank, in) and (out, rank)."""
    if "vera_B" not in factors:
        return factors["lora_A"], factors["lora_B"]
    return matmul(factors["vera_D"], factors["lora_A"]), matmul(factors["vera_B"], factors["lora_B"])
