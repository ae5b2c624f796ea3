"""resize: changes the rank of a LoRA adapter by the singular values of its ΔW, which is never formed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from formats.open_files import OpenFiles
from surgery.model.base_model import BaseModel
from surgery.operations.lora.open import open_loras
from surgery.operations.lora.ops import Mix, RecastModule
from surgery.operations.lora.plan import Casting, widest_of
from surgery.operations.lora.write import Fields, destination, recast_job
from surgery.operations.merge.adapters import adapter_files
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Header, Job, runs
from surgery.ranks import RankRule
from surgery.ranks.budget import Budget
from surgery.ranks.choice import RankChoice
from surgery.report import Report, Stopwatch


@dataclass(frozen=True, kw_only=True)
class ResizeReport(Report):
    """What resize did.

    Attributes:
        rule: how ranks were chosen, in words.
        modules: every weight's new factors.
        energy, residual: share of Σ‖ΔW‖² that all factors hold, and their relative error.
        nbytes_before, nbytes: size of the weights' file before and after, in bytes.
    """

    rule: str
    modules: tuple[RecastModule, ...]
    energy: float
    residual: float
    nbytes_before: int
    nbytes: int


def prepare_resize(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | RankRule | Budget,
    overrides: Mapping[str, int] | None = None,
    base: str | Path | None = None,
    dtype: str | None = None,
    force: bool = False,
    resources: Resources | None = None,
) -> Job[ResizeReport]:
    """Prepares a job that writes a LoRA adapter at another rank.

    The result is the nearest adapter of that rank, weight by weight.

    ΔW = s B A is decomposed by its thin factors in float64, exactly, and never formed. The scaling is multiplied into
    the factors, so alpha equals the rank. No weight gets a higher rank than it has. DoRA keeps its magnitudes.

    Args:
        adapter: LoRA in peft's names, a folder or a single file.
        out: a folder, or a `.safetensors`/`.st` file.
        rank: rank of the factors, a rule of `surgery.ranks`, or a `Budget` for all weights.
        overrides: pattern → rank, for matching weights; the last match wins.
        base: the base; needed if factors do not identify their weights, as for stacks of experts or trainable tokens.
        dtype: dtype of the factors, "float32", "float16" or "bfloat16"; by default their own.
        force: overwrite `out` if it exists.
        resources: workers, memory and device.

    Raises:
        SurgeryError, FormatError: see their trees; errors that headers reveal are raised before any work.
    """
    watch, files = Stopwatch(loading="torch"), OpenFiles()
    ranks = RankChoice(rank, overrides or {}, dtype)
    model = None if base is None else BaseModel.open(base, files)
    casting = Casting.of(open_loras(adapter_files(adapter, files), model), files)
    target = destination(out, [Path(adapter)], base, force=force, files=files)
    dtypes = {
        slot.name: ranks.stored or widest_of(ref.spec.dtype for source in slot.sources for ref in source.factors)
        for slot in casting.slots
    }

    def report(header: Header, made: Fields) -> ResizeReport:
        modules: tuple[RecastModule, ...] = made["modules"]
        kept = sum(module.rank == sum(module.ranks) for module in modules)
        notes = (f"{kept} of {len(modules)} weights keep their full rank",) if kept else ()
        return ResizeReport(**{**header, "notes": (*header["notes"], *notes)}, **made, rule=str(ranks))

    return recast_job(
        "resize",
        casting,
        target,
        report,
        mix=Mix("svd"),
        ranks=ranks,
        dtypes=dtypes,
        notes=_notes(casting),
        files=files,
        watch=watch,
        resources=resources,
    )


resize = runs(prepare_resize)


def _notes(casting: Casting) -> tuple[str, ...]:
    dora = any(source.module.method == "dora" for slot in casting.slots for source in slot.sources)
    note = "DoRA: the magnitudes are unchanged; energy and residual describe ΔW, which affects only the directions"
    return (note,) if dora else ()
