"""Measures the spectra of a pair's changes and which other tensors changed, for the choice of a rank.

Makes no factors and writes nothing. spectrum shows the result; extract spends a budget by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from formats.spec import DType
from surgery.linalg.truncated import leading_values, workspace
from surgery.operations.extract.ops import (
    ModuleReport,
    delta_of,
    has_changed,
    identical,
    in_full,
    matrices_of,
    spectrum_of,
)
from surgery.operations.extract.pairing import Matrix, Pairing
from surgery.operations.extract.plan import both, whole_step
from surgery.operations.extract.results import FactorFigures
from surgery.pipeline.plan import Fate, Outcome, Plan, Step
from surgery.ranks.spectra import Spectrum

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Measure:
    """Measures the change of a weight. Inputs: base and tuned of the weight, then of other tensors. No outputs."""

    matrix: Matrix
    rank: int
    dtype: DType
    seed: int = 0
    exact: bool = False

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """The figures hold the spectrum, if the weight changed, and the names of other changed tensors."""
        name = self.matrix.spec.name
        found = self._spectrum(inputs[0], inputs[1])
        fates = {name: Fate.IDENTICAL if found is None else Fate.LOW_RANK}
        for index, other in enumerate(self.matrix.beside):
            changed = has_changed(inputs[2 + 2 * index], inputs[3 + 2 * index], other)
            fates[other] = Fate.FULL if changed else Fate.IDENTICAL
        spectra = () if found is None else (found,)
        return Outcome((), fates, FactorFigures[ModuleReport](spectra=spectra, full=in_full(fates)))

    def unchanged(self) -> Outcome:
        """Nothing to measure."""
        return Outcome((), identical((self.matrix.spec.name, *self.matrix.beside)))

    def _spectrum(self, before: torch.Tensor, after: torch.Tensor) -> Spectrum | None:
        matrix = self.matrix
        pairs = zip(matrices_of(before, matrix), matrices_of(after, matrix), strict=True)
        deltas = [delta for pair in pairs if (delta := delta_of(*pair, matrix.spec.name)) is not None]
        if not deltas:
            return None
        spectra = [leading_values(delta, self.rank, self.seed, exact=self.exact) for delta in deltas]
        return spectrum_of(matrix, self.dtype, sum(delta.total for delta in deltas), spectra, limit=self.rank)


def plan_measure(
    pairing: Pairing, rank: int, *, dtype: DType | None = None, seed: int = 0, exact: bool = False
) -> Plan:
    """Measures every matrix of a pairing up to a rank, and compares the rest."""
    steps = []
    seen: set[str] = set()
    for matrix in pairing.matrices:
        if seen.intersection(matrix.beside):  # parameters of one module share its other tensors
            matrix = matrix.alone()
        seen.update(matrix.beside)
        out, into = matrix.sides
        known = min(rank, out, into)
        op = Measure(matrix, known, dtype or matrix.spec.dtype, seed, exact)
        inputs = both(pairing, (matrix.spec.name, *matrix.beside))
        steps.append(Step(matrix.spec.name, inputs, (), op, workspace(out, into, min(out, into) if exact else known)))
    steps += [whole_step(pairing, whole) for whole in pairing.wholes]
    return Plan("measure", tuple(steps), notes=pairing.notes)
