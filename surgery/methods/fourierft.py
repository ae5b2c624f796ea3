"""FourierFT (Gao et al., arXiv 2405.03003, equations 3 and 4): ΔW = scaling · Re F⁻¹(S), with a sparse S.

The real part of the inverse transform of n coefficients is a sum of n cosines of (row angle + column angle): a sum of
cosine products minus a sum of sine products. By symmetry both sums follow from a quarter of their elements, and
coefficients of one row, or of its mirror image, share a term. The positions of the coefficients in S are drawn by
torch's CPU generator from a seed in the config.
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
        """Raises NotMergeable if the weight is not stored as plain floats, or has fewer elements than coefficients."""
        check_matrix(module, weight, *matrix_shape(module, weight))
        check_places(module, weight, "fourierft_spectrum")

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """Bytes for drawing all positions, or for the two quarters and their factors, whichever is more."""
        high, wide = _as_stored(module, *matrix_shape(module, weight))
        tall, broad = high // 2 + 1, wide // 2 + 1
        terms = min(module.factors["fourierft_spectrum"].spec.size, tall)
        return 8 * max(weight.size, 4 * tall * broad + 5 * terms * (tall + broad))

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW, whose rows are assembled from the two quarters."""
        import torch

        spectrum = factors["fourierft_spectrum"].double()
        out, into = int(module.settings["out"]), int(module.settings["in"])
        scale = weight * float(module.settings["scaling"]) / (out * into)
        rows, columns = _as_stored(module, *drawn_places(module, spectrum.shape[0]))
        high, wide = _as_stored(module, out, into)
        mirrored = (rows > high - rows) != (columns > wide - columns)  # mirroring one angle flips the sine's sign
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
    """Orders a pair of values for (outputs, inputs) as (rows, columns) of the stored weight."""
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

    # full turns are removed in integers, where nothing is rounded
    down, along = (wave(torch.arange(size).double() * (2 * math.pi / size)) for size in shape)
    m, n = (torch.arange(size // 2 + 1) for size in shape)
    terms, owners = torch.unique(rows, return_inverse=True)  # (terms,), (n,)
    left = down[terms * m[:, None] % shape[0]]  # (high // 2 + 1, terms)
    right = left.new_zeros(len(terms), len(n))
    order = owners.argsort(stable=True)
    places = torch.arange(len(order)) - torch.searchsorted(owners[order], owners[order])  # among those of its term
    for place in range(int(places.max()) + 1):  # one coefficient of each term at a time, so that the order is fixed
        each = order[places == place]
        right[owners[each]] += numbers[each, None] * along[columns[each, None] * n % shape[1]]
    return fine_product(left, right, scale).rows(0, len(m))


def check_places(module: AdapterModule, weight: TensorSpec, role: str) -> None:
    """Raises NotMergeable if there are more coefficients than the weight has elements."""
    (size,) = factor_shape(module, role, 1)
    if size > weight.size:
        raise NotMergeable("more numbers than places", where=weight.name, expected=weight.size, found=size)


def drawn_places(module: AdapterModule, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows and columns of the coefficients in (out, in), drawn as peft draws them.  # (count,) each"""
    import torch

    out, into = int(module.settings["out"]), int(module.settings["in"])
    generator = torch.Generator(device="cpu").manual_seed(int(module.settings["random_loc_seed"]))
    places = torch.randperm(out * into, generator=generator)[:count]
    return places // into, places % into
