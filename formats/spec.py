"""Describes tensors without reading them: name, dtype, shape, and where the data can be read from.

This module holds plain data. It imports no torch and opens no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any


class DType(Enum):
    """The safetensors dtypes that we support, in the order (increasing alignment) of the safetensors writer."""

    BOOL = ("BOOL", 1)
    U8 = ("U8", 1)
    I8 = ("I8", 1)
    F8_E5M2 = ("F8_E5M2", 1)
    F8_E4M3 = ("F8_E4M3", 1)
    I16 = ("I16", 2)
    U16 = ("U16", 2)
    F16 = ("F16", 2)
    BF16 = ("BF16", 2)
    I32 = ("I32", 4)
    U32 = ("U32", 4)
    F32 = ("F32", 4)
    F64 = ("F64", 8)
    I64 = ("I64", 8)
    U64 = ("U64", 8)

    def __init__(self, label: str, itemsize: int) -> None:
        self.label = label
        self.itemsize = itemsize

    @property
    def is_float(self) -> bool:
        """Whether this is a floating-point dtype."""
        return self.label.startswith(("F", "BF"))

    @property
    def is_weight(self) -> bool:
        """Whether we do arithmetic in this dtype: F16, BF16, F32 or F64."""
        return self in (DType.F16, DType.BF16, DType.F32, DType.F64)

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, dtype and shape (outermost dimension first, as stored)."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Payload size in bytes."""
        return self.size * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """A reference from which a checkpoint can be opened again, in this process or another."""

    path: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a contiguous payload is stored: the file, and the offset of the first byte."""

    path: Path
    offset: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A reference to one tensor of one checkpoint."""

    checkpoint: CheckpointRef
    spec: TensorSpec

    @property
    def name(self) -> str:
        """The tensor's name in that checkpoint."""
        return self.spec.name


def shape_text(shape: Any) -> str:
    """A shape as shown to users: `384 × 1536`, `scalar`."""
    return " × ".join(str(n) for n in shape) if len(shape) else "scalar"
