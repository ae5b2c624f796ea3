"""`surgery merge`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options

if TYPE_CHECKING:
    from surgery.exact.survival import Surviving

_WARN_BELOW = 0.5


@click.command("merge", epilog="Example: surgery merge base/ adapter/ style/:0.5 -o merged/")
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
    base: str,
    adapters: tuple[tuple[str, float | None], ...],
    out: str,
    of: str | None,
    dry_run: bool,
    jobs: int,
    memory: int,
    device: str,
    as_json: bool,
    **how: Any,
) -> None:
    """Merge adapters into BASE: W = W0 + ΣΔW, each weight rounded once, whatever their order.

    BASE may be an ONNX graph, exported by any tool from the checkpoint --base: OUT.onnx is then that graph with the
    merged weights.
    """
    from formats.paths import open_checkpoint
    from surgery.model.stored_dtype import dtype_named
    from surgery.operations.merge import merge as operation
    from surgery.operations.merge.adapters import open_for_merge
    from surgery.operations.merge.plan import plan_merge

    how = options.told(how)
    if base.endswith(".onnx") or of is not None:
        if of is None or not base.endswith(".onnx"):
            raise click.UsageError(
                "an ONNX graph as BASE and the checkpoint it was exported from as --base go together"
            )
        _merge_graph(base, of, adapters, out, {"dry_run": dry_run, "device": device != "cpu", **how}, as_json)
        return
    with options.reporting("merge", as_json):
        if dry_run:
            with open_checkpoint(base) as w0:
                planned = open_for_merge(base, adapters, w0.specs, how["weight"], how["told"], untie=how["untie"])
                stored = dtype_named(how["dtype"])
                options.show_plan(plan_merge(w0, *planned, undo=how["undo"] is not None, stored=stored)[0])
            return
        with options.resources(jobs, memory, device) as resources:
            report = operation.merge(base, adapters, out, **how, resources=resources)
        if as_json:
            options.print_json(report)
            return
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
