"""GLoRA (Chavan et al., arXiv 2306.07967) as in peft: W = W0 + W0 ∘ A + B, b = b0 + b0 ∘ D + E + W0 C.

Each of A to E is a product of two factors, a vector, a scalar, or zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import AdapterFormatError
from formats.layers import LayerKind
from formats.spec import DType, TensorSpec
from surgery.errors import NotMerged
from surgery.exact.fixed_order import matmul
from surgery.exact.rounding import Delta, RowsOf, exact_product, round_once
from surgery.methods.base import TransformingMethod
from surgery.methods.lora import check_weight
from surgery.methods.shapes import change_outputs, check_factor, check_matrix, factor_shape

if TYPE_CHECKING:
    import torch


class Glora(TransformingMethod):
    """W = W0 ∘ (1 + A) + B by rows; a bias b = b0 ∘ (1 + D) + E + W0 C, which reads its layer's weight.

    Factors, for each path P of A to E: glora_P.Xd (rows, rank) with glora_P.Xu (rank, columns), or glora_P.X, or
    glora_P.zeros. For a bias also weight (out, in), the layer's weight in the base or the merged file.
    """

    name = "glora"
    title = "GLoRA"
    paper = "GLoRA, arXiv 2306.07967"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, AdapterFormatError if a path is missing,
        ShapeMismatch if factors do not fit."""
        if len(weight.shape) == 1:
            out, into = factor_shape(module, "weight", 2)
            check_weight(weight, (out,))
        else:
            check_matrix(module, weight, *_matrix(weight), (LayerKind.LINEAR,))
            out, into = weight.shape
        for path, sides in {"A": (out, into), "B": (out, into), "C": (into, 1), "D": (out,), "E": (out,)}.items():
            _check_path(module, path, sides)

    def transform(
        self,
        module: AdapterModule,
        weight: torch.Tensor,
        factors: Mapping[str, torch.Tensor],
        dtype: DType,
        *,
        back: bool = False,
    ) -> torch.Tensor:
        """W or b from W0 or b0, or the inverse, which raises NotMerged if 1 + A or 1 + D has a zero."""
        if weight.dim() == 2:
            return change_outputs(module, weight, dtype, _weight_change(module, factors, weight.shape[0], back))
        stored = factors["weight"].double()
        out, into = stored.shape
        base = _weight_change(module, factors, out, True)(stored, 0, out) if back else stored  # (out, in)
        through = matmul(base, _path(factors, "C", into).rows(0, into))[:, 0]  # W0 C
        scale, shift = (_path(factors, path, out).rows(0, out)[:, 0] for path in "DE")
        values = weight.double()
        result = (
            _divided(values - shift - through, 1 + scale, module) if back else values * (1 + scale) + shift + through
        )
        return round_once(result, dtype)


def _matrix(weight: TensorSpec) -> tuple[int, int]:
    return (weight.shape[0], weight.size // max(1, weight.shape[0])) if weight.shape else (1, 1)


def _check_path(module: AdapterModule, path: str, sides: tuple[int, ...]) -> None:
    role = f"glora_{path}"
    if f"{role}.zeros" in module.factors:
        check_factor(module, f"{role}.zeros", *sides)
    elif f"{role}.Xd" in module.factors and f"{role}.Xu" in module.factors and len(sides) == 2:
        rank = factor_shape(module, f"{role}.Xd", 2)[1]
        check_factor(module, f"{role}.Xd", sides[0], rank)
        check_factor(module, f"{role}.Xu", rank, sides[1])
    elif f"{role}.X" in module.factors:
        if module.factors[f"{role}.X"].spec.shape != (1,):
            check_factor(module, f"{role}.X", sides[0], *(1,) * (len(sides) - 1))
    else:
        raise AdapterFormatError(
            "one of GLoRA's five paths is missing, or half of it",
            where=module.target,
            expected=f"{role}.Xd and {role}.Xu, {role}.X, or {role}.zeros",
            found=", ".join(sorted(name for name in module.factors if name.startswith(role))) or "none",
        )


def _path(factors: Mapping[str, torch.Tensor], path: str, rows: int) -> Delta:
    """One of A to E, by rows; it has one column if it is a vector, a scalar or zero."""
    role = f"glora_{path}"
    if f"{role}.Xd" in factors:
        return exact_product(factors[f"{role}.Xd"], factors[f"{role}.Xu"], 1.0)
    stored = factors[f"{role}.X"] if f"{role}.X" in factors else factors[f"{role}.zeros"].flatten()[:1]
    vector = stored.double().view(-1, 1).expand(rows, 1)
    return RowsOf(1, lambda begin, end: vector[begin:end])


def _weight_change(
    module: AdapterModule, factors: Mapping[str, torch.Tensor], out: int, back: bool
) -> Callable[[torch.Tensor, int, int], torch.Tensor]:
    scale, shift = (_path(factors, path, out) for path in "AB")

    def change(rows: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        factor, added = 1 + scale.rows(begin, end), shift.rows(begin, end)
        return _divided(rows - added, factor, module) if back else rows * factor + added

    return change


def _divided(values: torch.Tensor, factor: torch.Tensor, module: AdapterModule) -> torch.Tensor:
    if not factor.all():
        raise NotMerged(
            "GLoRA multiplied by zero here: nothing is left to divide",
            where=module.target,
            then="go back to the base itself",
        )
    return values / factor
