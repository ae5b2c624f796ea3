"""A verb, prepared: its plan, where it writes, and the work. Nothing has been written yet, and no weight been read.

`prepare_X(…) -> Job` opens the inputs, plans, and refuses whatever headers and paths tell; `job.run(resources)` carries
it out. So whatever a run would refuse before it reads the weights, looking at the plan refuses too: it is the same
code. Knows no verb.
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
_PREPARES = "Prepares a job that "  # how the docstrings of `prepare_X` begin; those of X go on from there
Writers = AbstractContextManager[tuple[CheckpointWriter | None, TensorWriter | None]]


@dataclass(frozen=True)
class PlannedStep:
    """One step of a plan, for people: what it does, what it is about, its inputs and outputs as "dtype shape"."""

    op: str
    name: str
    reads: str
    writes: str


@dataclass(frozen=True)
class JobPlan:
    """What a job is going to do.

    Attributes:
        operation: its name on the command line.
        inputs: paths that are read.
        outputs: paths that are written.
        bytes_read: payload of all input tensors, each counted once.
        bytes_written: payload of all outputs; an upper bound where ranks are chosen by what is measured.
        steps: the work, one a tensor or a layer.
        notes: what the user should know.
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
    """A verb, ready to run. Run it once, or close it: `with surgery.prepare_merge(…) as job: print(job.summary)`.

    Attributes:
        plan: its steps, with every input, output, shape and dtype.
        inputs, outputs: paths.
        files: what is open.
        work: does everything, and reports.
        resources: workers, memory and device.
    """

    plan: Plan
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    files: OpenFiles
    work: Callable[[Resources], R]
    resources: Resources

    def run(self, resources: Resources | None = None) -> R:
        """Carries the job out, and closes its files.

        Args:
            resources: workers, memory and device, instead of those that the job was prepared with.

        Raises:
            ReportedError: what only the weights tell; or what has changed on disk since the job was prepared.
        """
        if self.files.closed:
            raise SurgeryError(
                "this job has been run or closed already",
                where=self.plan.operation,
                then="prepare another one, with the same arguments",
            )
        with self:
            return self.work(resources or self.resources)

    @property
    def summary(self) -> JobPlan:
        """What the job is going to do, as plain data."""
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
        """Closes the files of a job that is not to be run."""
        self.files.close()

    def __enter__(self) -> Job[R]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True)
class Done:
    """What a run made of a plan, before its output appears under its name.

    Attributes:
        plan: what was run.
        outcomes: one for each step, in the plan's order.
        writer: the output, to which files can still be attached, and whose metadata can still change; None where
            nothing is written.
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
        plan: the steps; with `replan`, those with room for whatever it may come to.
        files: where the inputs are open.
        watch: runs since the verb was called.
        inputs: paths that are read.
        finish: called once all steps have run, before the output appears: completes its metadata and config, refuses
            what only the weights tell, and returns what makes the report, which is called when the output is there.
        destination: the output; None where nothing is written.
        writers: opens the output, and what takes the steps' asides, where that is more than the destination.
        beside: other paths that are written.
        around: what writes these: entered before the output is opened, left once that is there.
        replan: makes the plan from what it measures first, such as the ranks that a budget buys.
        resources: workers, memory and device; by default all cores, 512 MiB and the CPU.

    Raises:
        Unsupported: a device that this machine does not have.
        OutputExists, FormatError, WriteFailed: the destination, as `Destination.check`.
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
    """A verb out of the function that prepares it: the same arguments and errors, and the job is run at once."""

    @functools.wraps(prepare)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return prepare(*args, **kwargs).run()

    run.__name__ = run.__qualname__ = prepare.__name__.removeprefix("prepare_")
    run.__doc__ = (prepare.__doc__ or "").replace(_PREPARES, "", 1)
    run.__signature__ = inspect.signature(prepare).replace(return_annotation="Report")  # type: ignore[attr-defined]
    return run


def header(plan: Plan, watch: Stopwatch, output: Path | None, outcomes: tuple[Outcome, ...] = ()) -> dict[str, Any]:
    """What every report says first: the fields of `Report`."""
    return {
        "operation": plan.operation,
        "output": None if output is None else str(output),
        "seconds": watch.seconds,
        "peak_rss_bytes": peak_rss(),
        "ledger": ledger(outcomes),
        "notes": plan.notes,
    }
