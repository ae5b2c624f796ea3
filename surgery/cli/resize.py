"""`surgery resize`."""

from __future__ import annotations

from typing import Any

import click

from surgery.cli import options


@click.command("resize", epilog="Example: surgery resize --rank 8 adapter/ -o adapter-r8/")
@click.argument("adapter", type=options.PATH)
@options.rank_options
@options.base_option
@options.factor_dtype_option("their own")
@options.output_options
@options.dry_run_option
@options.engine_options
@options.json_option
def command(
    adapter: str,
    base: str | None,
    out: str,
    force: bool,
    dry_run: bool,
    jobs: int,
    memory: int,
    device: str,
    as_json: bool,
    **how: Any,
) -> None:
    """Give a LoRA adapter another rank: of all adapters of that rank the nearest, by the SVD of its own ΔW.

    The scaling goes into the factors, so that alpha is the rank; whatever else the adapter carries goes along.
    """
    from surgery.operations.extract.plan import Extraction
    from surgery.operations.lora import resize as operation

    how = options.chosen_ranks(how)
    with options.reporting("resize", as_json):
        if dry_run:
            asked = Extraction(**how)
            options.show_plan(operation.plan_resize(operation.open_resize(adapter, asked, base), asked))
            return
        with options.resources(jobs, memory, device) as resources:
            report = operation.resize(adapter, out, base=base, force=force, resources=resources, **how)
        if as_json:
            options.print_json(report)
            return
        options.show_recast(report)
        options.show_ending(report)
