"""extract: tuned − base, as low-rank factors where that is possible and in full where it is not.

Runs the plan and then writes the config, since what changed is known only once both are read. Knows no file's bytes and
no printing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from formats.checkpoint import Checkpoint
from formats.destination import Destination, create_checkpoint
from formats.dialects import CONFIG_KEY
from formats.dialects.peft_writing import (
    Extracted,
    lora_config,
)
from formats.layers import LayerKind, ancestors, owner
from formats.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS, open_checkpoint
from surgery.errors import NothingToDo
from surgery.operations.extract.budget import ranks_within
from surgery.operations.extract.ops import ModuleReport
from surgery.operations.extract.pairing import Pairing
from surgery.operations.extract.plan import Extraction, pair_for, plan_extract
from surgery.pipeline import engine
from surgery.pipeline.engine import Resources
from surgery.pipeline.plan import Fate, Outcome, ledger
from surgery.ranks import FixedRank, RankRule
from surgery.ranks.budget import Budget
from surgery.receipts.receipt import TOOL
from surgery.report import Report, Stopwatch, peak_rss
from surgery.report_files import picture_file, spectra_forms


@dataclass(frozen=True, kw_only=True)
class ExtractReport(Report):
    """What extract did.

    Attributes:
        rule: how ranks were chosen, in words.
        modules: every weight that became factors.
        energy, residual: over all factored weights: the share of Σ‖ΔW‖² they hold, and the relative error.
    """

    rule: str
    modules: tuple[ModuleReport, ...]
    energy: float
    residual: float


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path | None = None,
    *,
    rank: int | RankRule | Budget,
    overrides: Mapping[str, int] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    kinds: Mapping[str, str] | None = None,
    method: str = "lora",
    bias: str = "full",
    dtype: str | None = None,
    exact: bool = False,
    allow_removed: bool = False,
    curve: str | Path | None = None,
    force: bool = False,
    seed: int = 0,
    resources: Resources | None = None,
) -> ExtractReport:
    """Writes tuned − base as a PEFT adapter: LoRA factors for changed matrices, the rest of the change in full.

    Args:
        base, tuned: a safetensors file or a folder each.
        out: a folder, or a `.safetensors`/`.st` file; by default a folder named after tuned.
        rank: of the factors, a rule of `surgery.ranks`, or a `Budget` for all. A weight that is smaller than its
            factors goes in full.
        overrides: pattern → rank, for the weights it matches; the last that matches wins.
        include, exclude: patterns over tensor names; what is not chosen is left behind.
        kinds: pattern → kind of weight where the evidence leaves a doubt (see `surgery.model.layer_kinds.ASKED`).
        method: "lora", or "dora" for factors with a magnitude, never worse than without.
        bias: of adapted layers, "full" or "lora": in full, or its change with the factors (peft's `lora_bias`).
        dtype: of the factors, "float32", "float16" or "bfloat16"; by default each tuned weight's own.
        exact: decompose in full instead of in a Krylov space.
        allow_removed: accept that tensors of base which tuned lacks cannot be taken away by an adapter.
        curve: a picture `.html` or `.svg` of error and size against rank, as far as the ranks went.
        force: replace what stands at `out`, and at `curve`.
        seed: of the random start of the SVD.
        resources: threads, memory and device.

    Raises:
        SurgeryError, FormatError: see their trees; everything the headers tell is refused before any payload is read.
    """
    how = Extraction(
        rank=rank, overrides=overrides or {}, include=include, exclude=exclude, kinds=kinds or {}, method=method,
        bias=bias, dtype=dtype, exact=exact, seed=seed, allow_removed=allow_removed,
    )  # fmt: skip
    watch = Stopwatch(loading="torch")
    target = Path(out) if out is not None else default_output(tuned, how.rank)
    with (
        picture_file(curve, spectra_forms(base, tuned), (base, tuned), force=force) as draw,
        open_checkpoint(base) as before,
        open_checkpoint(tuned) as after,
    ):
        pairing = pair_for(before, after, how)
        destination = Destination(target, weights=ADAPTER_WEIGHTS, inputs=(Path(base), Path(tuned)), force=force)
        ranks = None
        if isinstance(how.rank, Budget):
            destination.check()
            ranks = ranks_within(before, after, how, pairing, how.rank, resources)
        plan = plan_extract(before, after, how, pairing, ranks)
        metadata = {"format": "pt", "surgery": f"{TOOL} extract"}
        with create_checkpoint(destination, plan.outputs, metadata, reserve=not plan.shrinks) as writer:
            outcomes = engine.run(plan, writer, resources)
            _check_anything(outcomes, base, tuned)
            config = json.dumps(lora_config(_describe(outcomes, after, str(base), how, pairing)), indent=2)
            if destination.is_folder:
                writer.attach(ADAPTER_CONFIG, config.encode() + b"\n")
            else:
                writer.seal({**metadata, CONFIG_KEY: config})
            spectra = [found for outcome in outcomes for found in outcome.figures.get("spectra", ())]
            if spectra:
                draw(spectra)
    modules = tuple(report for outcome in outcomes for report in outcome.figures.get("modules", ()))
    changed = sum(module.delta_norm**2 for module in modules)
    left_out = sum((module.delta_norm * module.residual) ** 2 for module in modules)
    return ExtractReport(
        operation="extract",
        output=str(target),
        seconds=watch.seconds,
        peak_rss_bytes=peak_rss(),
        ledger=ledger(outcomes),
        notes=(*plan.notes, *_afterthoughts(modules, how)),
        rule=str(how.rank if isinstance(how.rank, Budget) else how.rule),
        modules=modules,
        energy=1.0 - left_out / changed if changed else 1.0,
        residual=(left_out / changed) ** 0.5 if changed else 0.0,
    )


def _afterthoughts(modules: tuple[ModuleReport, ...], how: Extraction) -> list[str]:
    """What the user should know that no plan could tell."""
    notes = []
    if not modules:
        notes.append(
            "no weight became factors: surgery merges this adapter, but peft loads none without any, and there is no "
            "curve to draw"
        )
    kept = sum(module.method == "lora" for module in modules) if how.method == "dora" else 0
    if kept:
        notes.append(f"{kept} weights keep LoRA's own product, which no magnitude improves")
    return notes


def default_output(tuned: str | Path, rank: int | RankRule | Budget) -> Path:
    """Where extract writes if it is not told: a folder named after tuned, in the working directory."""
    path = Path(tuned).absolute()
    fixed = rank.rank if isinstance(rank, FixedRank) else rank
    suffix = f"-r{fixed}" if isinstance(fixed, int) else ""
    return Path(f"{path.name if path.is_dir() else path.stem}-lora{suffix}")


def _check_anything(outcomes: tuple[Outcome, ...], base: str | Path, tuned: str | Path) -> None:
    if all(fate in (Fate.IDENTICAL, Fate.REFUSED) for outcome in outcomes for fate in outcome.fates.values()):
        raise NothingToDo(
            "base and tuned are identical: there is nothing to extract",
            where=f"{base} and {tuned}",
            then="check that tuned is the model after training",
        )


def _describe(
    outcomes: tuple[Outcome, ...], tuned: Checkpoint, name: str, how: Extraction, pairing: Pairing
) -> Extracted:
    """What the adapter's config must say, from what really changed."""
    reports = [report for outcome in outcomes for report in outcome.figures.get("modules", ())]
    ranks = {pairing.known_as(report.name): report.rank for report in reports}
    parameters = {pairing.known_as(report.name) for report in reports if report.kind is LayerKind.PARAMETER}
    full = [entry for outcome in outcomes for entry in outcome.figures.get("full", ())]
    holders = {owner(pairing.known_as(entry)) for entry in tuned.specs}
    return Extracted(
        ranks={owner(known): rank for known, rank in ranks.items() if known not in parameters},
        parameters={known: rank for known, rank in ranks.items() if known in parameters},
        saved=tuple(sorted(o.figures["saved"] for o in outcomes if o.figures.get("saved"))),
        biases=any(entry.endswith(".bias") and f"{owner(entry)}.weight" in tuned.specs for entry in full),
        lora_bias=how.bias == "lora",
        dora=how.method == "dora",
        transposed=any(report.kind is LayerKind.TRANSPOSED for report in reports),
        modules=frozenset(holders.union(*map(ancestors, holders))),
        rank=max((report.rank for report in reports), default=1),
        base=name,
    )
