"""Checks on values that more than one operation makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.errors import NotFinite

if TYPE_CHECKING:
    import torch


def check_finite(tensor: torch.Tensor, what: str, then: str = "repair or retrain that model") -> None:
    """Raises NotFinite if there is a NaN or Inf in `what`."""
    import torch

    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise NotFinite(f"NaN or Inf in {what}", found=f"{bad} of {tensor.numel()} elements", then=then)
