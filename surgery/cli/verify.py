"""`surgery verify`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options, printing, running

if TYPE_CHECKING:
    from surgery.operations.merge.verify import VerifyReport

_SHOWN = 5  # tensors that are named


@running.verb(
    "verify",
    writes=False,
    epilog="Example: surgery verify merged/ --base base/ --adapter adapter/ --adapter style/:0.5",
)
@click.argument("merged", type=options.PATH)
@click.option("--base", type=options.PATH, required=True, help="Base that the adapters were merged into.")
@click.option(
    "--adapter",
    "adapters",
    type=options.WeighedPath(),
    multiple=True,
    required=True,
    metavar="PATH[:WEIGHT]",
    help="Adapter that was merged; repeat for each one.",
)
@click.option(
    "--weight", type=float, default=1.0, show_default=True, help="Factor for every delta, on top of each adapter's own."
)
@options.told_options
def command(
    run: running.Run,
    merged: str,
    base: str,
    adapters: tuple[tuple[str, float | None], ...],
    **how: Any,
) -> None:
    """Check that MERGED is exactly BASE with these adapters merged in.

    Exits with 0 if it is, with 3 if not.
    """
    from surgery.operations.merge.verify import prepare_verify

    how = options.told(how)
    report = run.carry_out(lambda resources: prepare_verify(merged, base, adapters, **how, resources=resources), _show)
    if report is not None and not report.agrees:
        sys.exit(3)


def _show(report: VerifyReport) -> None:
    counts = ", ".join(f"{count} {kind}" for kind, count in report.ledger.items() if count)
    printing.show(f"{report.merged}: {report.verdict}", f"tensors: {counts}")
    for name in report.differing[:_SHOWN]:
        printing.show(f"  {name} differs")
    if len(report.differing) > _SHOWN:
        printing.show(f"  and {len(report.differing) - _SHOWN} more")
