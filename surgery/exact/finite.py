"""Checks for NaN and Inf, for all operations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from surgery.errors import NotFinite

if TYPE_CHECKING:
    import torch


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a floating-point tensor has no NaN or Inf. Far cheaper than torch.isfinite on every element."""
    import torch

    if not tensor.numel():
        return True
    if tensor.element_size() == 1:  # torch cannot compare float8 values
        tensor = tensor.to(torch.float32)
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(tensor))


def check_finite(tensor: torch.Tensor, what: str, then: str = "repair or retrain that model") -> None:
    """Raises NotFinite if the tensor, described by `what`, has a NaN or Inf."""
    import torch

    if not is_finite(tensor):
        bad = tensor.numel() - int(torch.isfinite(tensor.to(torch.float32)).sum())
        raise NotFinite(f"NaN or Inf in {what}", found=f"{bad} of {tensor.numel()} elements", then=then)
