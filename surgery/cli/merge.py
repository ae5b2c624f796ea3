"""`surgery merge`."""

from __future__ import annotations

from typing import Any

import click

from surgery.cli import options


@click.command("merge", epilog="Example: surgery merge base/ adapter/ style/:0.5 -o merged/")
@click.argument("base", type=options.PATH)
@options.merging_options(undo="Also write what unmerge needs to give BASE back bit for bit.")
@click.option("--weight", type=float, default=1.0, show_default=True, help="A factor of every delta.")
@click.option("--untie", is_flag=True, help="Give a head that BASE ties to its embedding a tensor of its own.")
@click.option(
    "--max-shard-size", type=options.ByteSize(), metavar="SIZE", help="Shards of this size: 2GB [the base's shards]."
)
def command(
    base: str,
    adapters: tuple[tuple[str, float | None], ...],
    out: str,
    dry_run: bool,
    jobs: int,
    memory: int,
    device: str,
    as_json: bool,
    **how: Any,
) -> None:
    """Merge adapters into BASE: W = W0 + ΣΔW, each weight rounded once, whatever their order."""
    from formats.paths import open_checkpoint
    from surgery.operations import merge as operation
    from surgery.operations.adapters import open_for_merge

    how = options.told(how)
    with options.reporting("merge", as_json):
        if dry_run:
            with open_checkpoint(base) as w0:
                planned = open_for_merge(base, adapters, w0.specs, how["weight"], how["told"], untie=how["untie"])
                options.show_plan(operation.plan_merge(w0, *planned, undo=how["undo"] is not None)[0])
            return
        with options.resources(jobs, memory, device) as resources:
            report = operation.merge(base, adapters, out, **how, resources=resources)
        if as_json:
            options.print_json(report)
            return
        parts = ["base " + report.base_digest[:16], *(f"adapter {digest[:16]}" for digest in report.adapters)]
        options.show(f"digest {report.digest}  ({', '.join(parts)})")
        if report.undo is not None:
            share = f"{report.undo.share:.2%} of the tensors that changed"
            options.show(f"undo file {report.undo.path}: {report.undo.nbytes:,} bytes, {share}")
        options.show_ending(report)
