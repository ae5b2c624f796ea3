"""`surgery extract`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options, printing, running

if TYPE_CHECKING:
    from surgery.operations.extract.extract import ExtractReport


@running.verb("extract", epilog="Example: surgery extract --rank 8 base.st tuned.st -o adapter/")
@click.argument("base", type=options.PATH)
@click.argument("tuned", type=options.PATH)
@click.option("-o", "--output", "out", type=options.PATH, help="Output folder or .safetensors file [TUNED-lora-rN/].")
@options.rank_options
@options.choice_options
@click.option("--method", type=click.Choice(["lora", "dora"]), default="lora", show_default=True, help="Adapter type.")
@click.option(
    "--bias",
    type=click.Choice(["full", "lora"]),
    default="full",
    show_default=True,
    help="Store the biases of adapted layers in full, or their change with the factors (PEFT's lora_bias).",
)
@options.factor_dtype_option("each tuned weight's own")
@click.option("--exact", is_flag=True, help="Compute the full SVD instead of a randomised one: slow, for comparison.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed for the randomised SVD.")
@click.option(
    "--allow-removed", is_flag=True, help="Accept tensors that TUNED lacks; an adapter cannot remove them from BASE."
)
@click.option("--curve", type=options.PATH, help="Draw error and size against rank into this .html or .svg file.")
@click.option("--force", is_flag=True, help="Overwrite the output if it exists; inputs are never overwritten.")
def command(run: running.Run, base: str, tuned: str, out: str | None, **how: Any) -> None:
    """Extract TUNED − BASE as a PEFT adapter.

    Changed matrices become LoRA factors by truncated SVD; biases, norms and other changes are stored in full.

    A PATTERN is a shell glob over whole tensor names, such as '*.self_attn.*', or a regular expression after `re:`.
    """
    from surgery.operations.extract.extract import prepare_extract

    how = options.chosen_tensors(options.chosen_ranks(how))
    run.carry_out(lambda resources: prepare_extract(base, tuned, out, **how, resources=resources), _show)


def _show(report: ExtractReport) -> None:
    rows = printing.table("weight", "shape", "rank", "energy", "residual")
    for module in report.modules:
        shape = " × ".join(map(str, module.shape))
        rows.add_row(module.name, shape, str(module.rank), f"{module.energy:.2%}", f"{module.residual:.4f}")
    rows.add_section()
    rows.add_row("all", "", "", f"{report.energy:.2%}", f"{report.residual:.4f}")
    printing.show(rows)
    printing.show_ending(report)
