"""`surgery diff`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from surgery.cli import options, printing, running

if TYPE_CHECKING:
    from surgery.operations.look.diff import DiffReport


@running.verb("diff", writes=False, epilog="Example: surgery diff base/ tuned/")
@click.argument("base", type=options.PATH)
@click.argument("tuned", type=options.PATH)
@click.option("--headers", is_flag=True, help="Compare names, shapes and dtypes only; do not read any weights.")
def command(run: running.Run, base: str, tuned: str, headers: bool) -> None:
    """Show which tensors differ between BASE and TUNED, and by how much."""
    from surgery.operations.look.diff import prepare_diff

    run.carry_out(lambda resources: prepare_diff(base, tuned, headers_only=headers, resources=resources), _show)


def _show(report: DiffReport) -> None:
    rows = printing.table("tensor", "change", "‖Δ‖/‖base‖", "max |Δ|", "base", "tuned")
    for change in report.changes:
        measured = ["" if figure is None else f"{figure:.3g}" for figure in (change.relative, change.largest)]
        rows.add_row(change.name, change.how, *measured, change.before or "–", change.after or "–")
    printing.show(*(f"note: {note}" for note in report.notes))
    printing.show(rows, f"{len(report.changes)} tensors differ, {report.ledger['identical']} are identical")
