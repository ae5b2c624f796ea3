"""`surgery unmerge`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options

if TYPE_CHECKING:
    from surgery.operations.merge.unmerge import UnmergeReport

_SHOWN = 3  # names of a list


@click.command("unmerge", epilog="Example: surgery unmerge merged/ adapter/ -o base-again/")
@click.argument("merged", type=options.PATH)
@options.merging_options(undo="What merge --undo wrote: gives the base back bit for bit.")
@click.option("--weight", type=float, help="A factor of every weight [the receipt's, or 1].")
def command(
    merged: str,
    adapters: tuple[tuple[str, float | None], ...],
    out: str,
    dry_run: bool,
    jobs: int,
    memory: int,
    device: str,
    as_json: bool,
    **how: Any,
) -> None:
    """Take the adapters of its last merge off MERGED again: W0 = W − ΣΔW."""
    from formats.paths import open_checkpoint
    from surgery.operations.merge import unmerge as operation
    from surgery.operations.merge.adapters import open_adapters
    from surgery.receipts.receipt import Receipt
    from surgery.receipts.undo_file import open_undo

    how = options.told(how)
    with options.reporting("unmerge", as_json):
        if dry_run:
            with open_checkpoint(merged) as w, open_undo(how["undo"]) as corrections:
                receipt = Receipt.read(w.metadata, merged)
                opened = open_adapters(merged, adapters, w.specs, how["weight"], how["told"])
                options.show_plan(operation.plan_unmerge(w, opened, receipt, corrections))
            return
        with options.resources(jobs, memory, device) as resources:
            report = operation.unmerge(merged, adapters, out, **how, resources=resources)
        if as_json:
            options.print_json(report)
            return
        options.show(f"digest {report.digest}", *_verdict(report))
        options.show_ending(report)


def _verdict(report: UnmergeReport) -> Iterator[str]:
    """Whether the base came back, and if not what did and what would have helped."""
    if report.bit_exact is None:
        yield "no receipt: whether the base came back bit for bit is not known"
    elif report.bit_exact:
        yield "the base came back bit for bit"
    if report.differing:
        right, wrong = len(report.equal), len(report.differing)
        yield (
            f"{right} of {right + wrong} unmerged tensors equal the base bit for bit, {wrong} differ by rounding, "
            + (f"in {sum(report.differing.values()):,} elements at most: {_named(report.differing)}")
        )
        yield "hint: an undo file gives every bit back: merge --undo FILE, then unmerge --undo FILE"
    if report.changed:
        yield f"{len(report.changed)} tensors were changed since the merge: {_named(report.changed)}"


def _named(names: Iterable[str]) -> str:
    """The first few of them."""
    first = [*islice(names, _SHOWN + 1)]
    return ", ".join(first[:_SHOWN]) + (" …" if len(first) > _SHOWN else "")
