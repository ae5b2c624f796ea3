"""to_lora: turns any mergeable adapter into a plain LoRA, by truncated SVD of its changes to weights.

On the command line this is `convert --to lora`. `to_lora_plan` plans; this runs the plan and writes the config.
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
        source: the adapter's dialect.
        rule: how ranks were chosen, in words.
        modules: every weight that got factors.
        exact: number of weights whose factors hold all of ΔW, up to rounding.
        energy, residual: share of Σ‖ΔW‖² that all factors hold, and their relative error.
        nbytes_before, nbytes: size of the weights' file before and after, in bytes.
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

    The result is the nearest LoRA of that rank, weight by weight.

    ΔW is the adapted weight minus the base's. If it is a product of thin matrices, an element-wise product of two such
    products (LoHa), or a Kronecker product (LoKr), it is decomposed by these factors in float64 and never formed. No
    weight gets a higher rank than its ΔW can have. The scaling is multiplied into the factors, so alpha equals the
    rank. Changed biases and norms, and tensors that the adapter carries in full, are stored in full.

    Args:
        adapter: a folder or a file in any dialect that merge reads.
        out: a folder, or a `.safetensors`/`.st` file.
        rank: rank of the factors, a rule of `surgery.ranks`, or a `Budget` for all weights.
        overrides: pattern → rank, for matching weights; the last match wins.
        base: the model that it adapts. Only its headers are read, unless a method multiplies weights or biases change.
            LoRA with dotted names does not need it.
        told: alpha and layout of loralib's files; the part of a pipeline.
        drop: "bias", "full": tensors to leave out instead of storing them in full.
        dtype: dtype of the factors, "float32", "float16" or "bfloat16"; by default the adapter's own.
        force: overwrite `out` if it exists.
        resources: workers, memory and device.

    Raises:
        SurgeryError, FormatError: see their trees; errors that headers reveal are raised before any work.
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
            raise NothingToDo(
                "the adapter changes no weight: all of its ΔW is zero",
                where=adapter,
                then="check that the adapter is trained",
            )
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
