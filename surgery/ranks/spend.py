"""Turns a budget in bytes into a rank for every weight; measures only as many singular values as that needs.

Knows no tensor and no file: the caller measures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol

from formats.layout import layout
from formats.spec import TensorSpec
from surgery.ranks.budget import Claim, allocate
from surgery.ranks.choice import RankChoice
from surgery.ranks.spectra import Spectrum

_LEAST_KNOWN = 16  # values to measure of every weight at first


class Measuring(Protocol):
    """Measures spectra."""

    def __call__(self, names: Collection[str] | None, known: int, /) -> Iterable[Spectrum]:
        """The spectra of these weights, to so many values or all; the first time, without names, of all weights."""


def spend(
    ranks: RankChoice,
    names: Iterable[str],
    measure: Measuring,
    *,
    per_rank: int,
    fixed: Callable[[Collection[str]], int],
    paying: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """The ranks with which an adapter within the budget captures the most energy.

    The spectra are measured to twice the uniform rank that the budget allows, and further where a weight takes all that
    is known of it: it might take more.

    Args:
        ranks: the choice, which has a budget.
        names: tensors that an override may name.
        measure: gives the weights' spectra.
        per_rank: bytes of one rank of all weights.
        fixed: bytes of the file that no rank changes, given the names of the measured weights.
        paying: the largest rank at which a weight's factors are worth having, where there is one.

    Raises:
        SurgeryError: a budget smaller than the least ranks.
    """
    budget, overrides = ranks.budget, ranks.overridden(names)
    if budget is None:
        raise ValueError("no budget to spend")

    def claim(spectrum: Spectrum) -> Claim:
        name, size = spectrum.name, spectrum.size
        rank = overrides.get(name)
        least, most = (budget.minimum, budget.maximum) if rank is None else (rank, rank)
        size = min(size, (paying or {}).get(name, size))
        return Claim(name, spectrum.energies, size, spectrum.bytes_per_rank, least, most)

    known, wanted = max(_LEAST_KNOWN, 2 * budget.nbytes // max(1, per_rank)), None
    spectra: dict[str, Spectrum] = {}
    while True:
        spectra |= {spectrum.name: spectrum for spectrum in measure(wanted, known)}
        allocation = allocate([claim(each) for each in spectra.values()], budget.nbytes, fixed(spectra.keys()))
        if not allocation.saturated:
            return allocation.ranks
        known, wanted = 2 * known, allocation.saturated


def header_bytes(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> int:
    """Bytes of an adapter's header, about: its metadata but for the tool, which writes itself there.

    Args:
        specs: of its tensors; those of factors as large as they can become.
        metadata: more of it.
    """
    return len(layout(specs, {"format": "pt", **metadata, "surgery": 40 * "x"}).header)
