"""How plans and reports are printed: one JSON document, or short tables for people."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

    from surgery.pipeline.job import JobPlan


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
