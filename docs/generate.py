"""Writes docs/cli.md from the commands' own help, docs/methods.md from the tables of methods and docs/dialects.md from
the dialects' writers. A test fails if a file and its source differ; `make docs` rewrites the files."""

from __future__ import annotations

from pathlib import Path

import click
from dialect_table import dialects

from formats.dialects.peft_methods import REFUSED, REPLACING, SCHEMES, VARIANTS
from surgery.cli import COMMANDS, main
from surgery.methods import ADDITIVE, TRANSFORMING

TARGET = Path(__file__).parent / "cli.md"
DIALECTS = Path(__file__).parent / "dialects.md"
METHODS = Path(__file__).parent / "methods.md"


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


def methods() -> str:
    """The methods of peft, merged and refused, as Markdown."""
    known = {method.name: method for method in (*ADDITIVE, *TRANSFORMING)}
    rows = [("LORA", "lora", ""), ("LORA", "dora", "use_dora")]
    rows += [(peft_type, scheme.method, "") for peft_type, scheme in SCHEMES.items()]
    rows += [(peft_type, method, f"{setting}={value}") for peft_type, setting, value, method in VARIANTS]
    merged = []
    for peft_type, name, setting in sorted(rows):
        forgets = getattr(known[name], "forgets", "")
        away = f"no: {forgets}" if forgets else "yes" if known[name] in ADDITIVE else "yes, by its inverse"
        merged.append(f"| `{peft_type}`{f', `{setting}`' if setting else ''} | {known[name].paper} | {away} |")
    merged += [f"| `{each}` | replaces tensors of the base | yes, from the receipt |" for each in REPLACING]
    refused = [f"| `{peft_type}` | {reason} |" for peft_type, reason in sorted(REFUSED.items())]
    types = {peft_type for peft_type, _, _ in rows} | set(REPLACING)
    count = f"{len(types)} methods are merged, in {len(merged)} forms; {len(refused)} are refused."
    return "\n".join([_METHODS.replace("COUNT", count), *merged, _REFUSED, *refused, ""])


_METHODS = """# The methods of PEFT

Generated from the tables in formats/dialects/peft_methods.py and surgery/methods by `make docs`; do not edit.

## Merged

Each gives what `merge_and_unload` of the installed peft gives, within 1e-6 of the largest weight in float32
(tests/parity/test_parity_methods.py), rounded once. Settings that a method cannot be merged with are refused while
planning, with the reason.

COUNT

With peft in float64 as the judge, each weight is off by at most 1.0e-7 of its largest element, of which half a step of
float32 is 6e-8. Over the 78 settings of that test peft itself in float32 is the less exact in 50, by up to 2.5e-7 (HRA
with orthonormal vectors), as exact in 22, and nearer in 6 by up to 7e-8: four of DEFT and FourierFT, which peft
computes in float32 even then, and two within the last bit.

| method | mathematics | can be taken off |
|---|---|---|"""
_REFUSED = """
## Refused

| method | why |
|---|---|"""

if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
    DIALECTS.write_text(dialects(), encoding="utf-8")
    METHODS.write_text(methods(), encoding="utf-8")
