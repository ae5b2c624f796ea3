"""`surgery verify`."""

from __future__ import annotations

import sys
from typing import Any

import click

from surgery.cli import options

_SHOWN = 5  # tensors that are named


@click.command("verify", epilog="Example: surgery verify merged/ --base base/ --adapter adapter/ --adapter style/:0.5")
@click.argument("merged", type=options.PATH)
@click.option("--base", type=options.PATH, required=True, help="What it was merged into.")
@click.option(
    "--adapter",
    "adapters",
    type=options.WeighedPath(),
    multiple=True,
    required=True,
    metavar="PATH[:WEIGHT]",
    help="What was merged; once for each adapter.",
)
@click.option("--weight", type=float, default=1.0, show_default=True, help="A factor of every delta.")
@options.told_options
@options.engine_options
@options.json_option
def command(
    merged: str,
    base: str,
    adapters: tuple[tuple[str, float | None], ...],
    weight: float,
    jobs: int,
    memory: int,
    device: str,
    as_json: bool,
    **how: Any,
) -> None:
    """Check that MERGED is exactly the merge of these adapters into the base: exit code 0, or 3 if not."""
    from surgery.operations.merge.verify import verify

    with options.reporting("verify", as_json):
        with options.resources(jobs, memory, device) as resources:
            report = verify(merged, base, adapters, weight=weight, **options.told(how), resources=resources)
        if as_json:
            options.print_json(report)
        else:
            counts = ", ".join(f"{count} {kind}" for kind, count in report.ledger.items() if count)
            options.show(f"{report.merged}: {report.verdict}", f"tensors: {counts}")
            for name in report.differing[:_SHOWN]:
                options.show(f"  {name} differs")
            if len(report.differing) > _SHOWN:
                options.show(f"  and {len(report.differing) - _SHOWN} more")
    if not report.agrees:
        sys.exit(3)
