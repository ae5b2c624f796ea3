"""What the commands share that time graphs: their options, and a line of progress. Nothing but click and printing."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from surgery.cli import options, running

if TYPE_CHECKING:
    from surgery.pipeline.job import Job
    from surgery.report import Report

R = TypeVar("R", bound="Report")


def measuring_options(seconds: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What commands that time graphs share; `seconds` says what --seconds is for."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for each in (
            click.option(
                "--seed", type=int, default=0, show_default=True, help="Seed for inputs, order of runs and bootstrap."
            ),
            click.option("--threads", type=click.IntRange(min=1), help="Threads per session [ONNX Runtime's default]."),
            click.option("--seconds", type=float, default=60.0, show_default=True, help=seconds),
            click.option(
                "--margin",
                type=float,
                default=0.01,
                show_default=True,
                help="Relative difference in latency that does not matter: 0.01 is 1 %.",
            ),
            click.option(
                "--provider",
                default="cpu",
                show_default=True,
                help="Execution provider: cpu, cuda, tensorrt … The command fails if it does not really run the graph.",
            ),
            click.option(
                "--shape",
                "shapes",
                type=options.Shape(),
                multiple=True,
                default=("1x128",),
                help="Batch and sequence length to time [1x128]; repeatable.",
            ),
        ):
            function = each(function)
        return function

    return decorate


def record_options(picture: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """--record, --report, --force and --replay; `picture` says what --report draws."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for each in (
            click.option(
                "--replay",
                type=options.PATH,
                metavar="FILE",
                help="Print (and draw) a saved record; nothing is measured.",
            ),
            click.option("--force", is_flag=True, help="Overwrite the record and report files if they exist."),
            click.option("--report", "picture", type=options.PATH, metavar="FILE", help=picture),
            click.option(
                "--record", type=options.PATH, metavar="FILE", help="Save the report with every measured block as JSON."
            ),
        ):
            function = each(function)
        return function

    return decorate


def refuse_plan_of_replay(run: running.Run, replay: str | None) -> None:
    """Raises a usage error for --dry-run of what measures nothing."""
    if run.dry_run and replay is not None:
        raise click.UsageError("--replay prints a record and measures nothing: it has no plan for --dry-run to print")


def with_picture(job: Job[R], picture: str | None) -> Job[R]:
    """A job whose command also draws a picture of its report."""
    return job if picture is None else dataclasses.replace(job, outputs=(*job.outputs, Path(picture)))


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, float], None] | None]:
    """A line on stderr, if that is a terminal; written between sessions, since a bar that moves would be timed too."""
    if not sys.stderr.isatty():
        yield None
        return
    clear = "\r\033[K"
    try:
        yield lambda name, share: click.echo(f"{clear}{name}: {share:.0%}", nl=False, err=True)
    finally:
        click.echo(clear, nl=False, err=True)
