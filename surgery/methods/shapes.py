"""The view that methods other than LoRA have of a weight: a matrix (out, in), whatever the base's layout.

A convolution's kernel is part of its inputs. This module knows no method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import ShapeMismatch
from formats.layers import LayerKind
from formats.spec import DType, TensorSpec, shape_text
from formats.tensors import torch_dtype
from surgery.errors import NotMergeable
from surgery.exact.rounding import change_rows
from surgery.methods.lora import check_weight

if TYPE_CHECKING:
    import torch

TRANSPOSED = (LayerKind.TRANSPOSED, LayerKind.EMBEDDING)
PLAIN = (LayerKind.LINEAR, LayerKind.CONV)  # stored (out, in), with or without a kernel after it


def matrix_shape(module: AdapterModule, weight: TensorSpec) -> tuple[int, int]:
    """(out, in) of a stored weight; (out, 1) for a vector."""
    shape = weight.shape if len(weight.shape) > 1 else (*weight.shape, 1)
    out, into = shape[0], weight.size // max(1, shape[0])
    return (into, out) if module.kind in TRANSPOSED and len(weight.shape) == 2 else (out, into)


def check_matrix(
    module: AdapterModule, weight: TensorSpec, out: int, into: int, kinds: tuple[LayerKind, ...] = tuple(LayerKind)
) -> None:
    """Refuses a weight that is not stored as plain floats, or has another size or kind.

    Raises:
        NotMergeable: the weight is quantised, or the method is not defined for this kind of layer.
        ShapeMismatch: the factors do not fit the weight.
    """
    found = (into, out) if module.kind in TRANSPOSED and len(weight.shape) == 2 else (out, into)
    fits = matrix_shape(module, weight) == (out, into)
    check_weight(weight, weight.shape if fits else found)
    if module.kind not in kinds:
        raise NotMergeable(
            f"{module.method} is not defined for this kind of layer",
            where=weight.name,
            expected=" or ".join(kinds),
            found=module.kind,
        )


def factor_shape(module: AdapterModule, role: str, dims: int) -> tuple[int, ...]:
    """The shape of a factor, which must have `dims` dimensions. Raises ShapeMismatch if it does not."""
    found = module.factors[role].spec
    if len(found.shape) != dims or not found.size:
        raise ShapeMismatch(
            "a factor is empty or has another number of dimensions",
            where=found.name,
            expected=f"{dims} dimensions",
            found=shape_text(found.shape),
        )
    return found.shape


def check_factor(module: AdapterModule, role: str, *shape: int) -> None:
    """Raises ShapeMismatch if a factor has another shape."""
    found = module.factors[role].spec
    if found.shape != shape:
        raise ShapeMismatch(
            "a factor does not fit the weight or the other factors",
            where=found.name,
            expected=shape_text(shape),
            found=shape_text(found.shape),
        )


def change_outputs(
    module: AdapterModule,
    weight: torch.Tensor,
    dtype: DType,
    change: Callable[[torch.Tensor, int, int], torch.Tensor],
    *,
    columns: bool = False,
) -> torch.Tensor:
    """Changes every row of a weight's matrix (out, in), or every column, and rounds once.

    Args:
        module: the adapted module, which gives the weight's layout.
        weight: the weight as stored; a vector is one column.
        dtype: dtype of the result.
        change: maps rows begin to end, (end - begin, in) float64; for columns (end - begin, out).
        columns: whether to change columns instead of rows.
    """
    import torch

    result = torch.empty(weight.shape, dtype=torch_dtype(dtype))
    matrix, changed = (
        tensor.view(tensor.shape[0], -1) if tensor.dim() > 1 else tensor.view(-1, 1) for tensor in (weight, result)
    )
    if columns is not (module.kind in TRANSPOSED and weight.dim() == 2):
        matrix, changed = matrix.mT, changed.mT
    change_rows(matrix, changed, change, dtype)
    return result
