"""`surgery convert`."""

from __future__ import annotations

import click

from surgery.cli import options


@click.command("convert", epilog="Example: surgery convert pytorch_model.bin -o model.safetensors")
@click.argument("source", type=options.PATH, metavar="INPUT")
@options.output_options
@options.engine_options
@options.json_option
def command(source: str, out: str, force: bool, jobs: int, memory: int, device: str, as_json: bool) -> None:
    """Write INPUT's tensors in another container: torch's (.bin, .pt, .pth, .ckpt) or safetensors, a file or a folder.

    The output's name says which. A folder gets safetensors, in INPUT's shards, and INPUT's other files. Nothing in a
    torch file is executed.
    """
    from surgery.operations.containers import convert_container

    with options.reporting("convert", as_json):
        with options.resources(jobs, memory, device) as resources:
            report = convert_container(source, out, force=force, resources=resources)
        if as_json:
            options.print_json(report)
            return
        options.show(f"{report.source} → {report.container}, digest {report.digest}")
        options.show_ending(report)
