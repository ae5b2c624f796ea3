"""The leading singular triplets of a large matrix, from a block Krylov space with as many blocks as needed.

Block Krylov iteration: Musco and Musco, arXiv 1504.05477. The spectra of fine-tuning deltas decay slowly; on them, the
usual randomised SVD with a few power iterations is off by several per cent. The result is deterministic, because the
random start is seeded. This module knows tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from surgery.linalg.difference import DeltaMatrix

if TYPE_CHECKING:
    import torch

TOLERANCE = 3e-4  # relative excess of the residual: blocks are added until more would gain less, by estimate
FIRST_GUESS = 16  # triplets to begin with if a rule decides the rank
MAX_BLOCKS = 12  # give up beyond; independent normal elements, the slowest spectrum we know, need 6
USUAL_BLOCKS = 6  # blocks for which memory is budgeted; fine-tuning deltas need 3 or 4
DENSE_SHARE = 0.8  # share of the smaller side beyond which a Krylov space has no advantage
_FEWEST_BLOCKS = 3  # they show two gains, from which the next is estimated
_TILE = 32  # columns that matrix units multiply at the price of one
_OVERSAMPLING = 8  # least number of columns beyond the rank, so that the last wanted direction converges too
_NARROW_SHARE = 0.1  # left-out share of ‖ΔW‖² below which bfloat16's rounding would show in the residual
_CANCELLED = 1e-6  # left-out share of ‖ΔW‖² below which it cannot be computed by subtraction
_FLOOR = 1e-14  # share of ‖ΔW‖² that float32 cannot resolve
_NOISE = 10  # units of rounding of a block; what projection leaves below this is rounding error
_NEW = 0.1  # share of a direction's square that must be new to the space

ChoosesRank = Callable[[NDArray[np.float64], float, int], int | None]
"""What a rule of `surgery.ranks` is to a decomposition: (the k leading singular values, descending; ‖ΔW‖²; the smaller
side) → the rank, 1 ≤ rank ≤ k, or None where k values are not enough. It always decides where k is the smaller side."""


@dataclass(frozen=True)
class Triplets:
    """Converged leading singular triplets.

    Attributes:
        left: (rows, count) orthonormal columns.
        values: (count,) float64 on the CPU, descending, unscaled.
        right: (columns, count) orthonormal columns.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


def width_of(rank: int) -> int:
    """Columns of a block for this many triplets."""
    return -(-(rank + _OVERSAMPLING) // _TILE) * _TILE


def is_dense(small: int, rank: int) -> bool:
    """Whether a Krylov space for this many triplets would be nearly the whole space."""
    return (1 + _FEWEST_BLOCKS) * width_of(rank) >= DENSE_SHARE * small


def leading(delta: DeltaMatrix, rank: int | ChoosesRank, seed: int) -> Triplets | None:
    """The `rank` leading triplets, or more where a rule looked at more; None where a dense decomposition is cheaper.

    The space grows until further blocks would gain a negligible amount (`_remaining`). Products are taken in bfloat16
    where that is much faster. A direction that is rounded before it is multiplied is as good as any other, so only the
    rounding of ΔW and of the images is lost, about 1e-5 of what is captured. If so little is left out that this would
    show, the iteration continues in float32 from the directions found; and then in float64, for the few deltas whose
    distance to a low rank is within float32's rounding.
    """
    import torch

    small = min(delta.shape)
    count = rank if isinstance(rank, int) else min(FIRST_GUESS, small)
    if is_dense(small, count):
        return None
    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = torch.randn(small, width_of(count), generator=generator).to(delta.device)
    space = _Space(delta, torch.float32 if delta.is_precise else None)
    space.add(space.inward(space.outward(start)))
    while True:
        if not space.converge(count):
            return None
        if space.needs_precision(count):
            start = space.directions(width_of(count))
            space = _Space(delta, torch.float64 if space.precise else torch.float32)
            space.add(start)
        elif isinstance(rank, int) or rank(space.singular_values(count), delta.total, small) is not None:
            return space.triplets(count) if space.precise else _polished(delta, space, count)
        elif is_dense(small, 2 * count):
            return None
        else:
            count *= 2


def _polished(delta: DeltaMatrix, space: _Space, count: int) -> Triplets:
    """The triplets in the space of the leading directions alone, from images that are not rounded."""
    last = _Space(delta, None)
    last.add(space.directions(count), near=space.images(count))
    return last.triplets(count)


class _Space:
    """A block Krylov space on the smaller side of ΔW, and ΔW restricted to it.

    A basis vector is kept as it was multiplied, rounded to the products' dtype, so its image is exact. `_whiten` makes
    the basis orthonormal in exact arithmetic. For this reason, and not because float32 kept vectors orthogonal, no
    energy is counted twice, whatever the rank of ΔW.
    """

    def __init__(self, delta: DeltaMatrix, dtype: torch.dtype | None) -> None:
        """`dtype` is that of the products, float32 or float64; None for the fast one."""
        import torch

        self.precise = dtype is not None
        self._dtype = dtype or torch.float32
        self._delta = delta
        self._tall = delta.shape[0] >= delta.shape[1]  # whether the columns are the smaller side
        small, large = sorted(delta.shape)
        self._basis = torch.empty(small, 0, dtype=self._dtype, device=delta.device)
        self._images = torch.empty(large, 0, dtype=self._dtype, device=delta.device)
        self._width = 0  # of the last block
        self._whiten = torch.zeros(0, 0, dtype=torch.float64)  # basis @ whiten has orthonormal columns
        self._core = torch.zeros(0, 0, dtype=torch.float64)  # imagesᵀ images
        self._history: list[torch.Tensor] = []  # σ² of the space, descending, after each block
        self._vectors = self._core  # of whitenᵀ core whiten, in the order of σ²
        self._exhausted = False  # the next block would hold only rounding errors

    def outward(self, thin: torch.Tensor, near: torch.Tensor | None = None) -> torch.Tensor:
        """(small, width) → (large, width)."""
        return self._delta.product(thin, adjoint=not self._tall, precise=self.precise, near=near)

    def inward(self, thin: torch.Tensor) -> torch.Tensor:
        """(large, width) → (small, width). The QR keeps small directions visible and does not change the span."""
        import torch

        if self.precise:
            thin = torch.linalg.qr(thin).Q
        return self._delta.product(thin, adjoint=self._tall, precise=self.precise)

    def converge(self, count: int) -> bool:
        """Adds blocks until the `count` leading values are accurate or more precision is needed; False if that takes
        too many blocks."""
        small = min(self._delta.shape)
        while not (self._exhausted or self.needs_precision(count) or self._remaining(count) <= TOLERANCE):
            if len(self._core) + self._width > min(DENSE_SHARE * small, MAX_BLOCKS * width_of(count)):
                return False
            self.add(self.inward(self._images[:, -self._width :]))
        return True

    def needs_precision(self, count: int) -> bool:
        """Whether so little is left out that the rounding of the products would show."""
        import torch

        if self._dtype is torch.float64:
            return False
        return self.is_faint(count) if self.precise else self._left_out(count) < _NARROW_SHARE * self._total

    def is_faint(self, count: int) -> bool:
        """Whether what is left out is as small as float32's rounding of what is captured, and of ‖ΔW‖²."""
        return self._left_out(count) < _CANCELLED * self._total

    @property
    def _total(self) -> float:
        return self._delta.total / self._delta.scale**2

    def _left_out(self, count: int) -> float:
        return self._total - float(self._history[-1][:count].sum())

    def _remaining(self, count: int) -> float:
        """An estimate of (residual now) / (residual of the optimum) − 1, from how the values have risen so far.

        Each σᵢ² rises from block to block towards its limit; in the end each rise is at most ρᵢ times the last one.
        With the last rises dᵢ and the rises before them eᵢ, ρᵢ = dᵢ/eᵢ, and the remaining rise is the geometric series
        Σ dᵢ ρᵢ/(1 − ρᵢ). It is computed for each value, because large values converge at once and would hide the slow
        ones. The residual's square is ‖ΔW‖² − Σσ², so the residual's relative excess is half of the square's. On
        spectra from flat to exponential the estimate was never below 0.7 times the true excess, and on fine-tuning
        deltas it was 2 to 5 times the true excess.
        """
        if len(self._history) < _FEWEST_BLOCKS or len(self._history[-3]) < count:
            return float("inf")
        before, last, now = (values[:count] for values in self._history[-3:])
        earlier, rise = (last - before).clamp_min(0), (now - last).clamp_min(0)
        ratio = (rise / earlier.clamp_min(1e-300)).clamp_max(0.9)
        to_come = float((rise * ratio / (1 - ratio)).sum())
        left_out = self._left_out(count)
        if self.is_faint(count):  # use what the space holds beyond `count`: it is less, but needs no subtraction
            left_out = float(self._history[-1][count:].sum())
        return to_come / (2 * max(left_out, _FLOOR * self._total))

    def add(self, block: torch.Tensor, near: torch.Tensor | None = None) -> None:
        """Adds the part of a (small, width) block that is new, and solves the problem in the larger space.

        `near` is an approximation of the block's image, if one is known.
        """
        import torch

        block = block.to(self._dtype)
        if len(self._core):
            whiten, size = self._whiten.to(block), float(torch.linalg.vector_norm(block))
            block = block - self._basis @ (whiten @ (whiten.mT @ (self._basis.mT @ block)))
            values, vectors = torch.linalg.eigh(self._gram(block, block))
            kept = values > (_NOISE * torch.finfo(self._dtype).eps * size) ** 2
            block = block @ (vectors[:, kept] * values[kept].rsqrt()).to(block)
            self._exhausted = block.shape[1] == 0
            if self._exhausted:
                return
        elif near is None:
            block = torch.linalg.qr(block).Q
        if not self.precise:
            block = block.to(torch.bfloat16).to(torch.float32)
        old, new = len(self._core), block.shape[1]
        image = self.outward(block, near)
        self._basis = torch.cat([self._basis, block], dim=1)
        self._images = torch.cat([self._images, image], dim=1)
        self._width = new
        both = self._gram(self._basis, block)  # (old + new, new)
        cross = self._whiten.mT @ both[:old]  # the block's components in the space
        values, vectors = torch.linalg.eigh(both[old:] - cross.mT @ cross)
        kept = values > _NEW
        own = vectors[:, kept] * values[kept].rsqrt()
        whiten = own.new_zeros(old + new, self._whiten.shape[1] + own.shape[1])
        whiten[:old] = torch.cat([self._whiten, -self._whiten @ (cross @ own)], dim=1)
        whiten[old:, self._whiten.shape[1] :] = own
        self._whiten = whiten
        core = own.new_empty(old + new, old + new)
        core[:old, :old] = self._core
        core[:, old:] = self._gram(self._images, image)
        core[old:, :old] = core[:old, old:].mT
        self._core = core
        values, vectors = torch.linalg.eigh(whiten.mT @ core @ whiten)
        self._history.append(values.flip(0).clamp_min(0))
        self._vectors = vectors.flip(1)

    def singular_values(self, count: int) -> NDArray[np.float64]:
        """The leading values, as they are passed to a rule."""
        values: NDArray[np.float64] = self._history[-1][:count].sqrt().numpy() * self._delta.scale
        return values

    def directions(self, count: int) -> torch.Tensor:
        """The leading singular vectors on the smaller side, (small, count)."""
        return self._basis @ (self._whiten @ self._vectors[:, :count]).to(self._basis)

    def images(self, count: int) -> torch.Tensor:
        """The images of `directions`, (large, count): columns of length σ."""
        return self._images @ (self._whiten @ self._vectors[:, :count]).to(self._images)

    def triplets(self, count: int) -> Triplets:
        """The leading triplets: V from the basis, U σ = ΔW V from the images."""
        import torch

        inner, outer = self.directions(count), self.images(count)
        values = torch.linalg.vector_norm(outer, dim=0).to("cpu", torch.float64)
        outer = outer / values.clamp_min(1e-12 * float(values[0])).to(outer)
        left, right = (outer, inner) if self._tall else (inner, outer)
        return Triplets(left, values * self._delta.scale, right)

    def _gram(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """leftᵀ right, a small float64 matrix on the CPU. The product is also taken in float64 where small values
        matter."""
        import torch

        if self.precise:
            left, right = left.to(torch.float64), right.to(torch.float64)
        return (left.mT @ right).to("cpu", torch.float64)
