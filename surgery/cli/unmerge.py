"""`surgery unmerge`."""

from __future__ import annotations

from typing import Any

import click

from surgery.cli import options


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
    from surgery.operations import unmerge as operation
    from surgery.operations.adapters import open_adapters
    from surgery.provenance import Receipt
    from surgery.undo import open_undo

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
        off = f"{len(report.differing)} tensors differ from the base by rounding: {', '.join(report.differing[:3])}"
        verdict = {
            True: "the base came back bit for bit",
            False: off,
            None: "no receipt: whether the base came back bit for bit is not known",
        }[report.bit_exact]
        options.show(f"digest {report.digest}", verdict)
        options.show_ending(report)
