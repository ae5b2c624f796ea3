"""`surgery inspect`."""

from __future__ import annotations

import click

from surgery.cli import options, printing, running


@click.command("inspect", epilog="Example: surgery inspect adapter/ --tensors")
@click.argument("path", type=options.PATH)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@running.json_option
def command(path: str, tensors: bool, as_json: bool) -> None:
    """Tell what is in PATH, from headers alone."""
    from surgery.operations.look.inspect import inspect

    with running.reporting("inspect", as_json):
        report = inspect(path)
        if as_json:
            printing.print_json(report)
            return
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
