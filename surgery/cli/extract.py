"""`surgery extract`."""

from __future__ import annotations

import click

from surgery.cli import options


@click.command("extract", epilog="Example: surgery extract --rank 8 base.st tuned.st -o adapter/")
@click.argument("base", type=options.PATH)
@click.argument("tuned", type=options.PATH)
@click.option("--rank", type=int, required=True, help="Rank of the factors; clamped to a matrix's smaller side.")
@click.option("-o", "--output", "out", type=options.PATH, help="Folder or .safetensors file [TUNED-lora-rN/].")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the factors; by default each tuned weight's own.",
)
@click.option("--allow-removed", is_flag=True, help="Leave tensors that tuned lacks as they are in base.")
@click.option("--force", is_flag=True, help="Replace what stands at the output.")
@options.dry_run_option
@options.engine_options
@options.json_option
def command(
    base: str,
    tuned: str,
    rank: int,
    out: str | None,
    dtype: str | None,
    allow_removed: bool,
    force: bool,
    dry_run: bool,
    jobs: int,
    memory: int,
    as_json: bool,
) -> None:
    """Extract TUNED − BASE as a PEFT LoRA of rank N, and the rest of the difference in full."""
    from formats.paths import open_checkpoint
    from surgery.operations import extract as operation

    with options.reporting("extract", as_json):
        if dry_run:
            with open_checkpoint(base) as before, open_checkpoint(tuned) as after:
                config = operation.model_config(base)
                options.show_plan(
                    operation.plan_extract(
                        before, after, rank=rank, dtype=dtype, allow_removed=allow_removed, config=config
                    )
                )
            return
        with options.resources(jobs, memory) as resources:
            report = operation.extract(
                base,
                tuned,
                out,
                rank=rank,
                dtype=dtype,
                allow_removed=allow_removed,
                force=force,
                resources=resources,
            )
        if as_json:
            options.print_json(report)
            return
        rows = options.table("weight", "shape", "rank", "energy", "residual")
        for module in report.modules:
            shape = " × ".join(map(str, module.shape))
            rows.add_row(module.name, shape, str(module.rank), f"{module.energy:.2%}", f"{module.residual:.4f}")
        rows.add_section()
        rows.add_row("all", "", "", f"{report.energy:.2%}", f"{report.residual:.4f}")
        options.show(rows)
        options.show_ending(report)
