"""`surgery fold`."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options

if TYPE_CHECKING:
    from collections.abc import Iterable

    from surgery.operations.fold.verdicts import Verdict


def _refuse(ctx: click.Context, param: click.Parameter, value: object) -> None:
    """Says where to go with an option that there was."""
    if value not in (None, False):
        raise click.UsageError(
            "--approximate, --calibration and --max-error were taken away: fold without them, which leaves the "
            "non-linearities in the graph, and put these there with surgery export-onnx"
        )


_TAKEN_AWAY: dict[str, Any] = {"hidden": True, "is_eager": True, "expose_value": False, "callback": _refuse}


@click.command("fold", epilog="Example: surgery fold bert-base/ houlsby/ -o folded/")
@click.argument("model", type=options.PATH)
@click.argument("adapter", type=options.PATH)
@options.output_options
@options.told_options
@click.option("--approximate", is_flag=True, **_TAKEN_AWAY)
@click.option("--calibration", **_TAKEN_AWAY)
@click.option("--max-error", **_TAKEN_AWAY)
@click.option("--dry-run", is_flag=True, help="Print what would become of each part, and why; write nothing.")
@options.engine_options
@options.json_option
def command(
    model: str,
    adapter: str,
    out: str,
    dry_run: bool,
    jobs: int,
    memory: int,
    device: str,
    as_json: bool,
    **how: Any,
) -> None:
    """Fold ADAPTER into MODEL's weights as far as that is exact; the rest goes along, described for the graph."""
    from surgery.operations.fold import fold as operation

    how = options.told(how)
    with options.reporting("fold", as_json):
        if dry_run:
            _show_verdicts(operation.verdicts(model, adapter, how["told"]))
            options.show("nothing written")
            return
        with options.resources(jobs, memory, device) as resources:
            report = operation.fold(model, adapter, out, **how, resources=resources)
        if as_json:
            options.print_json(report)
            return
        _show_verdicts(report.verdicts)
        options.show(f"digest {report.digest}  (base {report.base_digest[:16]}, adapter {report.adapter[:16]})")
        if report.grafts is not None:
            options.show(f"what stays in the graph: {report.grafts}")
        options.show_ending(report)


def _show_verdicts(verdicts: Iterable[Verdict]) -> None:
    """A row for each kind of module, its layers counted."""
    rows = options.table("module", "layers", "adapter", "becomes", "why")
    counts = Counter(
        (re.sub(r"\.\d+\.", ".N.", each.module), each.what, str(each.way), each.reason) for each in verdicts
    )
    for (module, what, way, reason), count in counts.items():
        rows.add_row(module, str(count), what, way, reason)
    for column in rows.columns[2:]:
        column.justify = "left"
    options.show(rows)
