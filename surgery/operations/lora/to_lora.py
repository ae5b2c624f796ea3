"""to_lora: an adapter of any method that can be merged as a plain LoRA, by truncated SVD of what it does to weights.

`convert --to lora` on the command line. The plan is `to_lora_plan`'s; this runs it and writes the config.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from formats.adapter import NOTHING_TOLD, Told
from formats.destination import create_checkpoint
from formats.dialects import CONFIG_KEY
from formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from surgery.errors import NothingToDo
from surgery.operations.extract.plan import Extraction
from surgery.operations.lora.to_lora_ops import ToLoraModule
from surgery.operations.lora.to_lora_plan import open_lowering, plan_lowering, ranks_within
from surgery.operations.lora.write import destination
from surgery.pipeline import engine
from surgery.pipeline.engine import Resources
from surgery.pipeline.plan import Outcome, Plan, ledger
from surgery.ranks import RankRule
from surgery.ranks.budget import Budget
from surgery.report import Report, Stopwatch, peak_rss


@dataclass(frozen=True, kw_only=True)
class ToLoraReport(Report):
    """What to_lora did.

    Attributes:
        source: the dialect it read.
        rule: how ranks were chosen, in words.
        modules: every weight that got factors.
        exact: how many of them hold all of ΔW, so that nothing is lost but rounding.
        energy, residual: over all of them: the share of Σ‖ΔW‖² they hold, and the relative error.
        nbytes_before, nbytes: of the weights' file, before and after.
    """

    source: str
    rule: str
    modules: tuple[ToLoraModule, ...]
    exact: int
    energy: float
    residual: float
    nbytes_before: int
    nbytes: int


def to_lora(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | RankRule | Budget,
    overrides: Mapping[str, int] | None = None,
    base: str | Path | None = None,
    told: Told = NOTHING_TOLD,
    drop: Iterable[str] = (),
    dtype: str | None = None,
    force: bool = False,
    resources: Resources | None = None,
) -> ToLoraReport:
    """Writes an adapter of any method as a plain LoRA in peft's names: of all of a rank the nearest, weight by weight.

    ΔW is what the method adds to a weight, or makes of it less the weight itself. Where it is a product of thin
    matrices, or of two such products element by element (LoHa), or a Kronecker product (LoKr), it is decomposed by
    these factors in float64 and never formed. No weight gets more rank than its ΔW can have. The scaling is in the
    factors: alpha is the rank. Changed biases and norms, and what the adapter carries in full, go along in full.

    Args:
        adapter: a folder or a file in any dialect that merge reads.
        out: a folder, or a `.safetensors`/`.st` file.
        rank: of the factors, a rule of `surgery.ranks`, or a `Budget` for all.
        overrides: pattern → rank, for the weights it matches; the last that matches wins.
        base: the model it adapts: of its headers only, unless a method multiplies the weights or biases change. LoRA in
            dotted names does without.
        told: alpha and layout of loralib's files; the part of a pipeline.
        drop: "bias", "full": what to leave behind instead of carrying it in full.
        dtype: of the factors, "float32", "float16" or "bfloat16"; by default that of the adapter's own.
        force: replace what stands at `out`.
        resources: threads, memory and device.

    Raises:
        SurgeryError, FormatError: see their trees; everything the headers tell is refused before any work.
    """
    watch = Stopwatch(loading="torch")
    how = Extraction(rank=rank, overrides=overrides or {}, dtype=dtype)
    lowering = open_lowering(adapter, base, told, drop, how)
    target = destination(out, [Path(adapter)], force=force)
    if base is not None:
        target = replace(target, inputs=(*target.inputs, Path(base)))
    target.check()
    ranks = None
    if isinstance(rank, Budget):
        ranks = ranks_within(lowering, how, rank, as_file=not target.is_folder, resources=resources)
    plan = plan_lowering(lowering, how, ranks)
    with create_checkpoint(target, plan.outputs, plan.metadata, reserve=False) as writer:
        outcomes = engine.run(plan, writer, resources)
        modules = tuple(outcome.figures["module"] for outcome in outcomes if "module" in outcome.figures)
        total = sum(module.delta_norm**2 for module in modules)
        if not total:
            raise NothingToDo("the adapter changes no weight: all of its ΔW is zero", where=adapter)
        config = json.dumps(lowering.config({module.name: module.rank for module in modules}), indent=2)
        if target.is_folder:
            writer.attach(ADAPTER_CONFIG, config.encode() + b"\n")
        else:
            writer.seal({**plan.metadata, CONFIG_KEY: config})
    left_out = sum((module.delta_norm * module.residual) ** 2 for module in modules)
    return ToLoraReport(
        operation="convert",
        output=str(out),
        seconds=watch.seconds,
        peak_rss_bytes=peak_rss(),
        ledger=ledger((*outcomes, Outcome((), lowering.beside))),
        notes=plan.notes,
        source=lowering.adapter.dialect,
        rule=str(rank if isinstance(rank, Budget) else how.rule),
        modules=modules,
        exact=sum(module.exact for module in modules),
        energy=1.0 - left_out / total,
        residual=math.sqrt(left_out / total),
        nbytes_before=Path(lowering.adapter.ref.path).stat().st_size,
        nbytes=(target.path / ADAPTER_WEIGHTS if target.is_folder else target.path).stat().st_size,
    )


def planned(
    adapter: str | Path,
    how: Extraction,
    base: str | Path | None = None,
    told: Told = NOTHING_TOLD,
    drop: Iterable[str] = (),
) -> Plan:
    """The plan of to_lora, whose arguments these are; where a budget rules, with room for any ranks."""
    return plan_lowering(open_lowering(adapter, base, told, drop, how), how)
