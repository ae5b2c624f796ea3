"""`surgery merge`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options

if TYPE_CHECKING:
    from surgery.exact.survival import Surviving
    from surgery.operations.merge.merge import MergeReport

_WARN_BELOW = 0.5


@options.verb("merge", epilog="Example: surgery merge base/ adapter/ style/:0.5 -o merged/")
@click.argument("base", type=options.PATH)
@options.merging_options(undo="Also write what unmerge needs to give BASE back bit for bit.")
@click.option("--base", "of", type=options.PATH, help="Where BASE is an ONNX graph: what it was exported from.")
@click.option("--weight", type=float, default=1.0, show_default=True, help="A factor of every delta.")
@click.option("--untie", is_flag=True, help="Give a head that BASE ties to its embedding a tensor of its own.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Store every weight as this; float8 is dequantised [each weight's own].",
)
@click.option(
    "--min-surviving",
    type=click.FloatRange(min=0),
    metavar="SHARE",
    help="Fail where less of a delta is left after rounding: ‖stored(W) − W0‖/‖ΔW‖.",
)
@options.max_shard_option("the base's shards")
def command(
    run: options.Run,
    base: str,
    adapters: tuple[tuple[str, float | None], ...],
    out: str,
    of: str | None,
    **how: Any,
) -> None:
    """Merge adapters into BASE: W = W0 + ΣΔW, each weight rounded once, whatever their order.

    BASE may be an ONNX graph, exported by any tool from the checkpoint --base: OUT.onnx is then that graph with the
    merged weights.
    """
    from surgery.operations.merge.merge import prepare_merge

    how = options.told(how)
    if base.endswith(".onnx") or of is not None:
        if of is None or not base.endswith(".onnx"):
            raise click.UsageError(
                "an ONNX graph as BASE and the checkpoint it was exported from as --base go together"
            )
        _merge_graph(
            base, of, adapters, out, {"dry_run": run.dry_run, "device": run.device != "cpu", **how}, run.as_json
        )
        return
    run.carry_out(lambda resources: prepare_merge(base, adapters, out, **how, resources=resources), _show)


def _show(report: MergeReport) -> None:
    parts = ["base " + report.base_digest[:16], *(f"adapter {digest[:16]}" for digest in report.adapters)]
    options.show(f"digest {report.digest}  ({', '.join(parts)})")
    for line in surviving_lines(report.surviving):
        options.show(line)
    if report.undo is not None:
        share = f"{report.undo.share:.2%} of the tensors that changed"
        options.show(f"undo file {report.undo.path}: {report.undo.nbytes:,} bytes, {share}")
    options.show_ending(report)


_GRAPH = ("weight", "told", "force")  # what merging into a graph knows


def _merge_graph(
    template: str,
    base: str,
    adapters: tuple[tuple[str, float | None], ...],
    out: str,
    how: dict[str, Any],
    as_json: bool,
) -> None:
    from surgery.cli.export_onnx import show_reweighed
    from surgery.operations.export.into_template import merge_onnx

    refused = [name for name, value in how.items() if name not in _GRAPH and value]
    if refused:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in refused)
        raise click.UsageError(f"{named}: for checkpoints; a graph keeps its dtypes and has no receipt to undo by")
    with options.reporting("merge", as_json):
        report = merge_onnx(template, adapters, out, base=base, **{name: how[name] for name in _GRAPH})
        for line in surviving_lines(report.surviving) if not as_json else ():
            options.show(line)
        show_reweighed(report, as_json)


def surviving_lines(surviving: Mapping[str, Surviving]) -> list[str]:
    """What rounding left of the deltas, and a warning where that is less than half."""
    from surgery.exact.survival import least, middle

    name = least(surviving)
    if name is None:
        return []
    lowest = surviving[name].survived
    lines = [f"survives rounding, of each delta's norm: {lowest:.1%} at least, {middle(surviving):.1%} in the median"]
    if lowest < _WARN_BELOW:
        lines.append(f"warning: {lowest:.1%} survives in {name}: a finer --dtype keeps more")
    return lines
