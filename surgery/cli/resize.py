"""`surgery resize`."""

from __future__ import annotations

from typing import Any

import click

from surgery.cli import options, printing, running


@running.verb("resize", epilog="Example: surgery resize --rank 8 adapter/ -o adapter-r8/")
@click.argument("adapter", type=options.PATH)
@options.rank_options
@options.base_option
@options.factor_dtype_option("their own")
@options.output_options
def command(run: running.Run, adapter: str, out: str, **how: Any) -> None:
    """Change the rank of a LoRA adapter: the best approximation of that rank, by the SVD of its ΔW.

    The scaling moves into the factors, so that alpha equals the rank. Everything else in the adapter is kept.
    """
    from surgery.operations.lora.resize import prepare_resize

    how = options.chosen_ranks(how)
    run.carry_out(lambda resources: prepare_resize(adapter, out, **how, resources=resources), printing.show_recast)
