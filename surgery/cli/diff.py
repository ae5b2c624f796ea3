"""`surgery diff`."""

from __future__ import annotations

import click

from surgery.cli import options


@click.command("diff", epilog="Example: surgery diff base/ tuned/")
@click.argument("base", type=options.PATH)
@click.argument("tuned", type=options.PATH)
@click.option("--headers", is_flag=True, help="Names, shapes and dtypes only; reads no payload.")
@options.engine_options
@options.json_option
def command(base: str, tuned: str, headers: bool, jobs: int, memory: int, device: str, as_json: bool) -> None:
    """Tell what changed from BASE to TUNED, and by how much."""
    from surgery.operations.look.diff import diff

    with options.reporting("diff", as_json):
        with options.resources(jobs, memory, device) as resources:
            report = diff(base, tuned, headers_only=headers, resources=resources)
        if as_json:
            options.print_json(report)
            return
        rows = options.table("tensor", "change", "‖Δ‖/‖base‖", "max |Δ|", "base", "tuned")
        for change in report.changes:
            measured = ["" if figure is None else f"{figure:.3g}" for figure in (change.relative, change.largest)]
            rows.add_row(change.name, change.how, *measured, change.before or "–", change.after or "–")
        options.show(*(f"note: {note}" for note in report.notes))
        options.show(rows, f"{len(report.changes)} tensors differ, {report.ledger['identical']} are identical")
