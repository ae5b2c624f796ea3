"""spectrum: measures the error and size of each rank, before a rank is chosen.

Pairs the tensors as extract does, and reads both files once; it makes no factors and writes no adapter. Knows no
printing; `surgery.pictures.page` draws the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from formats.open_files import OpenFiles
from surgery.errors import NothingToDo
from surgery.model.base_model import BaseModel
from surgery.operations.extract.measure import plan_measure
from surgery.operations.extract.pairing import Choice, pair
from surgery.operations.extract.results import gathered
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Done, Header, Job, runs, step_by_step
from surgery.ranks.choice import RankChoice
from surgery.ranks.spectra import Point, Spectrum, budgeted, doubling, known_rank, uniform
from surgery.report import Report, Stopwatch
from surgery.report_files import PictureFile, spectra_forms

MAX_RANK = 256


@dataclass(frozen=True, kw_only=True)
class SpectrumReport(Report):
    """What extract would lose at each rank. The ledger gives the fate of each tensor in extract.

    Attributes:
        base, tuned: the paths.
        weights: the known singular values of every changed weight.
        uniform: results for all weights at the same rank 1, 2, 4, …, up to the known rank.
        budget: for each of these, the result with the best ranks at the same size or less.
    """

    base: str
    tuned: str
    weights: tuple[Spectrum, ...]
    uniform: tuple[Point, ...]
    budget: tuple[Point, ...]


def prepare_spectrum(
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
) -> Job[SpectrumReport]:
    """Prepares a job that measures the leading singular values of every weight's change.

    Args:
        base, tuned: each a safetensors file or a folder.
        out: path of a picture of the result, `.html` or `.svg`.
        max_rank: number of singular values, at most a matrix's smaller side.
        include, exclude: patterns of names (see `surgery.model.patterns`) of the tensors to measure.
        kinds: pattern → kind of weight, where it is ambiguous.
        dtype: dtype in which factors would be stored; by default each tuned weight's own.
        exact: compute a full SVD instead of one in a Krylov space.
        force: overwrite `out` if it exists.
        seed: seed for the randomised SVD.
        resources: workers, memory and device.

    Raises:
        SurgeryError, FormatError: see their trees.
    """
    watch, files = Stopwatch(loading="torch"), OpenFiles()
    before, after = BaseModel.open(base, files), BaseModel.open(tuned, files)
    ranks = RankChoice(max_rank, dtype=dtype, seed=seed)
    pairing = pair(before, after, Choice(tuple(include), tuple(exclude), kinds or {}, allow_removed=True))
    measure = plan_measure(pairing, max_rank, dtype=ranks.stored, seed=seed, exact=exact)
    plan = replace(measure, operation="spectrum")
    picture = PictureFile(out, spectra_forms(base, tuned), (base, tuned), force=force)

    def finish(done: Done) -> Callable[[Header], SpectrumReport]:
        weights = gathered(done.outcomes).spectra
        if not weights:
            raise NothingToDo(
                "no weight has changed between base and tuned",
                where=f"{base} and {tuned}",
                then="check that tuned is the model after training",
            )
        points = uniform(weights, doubling(known_rank(weights)))
        sizes = budgeted(weights, [point.nbytes for point in points])
        picture.draw(weights)
        return lambda header: SpectrumReport(
            **{**header, "output": None if out is None else str(out)},
            base=str(base),
            tuned=str(tuned),
            weights=weights,
            uniform=points,
            budget=sizes,
        )

    return step_by_step(
        plan,
        files=files,
        watch=watch,
        inputs=(base, tuned),
        finish=finish,
        beside=() if out is None else (out,),
        around=picture,
        resources=resources,
    )


spectrum = runs(prepare_spectrum)
