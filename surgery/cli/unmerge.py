"""`surgery unmerge`."""

from __future__ import annotations

import click

from surgery.cli import options


@click.command("unmerge", epilog="Example: surgery unmerge merged/ adapter/ -o base-again/")
@click.argument("merged", type=options.PATH)
@click.argument("adapter", type=options.PATH)
@click.option("--weight", type=float, help="The factor it was merged with [the receipt's, or 1].")
@options.output_options
@options.dry_run_option
@options.engine_options
@options.json_option
def command(
    merged: str,
    adapter: str,
    weight: float | None,
    out: str,
    force: bool,
    dry_run: bool,
    jobs: int,
    memory: int,
    as_json: bool,
) -> None:
    """Take ADAPTER off MERGED again: W0 = W − ΔW."""
    from formats.dialects import open_adapter
    from formats.paths import open_checkpoint
    from surgery.operations import unmerge as operation
    from surgery.provenance import Receipt

    with options.reporting("unmerge", as_json):
        if dry_run:
            with open_checkpoint(merged) as w:
                receipt = Receipt.read(w.metadata, merged)
                delta = open_adapter(adapter, w.specs)
                options.show_plan(operation.plan_unmerge(w, delta, receipt, weight=weight))
            return
        with options.resources(jobs, memory) as resources:
            report = operation.unmerge(merged, adapter, out, weight=weight, force=force, resources=resources)
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
