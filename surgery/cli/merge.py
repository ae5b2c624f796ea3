"""`surgery merge`."""

from __future__ import annotations

import click

from surgery.cli import options


@click.command("merge", epilog="Example: surgery merge base/ adapter/ -o merged/")
@click.argument("base", type=options.PATH)
@click.argument("adapter", type=options.PATH)
@click.option("--weight", type=float, default=1.0, show_default=True, help="A factor of the whole delta.")
@options.output_options
@options.dry_run_option
@options.engine_options
@options.json_option
def command(
    base: str,
    adapter: str,
    weight: float,
    out: str,
    force: bool,
    dry_run: bool,
    jobs: int,
    memory: int,
    as_json: bool,
) -> None:
    """Merge ADAPTER into BASE: W = W0 + ΔW, each weight rounded once."""
    from formats.dialects import open_adapter
    from formats.paths import open_checkpoint
    from surgery.operations import merge as operation

    with options.reporting("merge", as_json):
        if dry_run:
            with open_checkpoint(base) as w0:
                options.show_plan(operation.plan_merge(w0, open_adapter(adapter, w0.specs), weight=weight)[0])
            return
        with options.resources(jobs, memory) as resources:
            report = operation.merge(base, adapter, out, weight=weight, force=force, resources=resources)
        if as_json:
            options.print_json(report)
            return
        options.show(f"digest {report.digest}  (base {report.base_digest[:16]}, adapter {report.adapter[:16]})")
        options.show_ending(report)
