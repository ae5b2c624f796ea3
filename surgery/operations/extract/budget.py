"""A budget of bytes becomes a rank for every weight, by the spectra of what changed.

Measures first; extract runs afterwards with the ranks that came out, since no rank is known before all spectra are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from formats.checkpoint import Checkpoint
from formats.dialects.peft_writing import factor_keys, full_key
from formats.layout import layout
from formats.spec import TensorSpec
from surgery.operations.extract.measure import plan_measure
from surgery.operations.extract.pairing import Matrix, Pairing
from surgery.operations.extract.plan import Extraction
from surgery.pipeline import engine
from surgery.pipeline.engine import Resources
from surgery.pipeline.plan import Outcome
from surgery.ranks.budget import Budget, Claim, allocate
from surgery.ranks.spectra import Spectrum

_LEAST_KNOWN = 16  # values to measure of every weight at first


def ranks_within(
    base: Checkpoint,
    tuned: Checkpoint,
    how: Extraction,
    pairing: Pairing,
    budget: Budget,
    resources: Resources | None,
) -> dict[str, int]:
    """The rank of every changed weight with which an adapter of at most that many bytes holds the most energy.

    The spectra are measured to twice the uniform rank that the budget allows, and further where a weight turns out to
    take all that is known of it: it might take more.

    Raises:
        SurgeryError: a budget smaller than the full tensors and the least rank of every weight.
    """
    fixed_ranks = how.overridden(tuned.specs)
    matrices = {matrix.spec.name: matrix for matrix in pairing.matrices}
    per_rank = sum(_bytes_per_rank(matrix, how) for matrix in pairing.matrices)
    known = max(_LEAST_KNOWN, 2 * budget.nbytes // max(1, per_rank))
    spectra: dict[str, Spectrum] = {}
    fixed = None
    while True:
        plan = plan_measure(base, tuned, pairing, rank=known, dtype=how.stored, seed=how.seed, exact=how.exact)
        outcomes = engine.run(plan, None, resources)
        spectra |= {found.name: found for found in _spectra(outcomes)}
        if fixed is None:
            full = [name for outcome in outcomes for name in outcome.figures.get("full", ())]
            fixed = _fixed_bytes([matrices[name] for name in spectra], [tuned.specs[name] for name in full], how)
        claims = [_claim(spectrum, matrices[name], fixed_ranks.get(name), budget) for name, spectrum in spectra.items()]
        allocation = allocate(claims, budget.nbytes, fixed)
        if not allocation.saturated:
            return allocation.ranks
        known *= 2
        pairing = replace(pairing, matrices=tuple(matrices[name].alone() for name in allocation.saturated), wholes=())


def _claim(spectrum: Spectrum, matrix: Matrix, rank: int | None, budget: Budget) -> Claim:
    """What a weight may get: no more than pays, and just its own rank where the user said one."""
    least, most = (rank, rank) if rank is not None else (budget.minimum, budget.maximum or spectrum.size)
    most = min(most, matrix.break_even)
    return Claim(
        spectrum.name, spectrum.energies, spectrum.size, spectrum.bytes_per_rank, minimum=min(least, most), maximum=most
    )


def _spectra(outcomes: Iterable[Outcome]) -> list[Spectrum]:
    return [outcome.figures["spectrum"] for outcome in outcomes if "spectrum" in outcome.figures]


def _bytes_per_rank(matrix: Matrix, how: Extraction) -> int:
    return matrix.matrices * sum(matrix.sides) * (how.stored or matrix.spec.dtype).itemsize


def _fixed_bytes(changed: Sequence[Matrix], full: Sequence[TensorSpec], how: Extraction) -> int:
    """Bytes that no rank changes: the full tensors, the magnitudes, and a header that is long enough for any ranks."""
    specs = [TensorSpec(full_key(spec.name, wrappers=1), spec.dtype, spec.shape) for spec in full]
    nbytes = sum(spec.nbytes for spec in full)
    for matrix in changed:
        dtype = how.stored or matrix.spec.dtype
        largest = (matrix.spec.size, matrix.spec.size)  # as a shape, it has more digits than any factor's
        specs += [TensorSpec(key, dtype, largest) for key in factor_keys(matrix.spec.name, matrix.kind)]
        if how.method == "dora":
            nbytes += 4 * matrix.sides[0]
    return nbytes + len(layout(specs, {"format": "pt", "surgery": 40 * "x"}).header)
