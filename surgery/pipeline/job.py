"""A prepared verb: its plan, its outputs and its work. It has written nothing and read no weights yet.

`prepare_X(…) -> Job` opens the inputs, plans, and raises every error that headers and paths reveal;
`job.run(resources)` does the work. A dry run uses the same code, so it raises the same errors as a run would before
reading weights. Knows no verb.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

from formats.checkpoint import CheckpointWriter, TensorWriter
from formats.destination import Destination, create_checkpoint
from formats.open_files import OpenFiles
from surgery.errors import SurgeryError
from surgery.pipeline import engine
from surgery.pipeline.engine import Resources
from surgery.pipeline.plan import Outcome, Plan, ledger
from surgery.report import Report, Stopwatch, peak_rss

P = ParamSpec("P")
R = TypeVar("R", bound=Report)
Header = Mapping[str, Any]  # the fields of `Report`, by name
_PREPARES = "Prepares a job that "  # how docstrings of `prepare_X` begin; docstrings of X continue after it
Writers = AbstractContextManager[tuple[CheckpointWriter | None, TensorWriter | None]]


@dataclass(frozen=True)
class PlannedStep:
    """One step of a plan for display: its op, its tensor or module, and its inputs and outputs as "dtype shape"."""

    op: str
    name: str
    reads: str
    writes: str


@dataclass(frozen=True)
class JobPlan:
    """What a job will do.

    Attributes:
        operation: its name on the command line.
        inputs: paths that are read.
        outputs: paths that are written.
        bytes_read: payload bytes of all input tensors, each counted once.
        bytes_written: payload bytes of all outputs; an upper bound if ranks are chosen from measurements.
        steps: the work, one step for each tensor or layer.
        notes: remarks for the user.
    """

    operation: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    steps: tuple[PlannedStep, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Job(Generic[R]):
    """A prepared verb. Run it once, or close it: `with surgery.prepare_merge(…) as job: print(job.summary)`.

    Attributes:
        plan: its steps, with every input, output, shape and dtype.
        inputs, outputs: paths that are read and written.
        files: the open files.
        work: does the work and returns the report.
        resources: workers, memory and device.
    """

    plan: Plan
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    files: OpenFiles
    work: Callable[[Resources], R]
    resources: Resources

    def run(self, resources: Resources | None = None) -> R:
        """Runs the job and closes its files.

        Args:
            resources: workers, memory and device; by default those given to `prepare_X`.

        Raises:
            ReportedError: the weights reveal an error, or files have changed on disk since the job was prepared.
        """
        if self.files.closed:
            raise SurgeryError(
                "this job has already been run or closed",
                where=self.plan.operation,
                then="prepare another job with the same arguments",
            )
        with self:
            return self.work(resources or self.resources)

    @property
    def summary(self) -> JobPlan:
        """What the job will do, as plain data."""
        reads = {(ref.checkpoint, ref.name): ref.spec.nbytes for step in self.plan.steps for ref in step.inputs}
        return JobPlan(
            operation=self.plan.operation,
            inputs=tuple(map(str, self.inputs)),
            outputs=tuple(map(str, self.outputs)),
            bytes_read=sum(reads.values()),
            bytes_written=sum(spec.nbytes for spec in (*self.plan.outputs, *self.plan.asides)),
            steps=tuple(PlannedStep(*row) for row in self.plan.rows()),
            notes=self.plan.notes,
        )

    def close(self) -> None:
        """Closes the files of a job that will not be run."""
        self.files.close()

    def __enter__(self) -> Job[R]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True)
class Done:
    """The results of a run, before its output appears under its final name.

    Attributes:
        plan: the plan that was run.
        outcomes: one for each step, in the plan's order.
        writer: the output; files can still be attached and metadata can still change. None if nothing is written.
        aside: the second output, if there is one.
    """

    plan: Plan
    outcomes: tuple[Outcome, ...]
    writer: CheckpointWriter | None
    aside: TensorWriter | None


Finish = Callable[[Done], Callable[[Header], R]]


def step_by_step(
    plan: Plan,
    *,
    files: OpenFiles,
    watch: Stopwatch,
    inputs: Iterable[str | Path],
    finish: Finish[R],
    destination: Destination | None = None,
    writers: Callable[[Plan], Writers] | None = None,
    beside: Iterable[str | Path] = (),
    around: AbstractContextManager[object] | None = None,
    replan: Callable[[Resources], Plan] | None = None,
    resources: Resources | None = None,
) -> Job[R]:
    """A job that runs a plan's steps on the engine.

    Args:
        plan: the steps; with `replan`, a plan whose outputs have their largest possible size.
        files: the open input files.
        watch: started when the verb was called.
        inputs: paths that are read.
        finish: called after all steps, before the output appears. It completes metadata and config, raises errors that
            only the weights reveal, and returns a function that makes the report once the output exists.
        destination: the output; None if nothing is written.
        writers: opens the output and the file for the steps' asides; by default only the destination is opened.
        beside: other paths that are written.
        around: the context that writes these; entered before the output is opened, left after the output exists.
        replan: makes the final plan from measurements, such as the ranks that fit a budget.
        resources: workers, memory and device; by default all cores, 512 MiB and the CPU.

    Raises:
        Unsupported: this machine does not have the device.
        OutputExists, FormatError, WriteFailed: as for `Destination.check`.
    """
    output = None if destination is None else destination.path
    chosen = resources or Resources()
    chosen.torch_device()
    if destination is not None:
        destination.check(sum(spec.nbytes for spec in plan.outputs) if not plan.shrinks else 0)

    @contextlib.contextmanager
    def opened(made: Plan) -> Iterator[tuple[CheckpointWriter | None, TensorWriter | None]]:
        if destination is None:
            yield None, None
            return
        with create_checkpoint(destination, made.outputs, made.metadata, reserve=not made.shrinks) as writer:
            yield writer, None

    def work(resources: Resources) -> R:
        made = plan if replan is None else replan(resources)
        with around or contextlib.nullcontext(), (writers or opened)(made) as (writer, aside):
            outcomes = engine.run(made, writer, files, resources, aside) if made.steps else ()
            report = finish(Done(made, outcomes, writer, aside))
        return report(header(made, watch, output, outcomes))

    outputs = (*(() if output is None else (output,)), *map(Path, beside))
    return Job(plan, tuple(map(Path, inputs)), outputs, files, work, chosen)


def runs(prepare: Callable[P, Job[R]]) -> Callable[P, R]:
    """Makes a verb from the function that prepares it: same arguments and errors, but the job runs at once."""

    @functools.wraps(prepare)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return prepare(*args, **kwargs).run()

    run.__name__ = run.__qualname__ = prepare.__name__.removeprefix("prepare_")
    run.__doc__ = (prepare.__doc__ or "").replace(_PREPARES, "", 1)
    run.__signature__ = inspect.signature(prepare).replace(return_annotation="Report")  # type: ignore[attr-defined]
    return run


def header(plan: Plan, watch: Stopwatch, output: Path | None, outcomes: tuple[Outcome, ...] = ()) -> dict[str, Any]:
    """The fields of `Report`, which every report has."""
    return {
        "operation": plan.operation,
        "output": None if output is None else str(output),
        "seconds": watch.seconds,
        "peak_rss_bytes": peak_rss(),
        "ledger": ledger(outcomes),
        "notes": plan.notes,
    }
