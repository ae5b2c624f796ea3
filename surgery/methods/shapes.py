"""How methods other than LoRA see a weight: as the matrix (out, in), whichever way the base stores it.

A convolution's kernel lies among its inputs. Knows no method.
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
PLAIN = (LayerKind.LINEAR, LayerKind.CONV)  # stored (out, in), with a kernel behind or without


def matrix_shape(module: AdapterModule, weight: TensorSpec) -> tuple[int, int]:
    """(out, in) of a stored weight; (out, 1) of a vector."""
    shape = weight.shape if len(weight.shape) > 1 else (*weight.shape, 1)
    out, into = shape[0], weight.size // max(1, shape[0])
    return (into, out) if module.kind in TRANSPOSED and len(weight.shape) == 2 else (out, into)


def check_matrix(
    module: AdapterModule, weight: TensorSpec, out: int, into: int, kinds: tuple[LayerKind, ...] = tuple(LayerKind)
) -> None:
    """Refuses a weight that is no plain float, not of these sizes, or not of these kinds.

    Raises:
        NotMergeable: a quantised weight, or a kind of layer that the method does not know.
        ShapeMismatch: factors that do not fit.
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
    """The shape of a factor of so many dimensions. Raises ShapeMismatch for one of another number."""
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
    """Refuses a factor of another shape. Raises ShapeMismatch."""
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
    """The weight with every row of its matrix (out, in) changed, or every column; rounded once.

    Args:
        module: tells how the weight is stored.
        weight: as stored; a vector is one column.
        dtype: of the result.
        change: takes rows begin to end, (end - begin, in) float64; of columns (end - begin, out).
        columns: whether these are the matrix's columns.
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
