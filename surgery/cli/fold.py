"""`surgery fold`."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options, printing, running

if TYPE_CHECKING:
    from collections.abc import Iterable

    from surgery.operations.fold.fold import FoldPlan, FoldReport
    from surgery.operations.fold.verdicts import Verdict


def _refuse(ctx: click.Context, param: click.Parameter, value: object) -> None:
    """Says where to go with an option that there was."""
    if value not in (None, False):
        raise click.UsageError(
            "--approximate, --calibration and --max-error were taken away: fold without them, which leaves the "
            "non-linearities in the graph, and put these there with surgery export-onnx"
        )


_TAKEN_AWAY: dict[str, Any] = {"hidden": True, "is_eager": True, "expose_value": False, "callback": _refuse}


@running.verb("fold", epilog="Example: surgery fold bert-base/ houlsby/ -o folded/")
@click.argument("model", type=options.PATH)
@click.argument("adapter", type=options.PATH)
@options.output_options
@options.told_options
@click.option("--approximate", is_flag=True, **_TAKEN_AWAY)
@click.option("--calibration", **_TAKEN_AWAY)
@click.option("--max-error", **_TAKEN_AWAY)
def command(run: running.Run, model: str, adapter: str, out: str, **how: Any) -> None:
    """Fold ADAPTER into MODEL's weights as far as that is exact.

    What no weight can hold is written beside the weights, for export-onnx to put into the graph.

    --dry-run prints what would become of each part of the adapter, and why.
    """
    from surgery.operations.fold.fold import prepare_fold

    how = options.told(how)
    run.carry_out(lambda resources: prepare_fold(model, adapter, out, **how, resources=resources), _show, _show_summary)


def _show(report: FoldReport) -> None:
    _show_verdicts(report.verdicts)
    printing.show(f"digest {report.digest}  (base {report.base_digest[:16]}, adapter {report.adapter[:16]})")
    if report.grafts is not None:
        printing.show(f"what stays in the graph: {report.grafts}")
    printing.show_ending(report)


def _show_summary(plan: FoldPlan) -> None:
    _show_verdicts(plan.verdicts)
    printing.show_plan_ending(plan)


def _show_verdicts(verdicts: Iterable[Verdict]) -> None:
    """A row for each kind of module, its layers counted."""
    rows = printing.table("module", "layers", "adapter", "becomes", "why")
    counts = Counter(
        (re.sub(r"\.\d+\.", ".N.", each.module), each.what, str(each.way), each.reason) for each in verdicts
    )
    for (module, what, way, reason), count in counts.items():
        rows.add_row(module, str(count), what, way, reason)
    for column in rows.columns[2:]:
        column.justify = "left"
    printing.show(rows)
