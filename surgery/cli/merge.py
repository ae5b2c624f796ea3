"""`surgery merge`."""

from __future__ import annotations

import click

from surgery.cli import options


@click.command("merge", epilog="Example: surgery merge base/ adapter/ style/:0.5 -o merged/")
@click.argument("base", type=options.PATH)
@click.argument("adapters", type=options.WeighedPath(), nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@click.option("--weight", type=float, default=1.0, show_default=True, help="A factor of every delta.")
@click.option(
    "--undo", type=options.PATH, metavar="FILE", help="Also write what unmerge needs to give BASE back bit for bit."
)
@options.output_options
@options.dry_run_option
@options.engine_options
@options.json_option
def command(
    base: str,
    adapters: tuple[tuple[str, float | None], ...],
    weight: float,
    undo: str | None,
    out: str,
    force: bool,
    dry_run: bool,
    jobs: int,
    memory: int,
    as_json: bool,
) -> None:
    """Merge adapters into BASE: W = W0 + ΣΔW, each weight rounded once, whatever their order."""
    from formats.paths import open_checkpoint
    from surgery.operations import merge as operation
    from surgery.operations.adapters import open_adapters

    with options.reporting("merge", as_json):
        if dry_run:
            with open_checkpoint(base) as w0:
                options.show_plan(
                    operation.plan_merge(w0, open_adapters(base, adapters, w0.specs, weight), undo=undo is not None)[0]
                )
            return
        with options.resources(jobs, memory) as resources:
            report = operation.merge(base, adapters, out, weight=weight, undo=undo, force=force, resources=resources)
        if as_json:
            options.print_json(report)
            return
        parts = ", ".join(
            ["base " + report.base_digest[:16], *(f"adapter {digest[:16]}" for digest in report.adapters)]
        )
        options.show(f"digest {report.digest}  ({parts})")
        if report.undo is not None:
            share = f"{report.undo.share:.2%} of the tensors that changed"
            options.show(f"undo file {report.undo.path}: {report.undo.nbytes:,} bytes, {share}")
        options.show_ending(report)
