"""`surgery bench`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import measuring, options, printing, running

if TYPE_CHECKING:
    from surgery.onnx.timing.record import BenchReport


@running.verb(
    "bench",
    computes=False,
    epilog="Example: surgery bench base-onnx/model.onnx merged-onnx/model.onnx --expect equivalent",
)
@click.argument("graphs", type=options.PATH, nargs=-1, metavar="REFERENCE GRAPH...")
@measuring.measuring_options("Most seconds per graph and shape; timing stops earlier once the verdict is clear.")
@click.option(
    "--cuda-graph", is_flag=True, help="With --provider cuda: capture a run as a CUDA graph and time its replay."
)
@click.option(
    "--positive-control",
    type=options.PATH,
    metavar="GRAPH",
    help="Graph that must be found slower; if it is not, no verdict is given.",
)
@click.option(
    "--expect",
    type=click.Choice(["equivalent", "faster", "slower"]),
    help="Exit with 3 if a verdict differs from this one, with 4 if it is inconclusive.",
)
@measuring.record_options(
    "Draw the results: .html is a page with verdicts, every block and the record, .svg the ratios alone."
)
def command(
    run: running.Run,
    graphs: tuple[str, ...],
    expect: str | None,
    replay: str | None,
    picture: str | None,
    force: bool,
    **how: Any,
) -> None:
    """Measure the latency of graphs against REFERENCE.

    Runs are interleaved in paired blocks; the result is a ratio with an interval, and a verdict against --margin.

    For graphs with a cache, the sequence length is the number of cached tokens, and a run computes one more token.
    """
    from surgery.onnx.timing.record import read_record
    from surgery.operations.latency.bench import prepare_bench
    from surgery.report_files import LATENCY_FORMS, PictureFile

    if replay is not None and graphs:
        raise click.UsageError("--replay prints a record: it takes no graphs")
    if replay is None and len(graphs) < 2:
        raise click.UsageError("bench takes a reference and at least one graph to compare with it")
    measuring.refuse_plan_of_replay(run, replay)
    inputs = graphs if replay is None else (replay,)
    with running.reporting("bench", run.as_json), PictureFile(picture, LATENCY_FORMS, inputs, force=force) as drawn:
        if replay is not None:
            report = read_record(replay)
            run.present(report, _show)
        else:
            measured = run.carry_out(
                lambda progress: measuring.with_picture(
                    prepare_bench(*graphs, force=force, **how, progress=progress), picture
                ),
                _show,
                given=measuring.progress(),
            )
            if measured is None:
                return
            report = measured
        drawn.draw(report)
    if picture is not None and not run.as_json:
        printing.show(f"report: {picture}")
    if expect is not None:
        _check(report, expect)


def _show(report: BenchReport) -> None:
    """The table, and below it each verdict with its reason."""
    title = f"{report.provider}{', CUDA graph' if report.cuda_graph else ''}"
    rows = printing.table(title, "shape", "reference, ms", "ms", "tokens/s", "ratio", "interval", "reference to itself")
    for each in report.comparisons:
        low, high = each.interval
        first, last = each.control_interval
        rows.add_row(
            each.graph,
            f"{each.shape[0]}×{each.shape[1]}",
            f"{1e3 * each.latency_reference:.3f}",
            f"{1e3 * each.latency:.3f}",
            "" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}",
            f"{each.ratio:.4f}",
            f"{low:.4f} – {high:.4f}",
            f"{first:.4f} – {last:.4f}",
        )
    printing.show(f"reference: {report.reference}", rows)
    for graph, same in report.same_graph.items():
        printing.show(f"{graph}: the graph is {'the reference’s, byte for byte' if same else 'not the reference’s'}")
    blocks = sum(len(epoch.log_ratios) for each in report.comparisons for epoch in each.epochs)
    epochs = sum(len(each.epochs) for each in report.comparisons)
    printing.show(f"{blocks} blocks on {epochs} sets of sessions in {report.seconds:.0f} s, begun {report.started}")
    for each in report.comparisons:
        if each.device_bytes is not None and each.device_bytes_reference is not None:
            ours, theirs = each.device_bytes / 1e6, each.device_bytes_reference / 1e6
            place = f"{each.graph} at {each.shape[0]}×{each.shape[1]}"
            printing.show(f"{place}: a session takes {ours:,.0f} MB of memory, one of the reference {theirs:,.0f} MB")
    for each in report.comparisons:
        role = " (positive control)" if each.role == "positive control" else ""
        place = f"{each.graph}{role} at {each.shape[0]}×{each.shape[1]}"
        printing.show(f"{place}: {each.verdict} at a margin of {report.margin:.1%} ({each.reason})")
    if report.output is not None:
        printing.show(f"record: {report.output}")


def _check(report: BenchReport, expected: str) -> None:
    """Ends with 3 if a candidate's verdict is another one, else with 4 if one is inconclusive."""
    others = {each.verdict for each in report.comparisons if each.role == "candidate"} - {expected}
    if others:
        sys.exit(4 if others == {"inconclusive"} else 3)
