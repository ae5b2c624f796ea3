"""`surgery combine`."""

from __future__ import annotations

from typing import Any

import click

from surgery.cli import options, printing, running


@running.verb("combine", epilog="Example: surgery combine style/:0.7 subject/:0.5 --how svd --rank 16 -o both/")
@click.argument("adapters", type=options.WeighedPath(), nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@click.option(
    "--how",
    type=click.Choice(["cat", "svd", "ties", "dare", "magnitude-prune"]),
    required=True,
    help="How to combine. cat concatenates the factors and is exact; svd truncates the same sum to a rank; the others "
    "prune each delta first.",
)
@options.rank_options
@click.option(
    "--density", type=float, help="Share of each delta's elements that ties, dare and magnitude-prune keep [0.5]."
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed for the elements that dare drops and for the randomised SVD.",
)
@options.base_option
@options.factor_dtype_option("their own; of cat float32 where theirs would round")
@options.output_options
def command(
    run: running.Run,
    adapters: tuple[tuple[str, float | None], ...],
    out: str,
    base: str | None,
    force: bool,
    **how: Any,
) -> None:
    """Combine LoRA adapters into one: ΔW = Σ weight · ΔW. Their order does not matter.

    cat needs no rank, since the ranks add up. Every other way needs one of the options that choose ranks.
    """
    from surgery.operations.lora.combine import Combination, prepare_combine

    how = options.chosen_ranks(how, needed=False)
    with options.usage_errors():
        Combination(**how).check()
    run.carry_out(
        lambda resources: prepare_combine(adapters, out, base=base, force=force, **how, resources=resources),
        printing.show_recast,
    )
