"""`surgery merge`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import options, printing, running

if TYPE_CHECKING:
    from surgery.exact.survival import Surviving
    from surgery.operations.merge.merge import MergeReport

_WARN_BELOW = 0.5


@running.verb("merge", epilog="Example: surgery merge base/ adapter/ style/:0.5 -o merged/")
@click.argument("base", type=options.PATH)
@options.merging_options(undo="Also write an undo file, with which unmerge restores BASE bit for bit.")
@click.option("--base", "of", type=options.PATH, hidden=True)
@click.option(
    "--weight", type=float, default=1.0, show_default=True, help="Factor for every delta, on top of each adapter's own."
)
@click.option("--untie", is_flag=True, help="Store a tensor of its own for a head that BASE ties to its embedding.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Store every weight in this dtype; float8 is dequantised [each weight's own].",
)
@click.option(
    "--min-surviving",
    type=click.FloatRange(min=0),
    metavar="SHARE",
    help="Fail if rounding leaves less of any delta than this share: ‖stored(W) − W0‖/‖ΔW‖.",
)
@options.max_shard_option("the base's shards")
def command(
    run: running.Run,
    base: str,
    adapters: tuple[tuple[str, float | None], ...],
    out: str,
    of: str | None,
    **how: Any,
) -> None:
    """Merge adapters into BASE: W = W0 + ΣΔW.

    All deltas are added in higher precision and each weight is rounded once, so the order of adapters does not matter.
    """
    if base.endswith(".onnx"):
        command = _export_command(base, of or "BASE", adapters, out, how)
        raise click.UsageError(
            f"for an ONNX graph, run `{command}`, which starts from the checkpoint that the graph was exported from"
        )
    if of is not None:
        raise click.NoSuchOption("--base")
    from surgery.operations.merge.merge import prepare_merge

    how = options.told(how)
    run.carry_out(lambda resources: prepare_merge(base, adapters, out, **how, resources=resources), _show)


def _show(report: MergeReport) -> None:
    parts = ["base " + report.base_digest[:16], *(f"adapter {digest[:16]}" for digest in report.adapters)]
    printing.show(f"digest {report.digest}  ({', '.join(parts)})")
    for line in surviving_lines(report.surviving):
        printing.show(line)
    if report.undo is not None:
        share = f"{report.undo.share:.2%} of the tensors that changed"
        printing.show(f"undo file {report.undo.path}: {report.undo.nbytes:,} bytes, {share}")
    printing.show_ending(report)


def _export_command(
    graph: str, base: str, adapters: tuple[tuple[str, float | None], ...], out: str, how: Mapping[str, Any]
) -> str:
    """What merges into an ONNX graph, with what the user said of it here."""
    words = ["surgery", "export-onnx", base, "--template", graph]
    for path, own in adapters:
        weight = how["weight"] * (1 if own is None else own)
        words += ["--adapter", path if weight == 1 else f"{path}:{weight}"]
    slices = ",".join(str(int(each)) for each in how["enable_lora"])
    for option, value in (("--alpha", how["alpha"]), ("--enable-lora", slices), ("--component", how["component"])):
        words += [option, str(value)] if value else []
    words += [f"--{name.replace('_', '-')}" for name in ("fan_in_fan_out", "force") if how[name]]
    return shlex.join([*words, "-o", out])


def surviving_lines(surviving: Mapping[str, Surviving], finer: str = "a finer --dtype") -> list[str]:
    """What rounding left of the deltas, and a warning where that is less than half: what is `finer` keeps more."""
    from surgery.exact.survival import least, middle

    name = least(surviving)
    if name is None:
        return []
    lowest = surviving[name].survived
    lines = [f"survives rounding, of each delta's norm: {lowest:.1%} at least, {middle(surviving):.1%} in the median"]
    if lowest < _WARN_BELOW:
        lines.append(f"warning: {lowest:.1%} survives in {name}: {finer} keeps more")
    return lines
