"""to_lora: an adapter of any method that can be merged as a plain LoRA, by truncated SVD of what it does to weights.

`convert --to lora` on the command line. The plan is `to_lora_plan`'s; this runs it and writes the config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from formats.adapter import NOTHING_TOLD, Told
from formats.dialects import open_adapter_file
from formats.open_files import OpenFiles
from surgery.errors import NothingToDo
from surgery.model.base_model import BaseModel
from surgery.operations.extract.results import FactorFigures, changed, gathered, put_config
from surgery.operations.lora.to_lora_ops import ToLoraModule
from surgery.operations.lora.to_lora_plan import open_lowering, plan_lowering, ranks_within
from surgery.operations.lora.write import destination, new_factors
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Done, Header, Job, runs, step_by_step
from surgery.pipeline.plan import Outcome, Plan, ledger
from surgery.ranks import RankRule
from surgery.ranks.budget import Budget
from surgery.ranks.choice import RankChoice
from surgery.report import Report, Stopwatch


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


def prepare_to_lora(
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
) -> Job[ToLoraReport]:
    """Prepares a job that writes an adapter of any method as a plain LoRA in peft's names.

    Of all LoRAs of that rank it is the nearest, weight by weight.

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
        resources: workers, memory and device.

    Raises:
        SurgeryError, FormatError: see their trees; everything the headers tell is refused before any work.
    """
    watch, files = Stopwatch(loading="torch"), OpenFiles()
    ranks = RankChoice(rank, overrides or {}, dtype)
    model = None if base is None else BaseModel.open(base, files)
    lowering = open_lowering(open_adapter_file(adapter, files), model, told, drop)
    target = destination(out, [Path(adapter)], base, force=force, files=files)

    def measured(resources: Resources) -> Plan:
        as_file = not target.is_folder
        found = ranks_within(lowering, ranks, as_file=as_file, files=files, resources=resources)
        return plan_lowering(lowering, ranks, found)

    def finish(done: Done) -> Callable[[Header], ToLoraReport]:
        found: FactorFigures[ToLoraModule] = gathered(done.outcomes)
        if not changed(found.modules):
            raise NothingToDo("the adapter changes no weight: all of its ΔW is zero", where=adapter)
        put_config(done, target, lowering.config({module.name: module.rank for module in found.modules}))
        return lambda header: ToLoraReport(
            **{**header, "ledger": ledger((*done.outcomes, Outcome((), lowering.beside)))},
            **new_factors(found.modules, [lowering.adapter.ref.path], target),
            source=lowering.adapter.dialect,
            rule=str(ranks),
            exact=sum(module.exact for module in found.modules),
        )

    return step_by_step(
        plan_lowering(lowering, ranks),
        files=files,
        watch=watch,
        inputs=target.inputs,
        finish=finish,
        destination=target,
        replan=None if ranks.budget is None else measured,
        resources=resources,
    )


to_lora = runs(prepare_to_lora)
