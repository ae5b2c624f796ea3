"""Checks on values that more than one operation makes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from surgery.errors import NotFinite

if TYPE_CHECKING:
    import torch


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether there is no NaN or Inf in a floating-point tensor; far cheaper than looking at every element's class."""
    import torch

    if not tensor.numel():
        return True
    if tensor.element_size() == 1:  # torch orders no float8
        tensor = tensor.to(torch.float32)
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(tensor))


def check_finite(tensor: torch.Tensor, what: str, then: str = "repair or retrain that model") -> None:
    """Raises NotFinite if there is a NaN or Inf in `what`."""
    import torch

    if not is_finite(tensor):
        bad = tensor.numel() - int(torch.isfinite(tensor.to(torch.float32)).sum())
        raise NotFinite(f"NaN or Inf in {what}", found=f"{bad} of {tensor.numel()} elements", then=then)
