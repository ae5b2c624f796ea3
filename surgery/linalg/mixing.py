"""Sums of low-rank deltas, each of which keeps only some of its elements: TIES, DARE, magnitude pruning.

An element of a delta is kept or dropped by its size or at random, so these methods need the deltas themselves and not
their factors. Deltas are formed by blocks of rows; only the result is held as a whole, and one delta while its
threshold is determined. Deltas are pruned, and signs elected, weight by weight. This module knows tensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    import torch

DENSE = ("ties", "dare", "magnitude-prune")
_BLOCK_ELEMENTS = 1 << 20  # of a block of rows; DARE's random numbers depend on this value

Product = tuple["torch.Tensor", "torch.Tensor", float]  # (rows, rank), (rank, columns), both float64; a weight


def check_density(density: float) -> None:
    """Raises SurgeryError if the share of elements to keep is not above 0 and at most 1."""
    if not 0 < density <= 1:
        raise SurgeryError(
            "the density is out of range",
            expected="above 0, at most 1",
            found=density,
            then="choose it with --density",
        )


def mixed(how: str, products: Sequence[Product], density: float, seeds: Sequence[int]) -> torch.Tensor:
    """The sum of the elements kept of each wᵢ BᵢAᵢ, (rows, columns) float32, on the factors' device.

    Args:
        how: "ties", "dare" or "magnitude-prune".
        products: Bᵢ, Aᵢ and the weight wᵢ.
        density: share of elements to keep of each product, above 0 and at most 1.
        seeds: seeds of DARE's random numbers, one per product.
    """
    import torch

    rows, columns = products[0][0].shape[0], products[0][1].shape[1]
    result = torch.empty(rows, columns, dtype=torch.float32, device=products[0][0].device)
    keep = _dropping(density, seeds) if how == "dare" else _trimming(products, density)
    add = elected_mean if how == "ties" else _sum
    for part in _blocks(rows, columns):
        kept = [keep(index, b[part] @ a) for index, (b, a, _) in enumerate(products)]
        result[part] = add(torch.stack([weight * block for block, (*_, weight) in zip(kept, products, strict=True)]))
    return result


def elected_mean(deltas: torch.Tensor) -> torch.Tensor:
    """TIES's second and third step (Yadav et al., arXiv 2306.01708, section 3.1), on trimmed and weighted deltas.

    The elected sign of an element is the sign of the sum over all deltas, which is the sign with the larger total mass.
    The result is the mean over the deltas with this sign, and zero if there are none.

    Args:
        deltas: (adapters, rows, columns).
    """
    import torch

    signs = torch.where(deltas.sum(dim=0) >= 0, 1.0, -1.0)  # (rows, columns)
    agreeing = deltas.sign() == signs
    return (deltas * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp_min(1)


def _sum(deltas: torch.Tensor) -> torch.Tensor:
    return deltas.sum(dim=0)


def _trimming(products: Sequence[Product], density: float) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Keeps the largest elements of each delta: TIES's first step. Elements as large as the smallest kept one stay."""
    thresholds = [_threshold(product, density) for product in products]

    def keep(index: int, block: torch.Tensor) -> torch.Tensor:
        return block * (block.float().abs() >= thresholds[index])

    return keep


def _dropping(density: float, seeds: Sequence[int]) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Drops elements at random and rescales the others (DARE, Yu et al., arXiv 2311.03099, equation 3)."""
    import torch

    generators = [torch.Generator(device="cpu").manual_seed(seed) for seed in seeds]

    def keep(index: int, block: torch.Tensor) -> torch.Tensor:
        chance = torch.rand(block.shape, generator=generators[index]).to(block.device)
        return block * (chance < density) / density

    return keep


def _threshold(product: Product, density: float) -> float:
    """The magnitude of the smallest element among the largest `density` share of elements, at least one."""
    import torch

    b, a, _ = product
    rows, columns = b.shape[0], a.shape[1]
    if density == 1:
        return 0.0
    sizes = torch.empty(rows, columns, dtype=torch.float32)
    for part in _blocks(rows, columns):
        sizes[part] = (b[part] @ a).float().abs()
    flat = sizes.flatten().numpy()
    last = flat.size - max(1, int(density * flat.size))
    flat.partition(last)
    return float(flat[last])


def _blocks(rows: int, columns: int) -> list[slice]:
    step = max(1, _BLOCK_ELEMENTS // max(1, columns))
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
