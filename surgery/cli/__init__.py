"""The command line: `surgery VERB …`. Commands load only when they are called; none imports torch at its top."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any, NoReturn

import click

from surgery.version import __version__

COMMANDS = {
    "spectrum": "surgery.cli.spectrum",
    "extract": "surgery.cli.extract",
    "merge": "surgery.cli.merge",
    "unmerge": "surgery.cli.unmerge",
    "fold": "surgery.cli.fold",
    "resize": "surgery.cli.resize",
    "combine": "surgery.cli.combine",
    "verify": "surgery.cli.verify",
    "export-onnx": "surgery.cli.export_onnx",
    "prove": "surgery.cli.prove",
    "bench": "surgery.cli.bench",
    "compare": "surgery.cli.compare",
    "convert": "surgery.cli.convert",
    "inspect": "surgery.cli.inspect",
    "diff": "surgery.cli.diff",
}


class _LazyGroup(click.Group):
    """A group that imports a command's module when the command is wanted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name]).command
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.obj = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command. With --json a usage error is a document on stdout too, as every other outcome is."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if ctx.obj:
                path = error.ctx.command_path if error.ctx else "surgery"
                said = {"type": "UsageError", "what": error.format_message(), "then": f"{path} --help"}
                operation = path.partition(" ")[2] or None
                click.echo(json.dumps({"operation": operation, "error": said}, indent=2, ensure_ascii=False))
            raise


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="surgery")
def main() -> None:
    """Model surgery on saved weight files.

    Exit codes: 0 done; 1 failed; 2 wrong usage; 3 a check said no; 4 a check could not tell.
    """


def run() -> NoReturn:
    """The program `surgery`: the command line, and an end that takes nothing down first.

    The system takes all of it back at once; Python, with torch loaded, needs a tenth of a second or more.
    """
    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # whoever read has gone
        code = 1
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
