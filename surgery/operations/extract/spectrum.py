"""spectrum: how much error and size each rank would mean, before one is chosen.

Pairs the tensors as extract does, and reads both files once; nothing is factored and no adapter written. Knows no
printing; the picture is `surgery.pictures.page`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from formats.paths import open_checkpoint
from surgery.errors import NothingToDo
from surgery.operations.extract.measure import plan_measure
from surgery.operations.extract.pairing import pair
from surgery.operations.extract.plan import Extraction
from surgery.pipeline import engine
from surgery.pipeline.engine import Resources
from surgery.pipeline.plan import ledger
from surgery.ranks.spectra import Point, Spectrum, budgeted, doubling, known_rank, uniform
from surgery.report import Report, Stopwatch, peak_rss
from surgery.report_files import picture_file, spectra_forms

MAX_RANK = 256


@dataclass(frozen=True, kw_only=True)
class SpectrumReport(Report):
    """What extract would lose at which rank. The ledger says what extract would make of each tensor.

    Attributes:
        base, tuned: the paths.
        weights: what is known of every changed weight's spectrum.
        uniform: all of them together at ranks 1, 2, 4, … as far as they are known.
        budget: for each of those, the best ranks for factors of at most the same size.
    """

    base: str
    tuned: str
    weights: tuple[Spectrum, ...]
    uniform: tuple[Point, ...]
    budget: tuple[Point, ...]


def spectrum(
    base: str | Path,
    tuned: str | Path,
    out: str | Path | None = None,
    *,
    max_rank: int = MAX_RANK,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    kinds: Mapping[str, str] | None = None,
    dtype: str | None = None,
    exact: bool = False,
    force: bool = False,
    seed: int = 0,
    resources: Resources | None = None,
) -> SpectrumReport:
    """Measures the leading singular values of every weight's change.

    Args:
        base, tuned: a safetensors file or a folder each.
        out: a picture of the result, `.html` or `.svg`.
        max_rank: how many singular values; clamped to a matrix's smaller side.
        include, exclude: patterns of names (see `surgery.model.patterns`) of the tensors to look at.
        kinds: pattern → kind of weight, where the evidence leaves a doubt.
        dtype: that factors would be stored in; by default each tuned weight's own.
        exact: decompose in full instead of in a Krylov space.
        force: replace what stands at `out`.
        seed: of the random start of the SVD.
        resources: threads and memory.

    Raises:
        SurgeryError, FormatError: see their trees.
    """
    watch = Stopwatch(loading="torch")
    with picture_file(out, spectra_forms(base, tuned), (base, tuned), force=force) as draw:
        with open_checkpoint(base) as before, open_checkpoint(tuned) as after:
            how = Extraction(
                rank=max_rank, include=include, exclude=exclude, kinds=kinds or {}, dtype=dtype, allow_removed=True
            )
            pairing = pair(before, after, how.choice)
            plan = plan_measure(before, after, pairing, rank=max_rank, dtype=how.stored, seed=seed, exact=exact)
        outcomes = engine.run(plan, None, resources)
        weights = tuple(outcome.figures["spectrum"] for outcome in outcomes if "spectrum" in outcome.figures)
        if not weights:
            raise NothingToDo(
                "none of the weights has changed",
                where=f"{base} and {tuned}",
                then="check that tuned is the model after training",
            )
        points = uniform(weights, doubling(known_rank(weights)))
        report = SpectrumReport(
            operation="spectrum",
            output=None if out is None else str(out),
            seconds=watch.seconds,
            peak_rss_bytes=peak_rss(),
            ledger=ledger(outcomes),
            notes=plan.notes,
            base=str(base),
            tuned=str(tuned),
            weights=weights,
            uniform=points,
            budget=budgeted(weights, [point.nbytes for point in points]),
        )
        draw(report.weights)
    return dataclasses.replace(report, seconds=watch.seconds)
