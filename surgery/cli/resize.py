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
    """Give a LoRA adapter another rank: of all adapters of that rank the nearest, by the SVD of its own ΔW.

    The scaling goes into the factors, so that alpha is the rank; whatever else the adapter carries goes along.
    """
    from surgery.operations.lora.resize import prepare_resize

    how = options.chosen_ranks(how)
    run.carry_out(lambda resources: prepare_resize(adapter, out, **how, resources=resources), printing.show_recast)
