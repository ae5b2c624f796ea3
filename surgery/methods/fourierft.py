"""FourierFT (Gao et al., arXiv 2405.03003, equations 3 and 4): ΔW = scaling · Re F⁻¹(S), S sparse.

The real part of the inverse transform of n numbers is a sum of n cosines of a row's and a column's angle added, so a
product of 2 n terms. Where in S the numbers stand is drawn by torch's CPU generator from a seed in the config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.spec import TensorSpec
from surgery.errors import NotMergeable
from surgery.fixed_order import fine_product
from surgery.methods.lora import outward
from surgery.methods.shapes import check_matrix, factor_shape, matrix_shape
from surgery.rounding import Delta

if TYPE_CHECKING:
    import torch


class FourierFt:
    """ΔW[m, n] = scaling / (out · in) · Σ sⱼ cos(2π (uⱼ m / out + vⱼ n / in)).

    Factors: fourierft_spectrum (n,). Settings: scaling, random_loc_seed, out, in.
    """

    name = "fourierft"
    paper = "FourierFT, arXiv 2405.03003"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable for a weight not stored as a plain float, or with fewer places than numbers."""
        check_matrix(module, weight, *matrix_shape(module, weight))
        check_places(module, weight, "fourierft_spectrum")

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW as a product of cosines and sines."""
        import torch

        spectrum = factors["fourierft_spectrum"].double()
        out, into = int(module.settings["out"]), int(module.settings["in"])
        rows, columns = drawn_places(module, spectrum.shape[0])
        # whole turns are taken off in integers, where nothing rounds
        down = (torch.arange(out)[:, None] * rows % out).double() * (2 * math.pi / out)  # (out, n)
        along = (columns[:, None] * torch.arange(into) % into).double() * (2 * math.pi / into)  # (n, in)
        left = torch.cat([down.cos() * spectrum, -down.sin() * spectrum], 1)  # (out, 2 n)
        right = torch.cat([along.cos(), along.sin()])  # (2 n, in)
        scale = weight * float(module.settings["scaling"]) / (out * into)
        return fine_product(*outward(module.kind, right, left), scale)


def check_places(module: AdapterModule, weight: TensorSpec, role: str) -> None:
    """Refuses more numbers than the weight has elements."""
    (size,) = factor_shape(module, role, 1)
    if size > weight.size:
        raise NotMergeable("more numbers than places", where=weight.name, expected=weight.size, found=size)


def drawn_places(module: AdapterModule, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows and columns of (out, in) that the numbers stand at, drawn as peft draws them.  # (count,) each"""
    import torch

    out, into = int(module.settings["out"]), int(module.settings["in"])
    generator = torch.Generator(device="cpu").manual_seed(int(module.settings["random_loc_seed"]))
    places = torch.randperm(out * into, generator=generator)[:count]
    return places // into, places % into
