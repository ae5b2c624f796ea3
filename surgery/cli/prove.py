"""`surgery prove`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from surgery.cli import options, printing, running

if TYPE_CHECKING:
    from surgery.operations.look.prove import ProveReport

_LEVELS = {
    "bytes": "the same program: the two files are identical, byte for byte",
    "graph": "the same program: identical but for names, order and numbers",
    "": "not the same program",
}


@running.verb(
    "prove",
    writes=False,
    computes=False,
    epilog="Example: surgery prove base-onnx/model.onnx merged-onnx/model.onnx --provider cuda",
)
@click.argument("base", type=options.PATH)
@click.argument("merged", type=options.PATH)
@click.option(
    "--provider",
    default="cpu",
    show_default=True,
    help="Execution provider: cpu, cuda, tensorrt … The command fails if it does not load.",
)
@click.option(
    "--shape",
    type=options.Shape(),
    default="1x128",
    show_default=True,
    help="Batch and sequence length to count costs at.",
)
def command(run: running.Run, base: str, merged: str, provider: str, shape: tuple[int, int]) -> None:
    """Check that MERGED.onnx is the same program as BASE.onnx, with other weights and nothing added.

    Exits with 0 if it is, with 3 if not, and shows the differences.

    It compares the bytes, the graphs, the graphs after the runtime's optimisation, and which provider runs each node.
    """
    from surgery.operations.look.prove import prepare_prove

    report = run.carry_out(
        lambda _: prepare_prove(base, merged, provider=provider, shape=shape), _show, given=nullcontext()
    )
    if report is not None and not report.same:
        sys.exit(3)


def _show(report: ProveReport) -> None:
    rows = printing.table(f"{report.provider}, {report.shape[0]}×{report.shape[1]}", "base", "merged")
    rows.add_row("nodes", str(report.nodes_a[0]), str(report.nodes_b[0]))
    rows.add_row("nodes after optimisation", str(report.nodes_a[1]), str(report.nodes_b[1]))
    costs = (report.cost_a, report.cost_b)
    rows.add_row("floating-point operations", *(f"{each.flops:,}" for each in costs))
    rows.add_row("bytes moved", *(f"{each.nbytes:,}" for each in costs))
    if any(each.uncounted for each in costs):
        rows.add_row("nodes not counted", *(str(len(each.uncounted)) for each in costs))
    printing.show(rows, *(f"note: {note}" for note in report.notes))
    said = (f"{check.name}: {'the same' if check.same else 'differ'}" for check in report.checks)
    printing.show("; ".join(said), _LEVELS[report.level])
    check = report.difference
    if check is not None and check.difference is not None:
        found = check.difference
        click.echo(f"first difference, {check.name}: {found.what}")  # as it is: names may look like markup
        click.echo(f"  base:   {found.a}\n  merged: {found.b}")
