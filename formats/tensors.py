"""Converts between stored bytes and torch tensors. This is the only module that maps our dtypes to torch's."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from formats.errors import UnsupportedDType
from formats.spec import DType, TensorSpec

if TYPE_CHECKING:
    import torch

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@cache
def _torch_dtypes() -> dict[DType, torch.dtype]:
    import torch

    return {
        DType.BOOL: torch.bool,
        DType.U8: torch.uint8,
        DType.I8: torch.int8,
        DType.F8_E5M2: torch.float8_e5m2,
        DType.F8_E4M3: torch.float8_e4m3fn,
        DType.I16: torch.int16,
        DType.U16: torch.uint16,
        DType.F16: torch.float16,
        DType.BF16: torch.bfloat16,
        DType.I32: torch.int32,
        DType.U32: torch.uint32,
        DType.F32: torch.float32,
        DType.F64: torch.float64,
        DType.I64: torch.int64,
        DType.U64: torch.uint64,
    }


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype that corresponds to one of ours."""
    return _torch_dtypes()[dtype]


def dtype_of(tensor: torch.Tensor) -> DType:
    """The dtype of a torch tensor as one of ours. Raises UnsupportedDType if safetensors does not have it."""
    for ours, theirs in _torch_dtypes().items():
        if theirs == tensor.dtype:
            return ours
    raise UnsupportedDType(
        "safetensors cannot hold this dtype", found=tensor.dtype, then="convert the tensor to a dtype that it has"
    )


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """The spec under which a tensor would be stored."""
    return TensorSpec(name, dtype_of(tensor), tuple(tensor.shape))


def tensor_from_bytes(payload: Bytes, spec: TensorSpec) -> torch.Tensor:
    """A tensor that shares the payload's memory, in the spec's dtype and shape."""
    import torch

    if not payload.nbytes:  # torch cannot view an empty tensor as another dtype
        return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
    return torch.from_numpy(payload).view(torch_dtype(spec.dtype)).view(spec.shape)


def bytes_from_tensor(tensor: torch.Tensor) -> Bytes:
    """The tensor's payload as stored: contiguous, little-endian, flat; shares memory where it can."""
    import torch

    whole = tensor.detach().cpu().contiguous()
    flat = whole.as_strided((whole.numel(),), (1,))  # a lone element counts as contiguous whatever its stride
    array: Bytes = flat.view(torch.uint8).numpy()
    return array
