"""FourierFT (Gao et al., arXiv 2405.03003, equations 3 and 4): ΔW = scaling · Re F⁻¹(S), S sparse.

The real part of the inverse transform of n numbers is a sum of n cosines of a row's and a column's angle added: that of
cosines times cosines less that of sines times sines. Both are known from a quarter of their elements, and numbers of
one row, or of its mirror image, share a term. Where in S the numbers stand is drawn by torch's CPU generator from a
seed in the config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from formats.adapter import AdapterModule
from formats.spec import TensorSpec
from surgery.errors import NotMergeable
from surgery.exact.fixed_order import fine_product
from surgery.exact.rounding import Delta, RowsOf
from surgery.methods.base import AdditiveMethod
from surgery.methods.shapes import TRANSPOSED, check_matrix, factor_shape, matrix_shape

if TYPE_CHECKING:
    import torch


_Side = TypeVar("_Side")


class FourierFt(AdditiveMethod):
    """ΔW[m, n] = scaling / (out · in) · Σ sⱼ cos(2π (uⱼ m / out + vⱼ n / in)).

    Factors: fourierft_spectrum (n,). Settings: scaling, random_loc_seed, out, in.
    """

    name = "fourierft"
    title = "FourierFT"
    paper = "FourierFT, arXiv 2405.03003"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable for a weight not stored as a plain float, or with fewer places than numbers."""
        check_matrix(module, weight, *matrix_shape(module, weight))
        check_places(module, weight, "fourierft_spectrum")

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """The draw of all places, or the two quarters with the factors that they are made of."""
        high, wide = _as_stored(module, *matrix_shape(module, weight))
        tall, broad = high // 2 + 1, wide // 2 + 1
        terms = min(module.factors["fourierft_spectrum"].spec.size, tall)
        return 8 * max(weight.size, 4 * tall * broad + 5 * terms * (tall + broad))

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW, its rows put together from the two quarters."""
        import torch

        spectrum = factors["fourierft_spectrum"].double()
        out, into = int(module.settings["out"]), int(module.settings["in"])
        scale = weight * float(module.settings["scaling"]) / (out * into)
        rows, columns = _as_stored(module, *drawn_places(module, spectrum.shape[0]))
        high, wide = _as_stored(module, out, into)
        mirrored = (rows > high - rows) != (columns > wide - columns)  # of one sine the sign is the other
        rows, columns = torch.minimum(rows, high - rows), torch.minimum(columns, wide - columns)
        even = _quarter(torch.cos, spectrum, rows, columns, (high, wide), scale)
        odd = _quarter(torch.sin, spectrum.where(~mirrored, -spectrum), rows, columns, (high, wide), scale)

        def unfolded(begin: int, end: int) -> torch.Tensor:
            at = torch.arange(begin, end)
            near = torch.minimum(at, high - at)
            cosines = even[near]  # (rows, wide // 2 + 1)
            sines = odd[near] * torch.where(at > high - at, -1.0, 1.0)[:, None]
            right = (cosines + sines)[:, 1 : wide - wide // 2].flip(1)
            return torch.cat([cosines - sines, right], 1)

        return RowsOf(wide, unfolded)


def _as_stored(module: AdapterModule, down: _Side, along: _Side) -> tuple[_Side, _Side]:
    """What belongs to outputs and to inputs, as what belongs to the stored weight's rows and columns."""
    return (along, down) if module.kind in TRANSPOSED else (down, along)


def _quarter(
    wave: Callable[[torch.Tensor], torch.Tensor],
    numbers: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    shape: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    """scale · Σ sⱼ wave(2π uⱼ m / high) wave(2π vⱼ n / wide) for the first half of all m and n.

    Args:
        wave: the cosine or the sine.
        numbers, rows, columns: (n,) s, u and v.
        shape: high and wide.

    Returns:
        (high // 2 + 1, wide // 2 + 1) float64.
    """
    import torch

    # whole turns are taken off in integers, where nothing rounds
    down, along = (wave(torch.arange(size).double() * (2 * math.pi / size)) for size in shape)
    m, n = (torch.arange(size // 2 + 1) for size in shape)
    terms, owners = torch.unique(rows, return_inverse=True)  # (terms,), (n,)
    left = down[terms * m[:, None] % shape[0]]  # (high // 2 + 1, terms)
    right = left.new_zeros(len(terms), len(n))
    order = owners.argsort(stable=True)
    places = torch.arange(len(order)) - torch.searchsorted(owners[order], owners[order])  # among those of its term
    for place in range(int(places.max()) + 1):  # one of each term at a time, so that sums have an order
        each = order[places == place]
        right[owners[each]] += numbers[each, None] * along[columns[each, None] * n % shape[1]]
    return fine_product(left, right, scale).rows(0, len(m))


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
