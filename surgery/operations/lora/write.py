"""Writes new factors, and fills the report fields that resize, combine and to_lora share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from formats.destination import Destination, destination_like
from formats.open_files import OpenFiles
from formats.paths import ADAPTER_WEIGHTS
from formats.spec import DType
from surgery.errors import NothingToDo
from surgery.operations.extract.results import Lossy, changed, energy_and_residual, gathered, put_config
from surgery.operations.lora.ops import Mix
from surgery.operations.lora.plan import Casting, plan_recast, ranks_within
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Done, Header, Job, step_by_step
from surgery.pipeline.plan import Plan
from surgery.ranks.choice import RankChoice
from surgery.report import Report, Stopwatch

R = TypeVar("R", bound=Report)
Fields = dict[str, Any]  # fields of a report, by name


def destination(
    out: str | Path, adapters: Sequence[Path], base: str | Path | None, *, force: bool, files: OpenFiles
) -> Destination:
    """The output. Files next to a single adapter's weights are copied too, such as a tokenizer or a model card."""
    inputs = (*adapters, *(() if base is None else (Path(base),)))
    if len(adapters) == 1 and adapters[0].is_dir():
        like = destination_like(adapters[0], out, (), inputs=inputs, force=force, files=files)
        return replace(like, weights=ADAPTER_WEIGHTS)
    return Destination(Path(out), weights=ADAPTER_WEIGHTS, inputs=inputs, force=force)


def recast_job(
    operation: str,
    casting: Casting,
    target: Destination,
    report: Callable[[Header, Fields], R],
    *,
    mix: Mix,
    ranks: RankChoice | None,
    dtypes: Mapping[str, DType],
    notes: tuple[str, ...],
    files: OpenFiles,
    watch: Stopwatch,
    resources: Resources | None,
) -> Job[R]:
    """Prepares a job that writes new factors.

    Args:
        operation, casting, mix, ranks, dtypes, notes: as for `plan_recast`.
        target: the output, which also knows the input paths.
        report: makes the report from the header and `new_factors`.
        files, watch, resources: as for `step_by_step`.
    """
    read = [each.adapter.ref.path for each in casting.adapters]

    def measured(resources: Resources) -> Plan:
        assert ranks is not None
        as_file = not target.is_folder
        found = ranks_within(casting, mix, ranks, dtypes, as_file=as_file, files=files, resources=resources)
        return plan_recast(operation, casting, mix, ranks, dtypes, found, notes)

    def finish(done: Done) -> Callable[[Header], R]:
        modules = gathered(done.outcomes).modules
        if not changed(modules) and not casting.copied:
            raise NothingToDo(
                "the new adapter is all zeros", where=", ".join(read), then="check that the adapters are trained"
            )
        put_config(done, target, casting.config({module.name: module.rank for module in modules}))
        return lambda header: report(header, new_factors(modules, read, target))

    return step_by_step(
        plan_recast(operation, casting, mix, ranks, dtypes, notes=notes),
        files=files,
        watch=watch,
        inputs=target.inputs,
        finish=finish,
        destination=target,
        replan=None if ranks is None or ranks.budget is None else measured,
        resources=resources,
    )


def new_factors(modules: tuple[Lossy, ...], read: Iterable[str | Path], target: Destination) -> Fields:
    """The report fields about new factors, once they are written.

    Args:
        modules: the figures of every weight.
        read: the adapters' weight files.
        target: the output.
    """
    energy, residual = energy_and_residual(modules)
    return {
        "modules": modules,
        "energy": energy,
        "residual": residual,
        "nbytes_before": sum(Path(path).stat().st_size for path in read),
        "nbytes": (target.path / ADAPTER_WEIGHTS if target.is_folder else target.path).stat().st_size,
    }
