"""`surgery unmerge`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options, printing, running

if TYPE_CHECKING:
    from surgery.operations.merge.unmerge import UnmergeReport

_SHOWN = 3  # names of a list


@running.verb("unmerge", epilog="Example: surgery unmerge merged/ adapter/ -o base-again/")
@click.argument("merged", type=options.PATH)
@options.merging_options(undo="Undo file that merge --undo wrote; it restores the base bit for bit.")
@click.option("--weight", type=float, help="Factor for every adapter's weight [the receipt's, or 1].")
def command(
    run: running.Run, merged: str, adapters: tuple[tuple[str, float | None], ...], out: str, **how: Any
) -> None:
    """Subtract the adapters of the last merge from MERGED: W0 = W − ΣΔW."""
    from surgery.operations.merge.unmerge import prepare_unmerge

    how = options.told(how)
    run.carry_out(lambda resources: prepare_unmerge(merged, adapters, out, **how, resources=resources), _show)


def _show(report: UnmergeReport) -> None:
    printing.show(f"digest {report.digest}", *_verdict(report))
    printing.show_ending(report)


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
