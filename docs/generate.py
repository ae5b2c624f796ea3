"""Writes docs/cli.md from the commands' own help. A test fails where the two differ: `make docs` mends it."""

from __future__ import annotations

from pathlib import Path

import click

from surgery.cli import COMMANDS, main

TARGET = Path(__file__).parent / "cli.md"


def reference() -> str:
    """The reference of all commands, as Markdown."""
    parts = ["# The command line\n\nGenerated from `--help` by `make docs`; do not edit.\n", _section("surgery", main)]
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        parts.append(_section(f"surgery {name}", command))
    return "\n".join(parts)


def _section(path: str, command: click.Command) -> str:
    settings = main.context_settings | {"terminal_width": 100, "max_content_width": 100}
    context = click.Context(command, info_name=path, **settings)
    return f"## {path}\n\n```text\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
