"""`surgery convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from formats.dialects import WRITERS
from formats.dialects.parts import PARTS
from formats.dialects.writing import DROPS
from surgery.cli import options

if TYPE_CHECKING:
    from surgery.engine import Resources


@click.command(
    "convert",
    epilog="Examples: surgery convert style.safetensors --to diffusers --base unet/ -o style/; "
    "surgery convert pytorch_model.bin -o model.safetensors",
)
@click.argument("source", type=options.PATH, metavar="INPUT")
@click.option(
    "--to",
    type=click.Choice([writer.name for writer in WRITERS]),
    help="The dialect to write an adapter in [without it INPUT goes into another container].",
)
@click.option(
    "--base",
    "bases",
    multiple=True,
    metavar="PATH|PART=PATH",
    help="The model that an adapter adapts, or each part's of a pipeline [what its own names and shapes tell].",
)
@click.option(
    "--drop",
    multiple=True,
    type=click.Choice(DROPS),
    help="Leave these behind where the dialect cannot express them: changed biases, tensors carried in full, layers "
    "that it does not adapt.",
)
@options.output_options
@options.told_options
@options.dry_run_option
@options.engine_options
@options.json_option
def command(
    source: str, to: str | None, out: str, force: bool, jobs: int, memory: int, device: str, as_json: bool, **how: Any
) -> None:
    """Write an adapter in another dialect, with the same ΔW; or any tensors in another container.

    With --to, INPUT is an adapter. Without, it is a file or folder of torch's (.bin, .pt, .pth, .ckpt) or safetensors,
    and the output's name says which of the two it becomes. A folder gets safetensors, in INPUT's shards, and INPUT's
    other files. Nothing in a torch file is executed. An adapter for llama.cpp (--to gguf) is one .gguf file, and needs
    --base, a folder with config.json, both to be written and to be read.
    """
    if to is None and (how["bases"] or how["drop"] or how["dry_run"] or any(how[name] for name in options.TOLD)):
        raise click.UsageError("without --to, another container is written, which takes no option of adapters")
    with options.reporting("convert", as_json), options.resources(jobs, memory, device) as resources:
        if to is None:
            _container(source, out, force, as_json, resources)
        else:
            _adapter(source, to, out, force, as_json, resources, how)


def _container(source: str, out: str, force: bool, as_json: bool, resources: Resources) -> None:
    from surgery.operations.containers import convert_container

    report = convert_container(source, out, force=force, resources=resources)
    if as_json:
        options.print_json(report)
        return
    options.show(f"{report.source} → {report.container}, digest {report.digest}")
    options.show_ending(report)


def _adapter(
    source: str, to: str, out: str, force: bool, as_json: bool, resources: Resources, how: dict[str, Any]
) -> None:
    from formats.dialects import open_adapter_file
    from surgery.operations import convert as operation

    dry_run = how.pop("dry_run")
    how = options.told(how)
    how["base"] = _bases(how.pop("bases"))
    if dry_run:
        checkpoint, config = open_adapter_file(source)
        with checkpoint:
            planned = operation.plan_convert(checkpoint, config, source, to, how["base"], how["told"], how["drop"])
            options.show_plan(planned[0])
        return
    report = operation.convert(source, out, to, **how, force=force, resources=resources)
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
