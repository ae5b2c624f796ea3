"""What a tensor is before anyone reads it: a name, a dtype, a shape; and where it can be read from.

Pure data. Imports no torch, opens no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any


class DType(Enum):
    """The safetensors dtypes we carry, in the order (increasing alignment) in which its writer sorts them."""

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
        """Whether the dtype is a floating-point one."""
        return self.label.startswith(("F", "BF"))

    @property
    def is_weight(self) -> bool:
        """Whether arithmetic on it is ours to do: F16, BF16, F32 or F64."""
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
    """What it takes to open a checkpoint again, in this process or another."""

    path: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a payload lies as it is: a file, and the first byte in it."""

    path: Path
    offset: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor of one checkpoint."""

    checkpoint: CheckpointRef
    spec: TensorSpec

    @property
    def name(self) -> str:
        """The tensor's name in that checkpoint."""
        return self.spec.name


def shape_text(shape: Any) -> str:
    """A shape as people write it: `384 × 1536`, `scalar`."""
    return " × ".join(str(n) for n in shape) if len(shape) else "scalar"
