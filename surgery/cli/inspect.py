"""`surgery inspect`."""

from __future__ import annotations

import click

from surgery.cli import options


@click.command("inspect", epilog="Example: surgery inspect adapter/ --tensors")
@click.argument("path", type=options.PATH)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@options.json_option
def command(path: str, tensors: bool, as_json: bool) -> None:
    """Tell what is in PATH, from headers alone."""
    from surgery.operations.inspect import inspect

    with options.reporting("inspect", as_json):
        report = inspect(path)
        if as_json:
            options.print_json(report)
            return
        rows = options.table(f"{report.kind}", "")
        rows.add_row("container", report.container)
        rows.add_row("tensors", f"{len(report.tensors)}")
        rows.add_row("parameters", f"{report.parameters:,}")
        rows.add_row("bytes", f"{report.nbytes:,}")
        for dtype, count in report.dtypes.items():
            rows.add_row(f"  {dtype}", f"{count:,}")
        for key, text in {**(report.adapter or {}), **report.metadata}.items():
            rows.add_row(key, str(text))
        for digest in report.merged:
            rows.add_row("merged adapter", digest[:16])
        options.show(rows)
        if tensors:
            listing = options.table("tensor", "dtype", "shape")
            for spec in report.tensors:
                listing.add_row(spec.name, str(spec.dtype), " × ".join(map(str, spec.shape)))
            options.show(listing)
