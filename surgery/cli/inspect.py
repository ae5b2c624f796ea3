"""`surgery inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from surgery.cli import options, printing, running

if TYPE_CHECKING:
    from surgery.operations.look.inspect import InspectReport


@running.verb("inspect", writes=False, computes=False, epilog="Example: surgery inspect adapter/ --tensors")
@click.argument("path", type=options.PATH)
@click.option("--tensors", is_flag=True, help="List every tensor with its dtype and shape.")
def command(run: running.Run, path: str, tensors: bool) -> None:
    """Show what a file or folder contains, from headers alone."""
    from surgery.operations.look.inspect import inspect

    with running.reporting("inspect", run.as_json):
        run.present(inspect(path), lambda report: _show(report, tensors))


def _show(report: InspectReport, tensors: bool) -> None:
    known = {
        "container": report.container,
        "tensors": f"{len(report.tensors)}",
        "parameters": f"{report.parameters:,}",
        "bytes": f"{report.nbytes:,}",
        **{f"  {dtype}": f"{count:,}" for dtype, count in report.dtypes.items()},
        **{name: value for name, value in (report.adapter or {}).items() if value is not None},
        **report.metadata,
        **{f"merged adapter {index}": digest[:16] for index, digest in enumerate(report.merged, 1)},
    }
    printing.show(printing.facts(report.kind, ((name, str(value)) for name, value in known.items())))
    printing.show(*(f"note: {note}" for note in report.notes))
    if tensors:
        listing = printing.table("tensor", "dtype", "shape")
        for spec in report.tensors:
            listing.add_row(spec.name, str(spec.dtype), " × ".join(map(str, spec.shape)))
        printing.show(listing)
