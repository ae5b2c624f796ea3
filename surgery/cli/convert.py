"""`surgery convert`."""

from __future__ import annotations

from typing import Any

import click

from formats.dialects import WRITERS
from formats.dialects.parts import PARTS
from formats.dialects.writing import DROPS
from surgery.cli import options


@click.command("convert", epilog="Example: surgery convert style.safetensors --to diffusers --base unet/ -o style/")
@click.argument("adapter", type=options.PATH)
@click.option(
    "--to", type=click.Choice([writer.name for writer in WRITERS]), required=True, help="The dialect to write."
)
@click.option(
    "--base",
    "bases",
    multiple=True,
    metavar="PATH|PART=PATH",
    help="The model that ADAPTER adapts, or each part's of a pipeline [what ADAPTER's own names and shapes tell].",
)
@click.option(
    "--drop",
    multiple=True,
    type=click.Choice(DROPS),
    help="Leave these behind where the dialect cannot express them: changed biases, tensors carried in full.",
)
@options.output_options
@options.told_options
@options.dry_run_option
@options.engine_options
@options.json_option
def command(
    adapter: str, to: str, out: str, dry_run: bool, jobs: int, memory: int, device: str, as_json: bool, **how: Any
) -> None:
    """Write ADAPTER in another dialect, with the same ΔW."""
    from formats.dialects import open_adapter_file
    from surgery.operations import convert as operation

    how = options.told(how)
    how["base"] = _bases(how.pop("bases"))
    with options.reporting("convert", as_json):
        if dry_run:
            checkpoint, config = open_adapter_file(adapter)
            with checkpoint:
                planned = operation.plan_convert(checkpoint, config, adapter, to, how["base"], how["told"], how["drop"])
                options.show_plan(planned[0])
            return
        with options.resources(jobs, memory, device) as resources:
            report = operation.convert(adapter, out, to, **how, resources=resources)
        if as_json:
            options.print_json(report)
            return
        weights = ", ".join(f"{count} {method}" for method, count in sorted(report.weights.items()))
        part = f" for {report.component}" if report.component else ""
        options.show(f"{report.source} → {report.target}{part}: {weights or 'as it is'}")
        options.show(f"{report.copied} tensors with their bytes as they are, {report.computed} computed")
        options.show_ending(report)


def _bases(given: tuple[str, ...]) -> str | dict[str, str] | None:
    """One model, or that of each part."""
    parts = {part: path for part, _, path in (text.partition("=") for text in given) if part in PARTS and path}
    if len(parts) < len(given) and len(given) > 1:
        raise click.UsageError("--base takes one PATH, or PART=PATH for each of several parts")
    return parts or (given[0] if given else None)
