"""extract: writes tuned − base as an adapter, with low-rank factors where possible and full tensors elsewhere.

Runs the plan first and writes the config afterwards, because changes are known only after both files are read. Knows
no file's bytes and no printing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from formats.destination import Destination
from formats.dialects.peft_writing import Extracted, lora_config
from formats.errors import OutputExists
from formats.layers import LayerKind, ancestors, owner
from formats.open_files import OpenFiles
from formats.paths import ADAPTER_WEIGHTS
from surgery.errors import NothingToDo
from surgery.model.base_model import BaseModel
from surgery.operations.extract.budget import ranks_within
from surgery.operations.extract.ops import ModuleReport
from surgery.operations.extract.pairing import Choice, Pairing
from surgery.operations.extract.plan import Extraction, pair_for, plan_extract
from surgery.operations.extract.results import FactorFigures, energy_and_residual, gathered, put_config
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Done, Header, Job, runs, step_by_step
from surgery.pipeline.plan import Fate, Outcome, Plan
from surgery.ranks import FixedRank, RankRule
from surgery.ranks.budget import Budget
from surgery.ranks.choice import RankChoice
from surgery.report import Report, Stopwatch
from surgery.report_files import PictureFile, spectra_forms


@dataclass(frozen=True, kw_only=True)
class ExtractReport(Report):
    """What extract did.

    Attributes:
        rule: how ranks were chosen, in words.
        modules: every weight that became factors.
        energy, residual: share of Σ‖ΔW‖² that all factors hold, and their relative error.
    """

    rule: str
    modules: tuple[ModuleReport, ...]
    energy: float
    residual: float


def prepare_extract(
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
) -> Job[ExtractReport]:
    """Prepares a job that writes tuned − base as a PEFT adapter.

    Changed matrices become LoRA factors; other changed tensors are stored in full.

    Args:
        base, tuned: each a safetensors file or a folder.
        out: a folder, or a `.safetensors`/`.st` file; by default a folder named after tuned.
        rank: rank of the factors, a rule of `surgery.ranks`, or a `Budget` for all weights. A weight that is smaller
            than its factors is stored in full.
        overrides: pattern → rank, for matching weights; the last match wins.
        include, exclude: patterns over tensor names; tensors that are not chosen are left out.
        kinds: pattern → kind of weight, where it is ambiguous (see `surgery.model.layer_kinds.ASKED`).
        method: "lora", or "dora" for factors with a magnitude, whose error is never larger.
        bias: biases of adapted layers: "full" stores them in full, "lora" stores their change with the factors
            (peft's `lora_bias`).
        dtype: dtype of the factors, "float32", "float16" or "bfloat16"; by default each tuned weight's own.
        exact: compute a full SVD instead of one in a Krylov space.
        allow_removed: extract even if tuned lacks tensors of base, which an adapter cannot remove.
        curve: path of a picture, `.html` or `.svg`, of error and size against rank, up to the computed ranks.
        force: overwrite `out` and `curve` if they exist.
        seed: seed for the randomised SVD.
        resources: workers, memory and device.

    Raises:
        SurgeryError, FormatError: see their trees; errors that headers reveal are raised before any payload is read.
    """
    watch, files = Stopwatch(loading="torch"), OpenFiles()
    how = Extraction(
        ranks=RankChoice(rank, overrides or {}, dtype, seed),
        choice=Choice(tuple(include), tuple(exclude), kinds or {}, allow_removed),
        method=method,
        bias=bias,
        exact=exact,
    )
    target = Path(out) if out is not None else default_output(tuned, rank)
    picture = PictureFile(curve, spectra_forms(base, tuned), (base, tuned), force=force)
    if curve is not None and Path(curve).resolve() == target.resolve():
        raise OutputExists("the picture and the adapter have the same path", where=curve, then="choose another --curve")
    pairing = pair_for(BaseModel.open(base, files), BaseModel.open(tuned, files), how)
    destination = Destination(target, weights=ADAPTER_WEIGHTS, inputs=(Path(base), Path(tuned)), force=force)

    def measured(resources: Resources) -> Plan:
        return plan_extract(pairing, how, ranks_within(pairing, how, files, resources))

    def finish(done: Done) -> Callable[[Header], ExtractReport]:
        _check_anything(done.outcomes, base, tuned)
        found: FactorFigures[ModuleReport] = gathered(done.outcomes)
        put_config(done, destination, lora_config(_describe(found, str(base), how, pairing)))
        if found.spectra:
            picture.draw(found.spectra)
        energy, residual = energy_and_residual(found.modules)
        return lambda header: ExtractReport(
            **{**header, "notes": (*done.plan.notes, *_afterthoughts(found.modules, how))},
            rule=str(how.ranks),
            modules=found.modules,
            energy=energy,
            residual=residual,
        )

    return step_by_step(
        plan_extract(pairing, how),
        files=files,
        watch=watch,
        inputs=(base, tuned),
        finish=finish,
        destination=destination,
        beside=() if curve is None else (curve,),
        around=picture,
        replan=None if how.ranks.budget is None else measured,
        resources=resources,
    )


extract = runs(prepare_extract)


def _afterthoughts(modules: tuple[ModuleReport, ...], how: Extraction) -> list[str]:
    """Remarks for the user that depend on the run."""
    notes = []
    if not modules:
        notes.append(
            "no weight became factors: surgery merges this adapter, but peft loads no adapter without factors, and "
            "there is no curve to draw"
        )
    kept = sum(module.method == "lora" for module in modules) if how.method == "dora" else 0
    if kept:
        notes.append(f"{kept} weights keep the LoRA product, because no magnitude improves it")
    return notes


def default_output(tuned: str | Path, rank: int | RankRule | Budget) -> Path:
    """The default output of extract: a folder in the working directory, named after tuned."""
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


def _describe(found: FactorFigures[ModuleReport], name: str, how: Extraction, pairing: Pairing) -> Extracted:
    """The contents of the adapter's config, from the changes that were found."""
    tuned = pairing.tuned.specs
    ranks = {pairing.known_as(report.name): report.rank for report in found.modules}
    parameters = {pairing.known_as(report.name) for report in found.modules if report.kind is LayerKind.PARAMETER}
    holders = {owner(pairing.known_as(entry)) for entry in tuned}
    return Extracted(
        ranks={owner(known): rank for known, rank in ranks.items() if known not in parameters},
        parameters={known: rank for known, rank in ranks.items() if known in parameters},
        saved=tuple(sorted(found.saved)),
        biases=any(entry.endswith(".bias") and f"{owner(entry)}.weight" in tuned for entry in found.full),
        lora_bias=how.bias == "lora",
        dora=how.method == "dora",
        transposed=any(report.kind is LayerKind.TRANSPOSED for report in found.modules),
        modules=frozenset(holders.union(*map(ancestors, holders))),
        rank=max((report.rank for report in found.modules), default=1),
        base=name,
    )
