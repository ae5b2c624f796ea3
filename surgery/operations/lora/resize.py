"""resize: a LoRA adapter at another rank, by the singular values of its own ΔW, which is never formed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from formats.spec import DType
from surgery.operations.extract.plan import Extraction
from surgery.operations.lora.open import open_loras
from surgery.operations.lora.ops import Mix, RecastModule
from surgery.operations.lora.plan import Casting, plan_recast, ranks_within, widest_of
from surgery.operations.lora.write import destination, write_recast
from surgery.pipeline.engine import Resources
from surgery.pipeline.plan import Plan
from surgery.ranks import RankRule
from surgery.ranks.budget import Budget
from surgery.report import Report, Stopwatch, peak_rss

_SVD = Mix("svd")


@dataclass(frozen=True, kw_only=True)
class ResizeReport(Report):
    """What resize did.

    Attributes:
        rule: how ranks were chosen, in words.
        modules: every weight's new factors.
        energy, residual: over all of them: the share of Σ‖ΔW‖² they hold, and the relative error.
        nbytes_before, nbytes: of the weights' file, before and after.
    """

    rule: str
    modules: tuple[RecastModule, ...]
    energy: float
    residual: float
    nbytes_before: int
    nbytes: int


def resize(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | RankRule | Budget,
    overrides: Mapping[str, int] | None = None,
    base: str | Path | None = None,
    dtype: str | None = None,
    force: bool = False,
    resources: Resources | None = None,
) -> ResizeReport:
    """Writes a LoRA adapter at another rank: of all adapters of that rank the nearest to it, weight by weight.

    ΔW = s B A is decomposed by its thin factors in float64, exactly and without ever being formed. The scaling goes
    into the factors: alpha is the rank. No weight gets more rank than it has. A DoRA keeps its magnitudes.

    Args:
        adapter: LoRA in peft's names, a folder or a single file.
        out: a folder, or a `.safetensors`/`.st` file.
        rank: of the factors, a rule of `surgery.ranks`, or a `Budget` for all.
        overrides: pattern → rank, for the weights it matches; the last that matches wins.
        base: the base, where the factors do not tell what they adapt: stacks of experts, trainable tokens.
        dtype: of the factors, "float32", "float16" or "bfloat16"; by default their own.
        force: replace what stands at `out`.
        resources: threads, memory and device.

    Raises:
        SurgeryError, FormatError: see their trees; everything the headers tell is refused before any work.
    """
    watch = Stopwatch(loading="torch")
    how = Extraction(rank=rank, overrides=overrides or {}, dtype=dtype)
    casting = open_resize(adapter, how, base)
    target = destination(out, [Path(adapter)], force=force)
    target.check()
    ranks = None
    if isinstance(rank, Budget):
        dtypes = _dtypes(casting, how)
        ranks = ranks_within(casting, _SVD, how, dtypes, rank, as_file=not target.is_folder, resources=resources)
    plan = plan_resize(casting, how, ranks)
    written = write_recast(plan, casting, target, resources)
    kept = sum(module.rank == sum(module.ranks) for module in written.modules)
    notes = (f"{kept} of {len(written.modules)} weights keep all the rank they have",) if kept else ()
    return ResizeReport(
        operation="resize",
        output=str(out),
        seconds=watch.seconds,
        peak_rss_bytes=peak_rss(),
        notes=(*plan.notes, *notes),
        rule=str(rank if isinstance(rank, Budget) else how.rule),
        **vars(written),
    )


def open_resize(adapter: str | Path, how: Extraction, base: str | Path | None) -> Casting:
    """The adapter's weights. Raises as `resize`."""
    casting = Casting.of(open_loras(adapter, base))
    _ = how.stored
    how.overridden(slot.name for slot in casting.slots)
    return casting


def plan_resize(casting: Casting, how: Extraction, budgeted: Mapping[str, int] | None = None) -> Plan:
    """The plan; `budgeted` has every weight's rank where a budget rules."""
    dora = any(source.module.method == "dora" for slot in casting.slots for source in slot.sources)
    note = (
        "DoRA: the magnitudes stay as they are; energy and residual are of ΔW, which with W0 gives only the directions"
    )
    return plan_recast("resize", casting, _SVD, how, _dtypes(casting, how), budgeted, (note,) if dora else ())


def _dtypes(casting: Casting, how: Extraction) -> dict[str, DType]:
    return {
        slot.name: how.stored or widest_of(ref.spec.dtype for source in slot.sources for ref in source.factors)
        for slot in casting.slots
    }
