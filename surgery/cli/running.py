"""How verbs are carried out: the options that all have, their jobs run or their plans shown, progress and errors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from formats.errors import ReportedError
from surgery.cli.options import ByteSize
from surgery.cli.printing import print_json, show_plan

if TYPE_CHECKING:
    from surgery.pipeline.engine import Resources
    from surgery.pipeline.job import Job
    from surgery.report import Report

R = TypeVar("R", bound="Report")
D = TypeVar("D")


# click shows parameters in the reverse of this order, after a command's own.
_JSON = click.Option(["--json", "as_json"], is_flag=True, help="Print exactly one JSON document on stdout.")
_ENGINE = (
    click.Option(["--device"], default="cpu", show_default=True, help="Device to compute on: cpu, cuda, cuda:1 …"),
    click.Option(
        ["--memory"],
        type=ByteSize(),
        default="512MiB",
        show_default=True,
        help="Memory budget for the steps that run at once.",
    ),
    click.Option(["--jobs"], type=click.IntRange(min=0), default=0, help="Number of workers; 0 means one per core."),
)
_DRY_RUN = click.Option(["--dry-run"], is_flag=True, help="Print the plan and stop: read headers only, write nothing.")


@dataclasses.dataclass(frozen=True)
class Run:
    """How a command is carried out: the options that every verb has.

    Attributes:
        operation: the verb's name.
        as_json: whether stdout gets one JSON document.
        dry_run: whether to print the plan and stop.
        jobs, memory, device: of the engine.
    """

    operation: str
    as_json: bool = False
    dry_run: bool = False
    jobs: int = 0
    memory: int = 0
    device: str = "cpu"

    def carry_out(
        self,
        prepare: Callable[[Any], Job[R]],
        show: Callable[[R], None],
        show_summary: Callable[[Any], None] | None = None,
        given: AbstractContextManager[Any] | None = None,
    ) -> R | None:
        """Prepares a job and runs it, or prints its plan; prints what comes of it, errors too.

        Args:
            prepare: makes the job, which will use these resources.
            show: prints the report for people.
            show_summary: prints the plan for people; None for `show_plan`.
            given: what `prepare` is called with, open until the job is done, instead of the engine's resources.

        Returns:
            The report; None of a dry run.
        """
        with reporting(self.operation, self.as_json):
            with given or resources(self.jobs, self.memory, self.device) as allowed:
                job = prepare(allowed)
                if self.dry_run:
                    with job:
                        self.present(job.summary, show_summary or show_plan)
                    return None
                report = job.run()
            self.present(report, show)
            return report

    def present(self, document: D, show: Callable[[D], None]) -> None:
        """Prints a report or a plan: as JSON, or by `show` for people."""
        if self.as_json:
            print_json(document)
        else:
            show(document)


def verb(
    name: str, *, epilog: str, writes: bool = True, computes: bool = True
) -> Callable[[Callable[..., None]], click.Command]:
    """A command that carries out a job. Its function gets `run`, and the options of its own.

    Args:
        name: of the command.
        epilog: an example.
        writes: whether it writes something, so that --dry-run has a meaning.
        computes: whether it runs steps on the engine: --jobs, --memory and --device.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def command(**how: Any) -> None:
            shared = {field.name: how.pop(field.name) for field in dataclasses.fields(Run) if field.name in how}
            function(run=Run(name, **shared), **how)

        parameters = [_JSON, *(_ENGINE if computes else ()), *((_DRY_RUN,) if writes else ())]
        command.__click_params__ = [*parameters, *getattr(function, "__click_params__", ())]  # type: ignore[attr-defined]
        return click.command(name, epilog=epilog)(command)

    return decorate


@contextlib.contextmanager
def reporting(operation: str, as_json: bool) -> Iterator[None]:
    """Turns errors into one message on stderr (and, with --json, a document on stdout) and an exit code."""
    try:
        yield
    except ReportedError as error:
        said = {"what": error.what, **error.details}
        _fail(operation, type(error).__name__, said, str(error), as_json=as_json, code=error.exit_code)
    except OSError as error:
        said = {"what": error.strerror or str(error), "where": error.filename}
        text = f"{said['what']}\n  where:    {error.filename}"
        _fail(operation, type(error).__name__, said, text, as_json=as_json, code=1)


def _fail(operation: str, kind: str, said: dict[str, Any], text: str, *, as_json: bool, code: int) -> NoReturn:
    if as_json:
        document = {"operation": operation, "error": {"type": kind, **said}}
        click.echo(json.dumps(document, indent=2, default=str))
    click.echo(f"error: {text}", err=True)
    sys.exit(code)


@contextlib.contextmanager
def resources(jobs: int, memory: int, device: str) -> Iterator[Resources]:
    """The engine's resources, with a progress bar on stderr if that is a terminal."""
    from surgery.pipeline.engine import Resources

    if not sys.stderr.isatty():
        yield Resources(jobs, memory, device, processes=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def advance(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        yield Resources(jobs, memory, device, advance, processes=True)
