"""What the commands share: options, progress, errors, and how a report is printed. Nothing but click and printing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from formats.errors import ReportedError

if TYPE_CHECKING:
    from rich.table import Table

    from surgery.pipeline.engine import Resources
    from surgery.pipeline.job import Job, JobPlan
    from surgery.ranks import RankRule
    from surgery.report import Report

R = TypeVar("R", bound="Report")
D = TypeVar("D")
PATH = click.Path(path_type=str)


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


class ByteSize(click.ParamType[int]):
    """A number of bytes: `512MB`, `2GiB`, `1000000`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parses it, or fails as a usage error."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", str(value).strip().lower())
        if match is None:
            self.fail(f"{value!r} is not a size such as 512MB or 2GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


class WeighedPath(click.ParamType[tuple[str, float | None]]):
    """`PATH` or `PATH:WEIGHT`; a path that is there by its whole name is taken as it is."""

    name = "path[:weight]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float | None]:
        """Splits off the weight, if the last part is a number."""
        if isinstance(value, tuple):
            return value
        path, colon, weight = str(value).rpartition(":")
        if not colon or os.path.exists(value):
            return str(value), None
        try:
            return path, float(weight)
        except ValueError:
            return str(value), None


class Shape(click.ParamType[tuple[int, int]]):
    """Batch and sequence: `1x128`."""

    name = "BxS"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parses it, or fails as a usage error."""
        if isinstance(value, tuple):
            return value
        batch, _, sequence = str(value).partition("x")
        if not (batch.isdigit() and sequence.isdigit()):
            self.fail(f"{value!r} is not a shape such as 1x128", param, ctx)
        return int(batch), int(sequence)


class NamedPath(click.ParamType[tuple[str, str]]):
    """`PATH` or `NAME=PATH`; a path that is there by its whole name is taken as it is, and has no name."""

    name = "[name=]path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Splits off the name."""
        if isinstance(value, tuple):
            return value
        name, equals, path = str(value).partition("=")
        return (name, path) if equals and not os.path.exists(value) else ("", str(value))


def output_options(function: Callable[..., None]) -> Callable[..., None]:
    """-o and --force."""
    function = click.option("--force", is_flag=True, help="Replace what stands at the output.")(function)
    return click.option("-o", "--output", "out", type=PATH, required=True, help="Where to write.")(function)


def base_option(function: Callable[..., None]) -> Callable[..., None]:
    """--base, of commands that mostly need none."""
    text = "The adapters' base, where their factors do not tell what they adapt (experts, tokens)."
    return click.option("--base", type=PATH, help=text)(function)


def factor_dtype_option(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """--dtype of the factors; `default` says what they are without."""
    kinds = click.Choice(["float32", "float16", "bfloat16"])
    return click.option("--dtype", type=kinds, help=f"Of the factors; by default {default}.")


def max_shard_option(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """--max-shard-size; `default` says what shards there are without."""
    text = f"Shards of this size: 2GB [{default}]."
    return click.option("--max-shard-size", type=ByteSize(), metavar="SIZE", help=text)


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


class Slices(click.ParamType[tuple[bool, ...]]):
    """`1,0,1`: which slices of a fused layer are adapted."""

    name = "slices"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[bool, ...]:
        """Parses it, or fails as a usage error."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not set(parts) <= {"0", "1"} or "1" not in parts:
            self.fail(f"{value!r} is not a list of slices such as 1,0,1", param, ctx)
        return tuple(part == "1" for part in parts)


TOLD = ("alpha", "enable_lora", "fan_in_fan_out", "component")


def told_options(function: Callable[..., None]) -> Callable[..., None]:
    """What an adapter's file does not say; `told` reads them."""
    function = component_option(function)
    function = click.option(
        "--fan-in-fan-out", is_flag=True, help="loralib: square weights that nothing else tells of are (in, out)."
    )(function)
    function = click.option(
        "--enable-lora",
        type=Slices(),
        default=(),
        metavar="1,0,1",
        help="loralib: which slices of a fused layer are adapted, where shapes do not tell.",
    )(function)
    return click.option("--alpha", type=float, help="loralib: the lora_alpha, which its files do not hold.")(function)


def component_option(function: Callable[..., None]) -> Callable[..., None]:
    """--component."""
    return click.option(
        "--component",
        metavar="PART",
        help="Which part of a pipeline the base is: unet, transformer, text_encoder, text_encoder_2, text_encoder_3.",
    )(function)


def told(how: dict[str, Any]) -> dict[str, Any]:
    """Turns the options of `told_options` into the library's `told`."""
    from formats.adapter import Told

    said = Told(*(how.pop(name) for name in TOLD))
    return {**how, "told": said}


def merging_options(undo: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What merge and unmerge share: the adapters, --undo (with its help), and the options of every verb that writes."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for each in (told_options, output_options):
            function = each(function)
        function = click.option("--undo", type=PATH, metavar="FILE", help=undo)(function)
        return click.argument("adapters", type=WeighedPath(), nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")(
            function
        )

    return decorate


_RULES = (
    ("energy", "Smallest rank that holds this share of ‖ΔW‖², weight by weight."),
    ("residual", "Smallest rank whose relative error ‖ΔW − BA‖/‖ΔW‖ is at most this."),
    ("sv-ratio", "Keep singular values above the largest divided by this (kohya's 10, LyCORIS's 0.1)."),
    ("sv-threshold", "Keep singular values above this."),
    ("sv-quantile", "Smallest rank whose singular values add up to this share of the sum of all."),
)


def rank_options(function: Callable[..., None]) -> Callable[..., None]:
    """The ways to choose a rank; `chosen_ranks` reads them."""
    bounds = (("--max-rank", "Never more than this rank."), ("--min-rank", "Never less than this rank."))
    for name, text in bounds:
        function = click.option(name, type=int, help=text)(function)
    for name, text in reversed(_RULES):
        function = click.option(f"--{name}", type=float, help=text)(function)
    function = click.option("--budget", type=ByteSize(), help="The best ranks for an adapter of this size: 20MB.")(
        function
    )
    return click.option(
        "--rank",
        "ranks",
        multiple=True,
        metavar="N|PATTERN=N",
        help="Rank of the factors; with a pattern, of the weights it matches, whatever rules the others.",
    )(function)


def chosen_ranks(how: dict[str, Any], *, needed: bool = True) -> dict[str, Any]:
    """Turns the options of `rank_options` into the library's `rank` and `overrides`; a usage error where that fails.

    Where none is `needed`, none of them means no rank.
    """
    from surgery.model.patterns import rank_override
    from surgery.ranks import rank_rule
    from surgery.ranks.budget import Budget

    given = how.pop("ranks")
    plain = [text for text in given if text.lstrip("-").isdecimal()]
    rules = {name.replace("-", "_"): how.pop(name.replace("-", "_")) for name, _ in _RULES}
    bounds = {"minimum": how.pop("min_rank"), "maximum": how.pop("max_rank")}
    budget = how.pop("budget")
    if not needed and not given and all(each is None for each in (budget, *rules.values(), *bounds.values())):
        return {**how, "rank": None, "overrides": {}}
    if budget is not None and (plain or any(value is not None for value in rules.values())):
        raise click.UsageError("--budget chooses the ranks: no other rule goes with it, but for --rank PATTERN=N")
    rank: Budget | RankRule
    with usage_errors():
        overrides = dict(rank_override(text) for text in given if text not in plain)
        if budget is not None:
            rank = Budget(budget, bounds["minimum"] or 1, bounds["maximum"])
        else:
            rank = rank_rule(rank=int(plain[-1]) if plain else None, **bounds, **rules)
    return {**how, "rank": rank, "overrides": overrides}


def choice_options(function: Callable[..., None]) -> Callable[..., None]:
    """Which tensors of a pair are looked at; `chosen_tensors` reads them."""
    function = click.option(
        "--kind", "kinds", multiple=True, metavar="PATTERN=KIND", help="What a weight is, where that is not certain."
    )(function)
    for name, text in (
        ("exclude", "Leave behind the tensors it matches."),
        ("include", "Only the tensors it matches."),
    ):
        function = click.option(f"--{name}", multiple=True, metavar="PATTERN", help=text)(function)
    return function


def chosen_tensors(how: dict[str, Any]) -> dict[str, Any]:
    """Turns the options of `choice_options` into the library's arguments."""
    kinds = {}
    for text in how.pop("kinds"):
        pattern, separator, kind = text.rpartition("=")
        if not separator or not pattern:
            raise click.UsageError(f"--kind takes PATTERN=KIND, not {text!r}")
        kinds[pattern] = kind
    return {**how, "kinds": kinds}


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns what the library says of an argument by itself, whatever the files, into a usage error."""
    try:
        yield
    except ReportedError as error:
        raise click.UsageError(str(error)) from error


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


def print_json(report: Any) -> None:
    """A report as one JSON document."""
    click.echo(json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False, default=str))


def table(*columns: str) -> Table:
    """A table in the house's style: the first column is text, the others are numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return made


def facts(title: str, pairs: Iterable[tuple[str, str]]) -> Table:
    """A table of names and values."""
    from rich import box
    from rich.table import Table

    made = Table(title, "", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, value in pairs:
        made.add_row(name, value)
    return made


def show(*parts: Any) -> None:
    """Prints to stdout, as wide as the terminal, or 120 columns where there is none."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=False)
    for part in parts:
        console.print(part)


def show_plan(plan: JobPlan) -> None:
    """--dry-run: the plan, a row a step."""
    rows = table("op", "step", "reads", "writes")
    for step in plan.steps:
        rows.add_row(step.op, step.name, step.reads, step.writes)
    show(rows)
    show_plan_ending(plan)


def show_plan_ending(plan: JobPlan) -> None:
    """The last lines of every plan: notes, and how much is to be done."""
    show(
        *(f"note: {note}" for note in plan.notes),
        f"{len(plan.steps)} steps, {plan.bytes_read:,} bytes to read, {plan.bytes_written:,} to write; nothing written",
    )


def show_recast(report: Any) -> None:
    """The report of resize and combine: every weight's new factors, and the sizes."""
    rows = table("weight", "shape", "rank", "energy", "residual")
    for module in report.modules:
        ranks = f"{' + '.join(map(str, module.ranks))} → {module.rank}"
        shape = " × ".join(map(str, module.shape))
        rows.add_row(module.name, shape, ranks, f"{module.energy:.2%}", f"{module.residual:.4f}")
    rows.add_section()
    rows.add_row("all", "", "", f"{report.energy:.2%}", f"{report.residual:.4f}")
    show(rows, f"{report.nbytes_before:,} bytes before, {report.nbytes:,} after")
    show_ending(report)


def show_ending(report: Any) -> None:
    """The last lines of every report: notes, ledger, where and how long."""
    fates = ", ".join(f"{count} {fate.replace('_', '-')}" for fate, count in report.ledger.items() if count)
    show(*(f"note: {note}" for note in report.notes), f"tensors: {fates}")
    show(f"{report.output}  ({report.seconds:.2f} s, peak {report.peak_rss_bytes / 1e6:.0f} MB)")
