"""How verbs are carried out: the options that all have, their jobs run or their plans shown, progress and errors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

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

        decorated: Callable[..., None] = json_option(command)
        for wanted, option in ((computes, engine_options), (writes, dry_run_option)):
            decorated = option(decorated) if wanted else decorated
        return click.command(name, epilog=epilog)(decorated)

    return decorate


def engine_options(function: Callable[..., None]) -> Callable[..., None]:
    """--jobs, --memory and --device."""
    function = click.option(
        "--device", default="cpu", show_default=True, help="Compute on this device: cpu, cuda, cuda:1 …"
    )(function)
    function = click.option(
        "--memory", type=ByteSize(), default="512MiB", show_default=True, help="Memory budget for running steps."
    )(function)
    return click.option("--jobs", type=click.IntRange(min=0), default=0, help="Workers; 0 means one for each core.")(
        function
    )


def json_option(function: Callable[..., None]) -> Callable[..., None]:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")(
        function
    )


def dry_run_option(function: Callable[..., None]) -> Callable[..., None]:
    """--dry-run."""
    return click.option("--dry-run", is_flag=True, help="Print the plan; read headers only and write nothing.")(
        function
    )


@contextlib.contextmanager
def reporting(operation: str, as_json: bool) -> Iterator[None]:
    """Turns errors into one message on stderr (and, with --json, a document on stdout) and an exit code."""
    try:
        yield
    except ReportedError as error:
        if as_json:
            said = {"type": type(error).__name__, "what": error.what, **error.details}
            click.echo(json.dumps({"operation": operation, "error": said}, indent=2))
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        click.echo(f"error: {error.strerror or error}\n  where:    {error.filename}", err=True)
        sys.exit(1)


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
