"""`surgery spectrum`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options, printing, running

if TYPE_CHECKING:
    from surgery.operations.extract.spectrum import SpectrumReport


@running.verb("spectrum", epilog="Example: surgery spectrum base.st tuned.st --report ranks.html")
@click.argument("base", type=options.PATH)
@click.argument("tuned", type=options.PATH)
@click.option(
    "--max-rank",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Highest rank to look at in each weight.",
)
@options.choice_options
@click.option("--exact", is_flag=True, help="Compute the full SVD instead of a randomised one.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Dtype that the factors would be stored in [each tuned weight's own].",
)
@click.option("--report", "out", type=options.PATH, help="Draw the curves into this .html or .svg file.")
@click.option("--force", is_flag=True, help="Overwrite the report file if it exists.")
def command(run: running.Run, base: str, tuned: str, out: str | None, **how: Any) -> None:
    """Show the error and the size of each rank for TUNED − BASE, before you extract.

    A PATTERN is a shell glob over whole tensor names, such as '*.self_attn.*', or a regular expression after `re:`.
    """
    from surgery.operations.extract.spectrum import prepare_spectrum

    how = options.chosen_tensors(how)
    run.carry_out(lambda resources: prepare_spectrum(base, tuned, out, **how, resources=resources), _show)


def _show(report: SpectrumReport) -> None:
    ranks = [point.rank for point in report.uniform if point.rank is not None][::-2][::-1]  # names need the room
    rows = printing.table("weight", "shape", *(f"r={rank}" for rank in ranks), "90 % of energy")
    for weight in report.weights:
        shape = " × ".join(map(str, weight.shape))
        needed = weight.needed(0.9)
        enough = f"r={needed}" if needed else f"r>{len(weight.values)}"
        rows.add_row(weight.name, shape, *(f"{weight.residual(rank):.3f}" for rank in ranks), enough)
    totals = printing.table("rank", "size, MB", "residual", "energy", "same size, best ranks: residual", "energy")
    for point, best in zip(report.uniform, report.budget, strict=True):
        better = (f"{best.residual:.4f}{' or less' if best.limited else ''}", f"{best.energy:.2%}")
        size = f"{point.nbytes / 1e6:.2f}"
        totals.add_row(str(point.rank), size, f"{point.residual:.4f}", f"{point.energy:.2%}", *better)
    printing.show("residual ‖ΔW − BA‖/‖ΔW‖ of each weight", rows, "all weights", totals)
    printing.show(*(f"note: {note}" for note in report.notes))
    printing.show(f"{report.output or 'nothing written'}  ({report.seconds:.2f} s)")
