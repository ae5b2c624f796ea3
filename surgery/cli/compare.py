"""`surgery compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from surgery.cli import measuring, options, printing, running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from surgery.onnx.timing.compared import AdapterGraph, ComparedAdapter, CompareReport
    from surgery.onnx.timing.record import Comparison


@running.verb(
    "compare",
    computes=False,
    epilog="Example: surgery compare bert/ --adapter lora/ --adapter houlsby=h1/ --report costs.html",
)
@click.argument("model", type=options.PATH, required=False)
@click.option(
    "--adapter",
    "adapters",
    type=options.NamedPath(),
    multiple=True,
    metavar="[NAME=]ADAPTER",
    help="Adapter of any kind that fold accepts; repeatable. NAME defaults to the folder's name.",
)
@click.option(
    "--branch/--no-branch",
    "branches",
    default=True,
    show_default=True,
    help="Also export each adapter left entirely in the graph, where fold would put part of it into weights.",
)
@measuring.measuring_options(
    "Most seconds per graph and shape; timing stops earlier once the verdict is clear. 0 times nothing."
)
@click.option(
    "-o", "--output", "out", type=options.PATH, metavar="DIR", help="Keep the exported graphs in this new folder."
)
@measuring.record_options("Draw the ratios by adapter: .html is a page with the table, .svg the picture alone.")
def command(
    run: running.Run,
    model: str | None,
    adapters: tuple[tuple[str, str], ...],
    replay: str | None,
    picture: str | None,
    force: bool,
    **how: Any,
) -> None:
    """Compare what adapters cost MODEL at inference: parameters, nodes, latency, and whether they fold.

    Each adapter is exported as fold leaves it: in the weights under the base's own graph, widened, half-folded, or as
    nodes. Each graph is compared with torch, and then timed against the base's graph, as in bench.
    """
    from surgery.onnx.timing.compared import read_comparison
    from surgery.operations.latency.compare import prepare_compare
    from surgery.report_files import COMPARISON_FORMS, PictureFile

    if replay is not None and (model is not None or adapters):
        raise click.UsageError("--replay prints a record: it takes no model and no adapters")
    if replay is None and (model is None or not adapters):
        raise click.UsageError("compare takes a model and at least one --adapter")
    if replay is None and picture is not None and not how["seconds"]:
        raise click.UsageError("--report draws times, and --seconds 0 measures none")
    inputs = [path for path in (model, replay, *(path for _, path in adapters)) if path is not None]
    measuring.refuse_plan_of_replay(run, replay)
    with (
        running.reporting("compare", run.as_json),
        PictureFile(picture, COMPARISON_FORMS, inputs, force=force) as drawn,
    ):
        if model is None:
            report = read_comparison(str(replay))
            run.present(report, _show)
        else:
            compared = run.carry_out(
                lambda progress: measuring.with_picture(
                    prepare_compare(model, adapters, force=force, **how, progress=progress), picture
                ),
                _show,
                given=measuring.progress(),
            )
            if compared is None:
                return
            report = compared
        drawn.draw(report)
    if picture is not None and not run.as_json:
        printing.show(f"report: {picture}")


def _show(report: CompareReport) -> None:
    """What each adapter is, what it costs, why what stays stays, and what the times rest on."""
    printing.show(f"base: {report.model}, {report.parameters:,} parameters, {report.nodes} nodes run")
    timed = report.bench
    rows = printing.table("adapter", "method", "placement", "f", "trained", "of the base", "folds")
    for each in report.adapters:
        rows.add_row(
            each.name,
            each.method,
            each.placement,
            each.non_linearity,
            f"{each.parameters:,}",
            f"{each.share:.2%}",
            each.folds,
        )
    for column in rows.columns[1:4]:
        column.justify = "left"
    costs = printing.table(
        "graph", "nodes", *(() if timed is None else ("shape", "ms", "ratio", "interval", "verdict"))
    )
    for adapter, graph, comparison in report.rows():
        costs.add_row(_called(adapter, graph), f"{graph.added:+d}", *_times(comparison))
    printing.show(rows, costs)
    for line in _reasons(report):
        printing.show(line)
    if timed is not None:
        noise = max(each.noise_floor for each in timed.comparisons)
        printing.show(
            f"{timed.provider}, margin {timed.margin:.1%}; the base can be told to equal itself within {noise:.1%}; "
            f"begun {timed.started}"
        )
    printing.show(*(f"note: {note}" for note in report.notes))
    for what, path in (("graphs", report.output), ("record", report.record)):
        if path is not None:
            printing.show(f"{what}: {path}")


def _times(found: Comparison | None) -> list[str]:
    if found is None:
        return []
    low, high = found.interval
    shape, milliseconds = f"{found.shape[0]}×{found.shape[1]}", f"{1e3 * found.latency:.3f}"
    return [shape, milliseconds, f"{found.ratio:.3f}", f"{low:.3f} – {high:.3f}", found.verdict]


def _reasons(report: CompareReport) -> Iterator[str]:
    """Which graphs are the base's, and why what stays in a graph stays there."""
    same = [_called(adapter, graph) for adapter in report.adapters for graph in adapter.graphs if graph.same_graph]
    if same:
        yield f"the base's graph, byte for byte: {'; '.join(same)}"
    for adapter in report.adapters:
        for each in adapter.becomes:
            if each.way in ("half-folded", "graph"):
                yield f"{adapter.name}: {each.parts} × {each.way}: {each.reason}"


def _called(adapter: ComparedAdapter, graph: AdapterGraph) -> str:
    return f"{adapter.name}, {graph.form}"
