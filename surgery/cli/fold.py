"""`surgery fold`."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options

if TYPE_CHECKING:
    from collections.abc import Iterable

    from surgery.operations.fold.calibrate import Approximation
    from surgery.operations.fold.verdicts import Verdict


@click.command("fold", epilog="Example: surgery fold bert-base/ houlsby/ -o folded/")
@click.argument("model", type=options.PATH)
@click.argument("adapter", type=options.PATH)
@options.output_options
@options.told_options
@click.option(
    "--approximate",
    is_flag=True,
    help="Also fold where an affine map stands for the non-linearity: the nearest on the rows of --calibration.",
)
@click.option(
    "--calibration",
    type=options.PATH,
    metavar="FILE",
    help="A safetensors file with input_ids [and attention_mask], or pixel_values.",
)
@click.option(
    "--max-error",
    type=click.FloatRange(min=0),
    metavar="SHARE",
    help="Fail where the approximation errs more: ‖error‖/‖output‖ on rows held out.",
)
@click.option("--dry-run", is_flag=True, help="Print what would become of each part, and why; write nothing.")
@options.engine_options
@options.json_option
def command(
    model: str,
    adapter: str,
    out: str,
    approximate: bool,
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
    if approximate != (how["calibration"] is not None):
        raise click.UsageError("--approximate and --calibration FILE go together")
    if dry_run and approximate:
        raise click.UsageError("--dry-run runs nothing, and only a run finds what --approximate needs")
    if how["max_error"] is not None and not approximate:
        raise click.UsageError("--max-error is for --approximate: what is folded without it is exact")
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
        for line in _approximation_lines(report.approximation):
            options.show(line)
        if report.grafts is not None:
            options.show(f"what stays in the graph: {report.grafts}")
        options.show_ending(report)


def _approximation_lines(found: Approximation | None) -> list[str]:
    """What an approximation costs."""
    if found is None:
        return []
    worst = max(found.modules, key=lambda name: found.modules[name])
    return [
        f"‖error‖/‖output‖ {found.output:.3g} on {found.held_out} rows held out of {found.rows + found.held_out}",
        f"of {len(found.modules)} bottlenecks the worst is {worst}: {found.modules[worst]:.3g} of what it adds",
    ]


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
