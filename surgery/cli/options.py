"""What the commands share: options, progress, errors, and how a report is printed. Nothing but click and printing."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from formats.errors import ReportedError

if TYPE_CHECKING:
    from surgery.ranks import RankRule

PATH = click.Path(path_type=str)


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


class ByteSize(click.ParamType[int]):
    """A number of bytes: `512MB`, `2GiB`, `1000000`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parses it, or fails as a usage error."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", str(value).strip().lower())
        if match is None:
            self.fail(f"{value!r} is not a size such as 512MB or 2GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


class WeighedPath(click.ParamType[tuple[str, float | None]]):
    """`PATH` or `PATH:WEIGHT`; a path that is there by its whole name is taken as it is."""

    name = "path[:weight]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float | None]:
        """Splits off the weight, if the last part is a number."""
        if isinstance(value, tuple):
            return value
        path, colon, weight = str(value).rpartition(":")
        if not colon or os.path.exists(value):
            return str(value), None
        try:
            return path, float(weight)
        except ValueError:
            return str(value), None


class Shape(click.ParamType[tuple[int, int]]):
    """Batch and sequence: `1x128`."""

    name = "BxS"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parses it, or fails as a usage error."""
        if isinstance(value, tuple):
            return value
        batch, _, sequence = str(value).partition("x")
        if not (batch.isdigit() and sequence.isdigit()):
            self.fail(f"{value!r} is not a shape such as 1x128", param, ctx)
        return int(batch), int(sequence)


class NamedPath(click.ParamType[tuple[str, str]]):
    """`PATH` or `NAME=PATH`; a path that is there by its whole name is taken as it is, and has no name."""

    name = "[name=]path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Splits off the name."""
        if isinstance(value, tuple):
            return value
        name, equals, path = str(value).partition("=")
        return (name, path) if equals and not os.path.exists(value) else ("", str(value))


def output_options(function: Callable[..., None]) -> Callable[..., None]:
    """-o and --force."""
    function = click.option(
        "--force", is_flag=True, help="Overwrite the output if it exists; inputs are never overwritten."
    )(function)
    return click.option(
        "-o",
        "--output",
        "out",
        type=PATH,
        required=True,
        help="Output path: a folder, or a file whose suffix gives its format.",
    )(function)


def base_option(function: Callable[..., None]) -> Callable[..., None]:
    """--base, of commands that mostly need none."""
    text = "Base of the adapters; needed if their factors do not show what they adapt (experts, tokens)."
    return click.option("--base", type=PATH, help=text)(function)


def factor_dtype_option(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """--dtype of the factors; `default` says what they are without."""
    kinds = click.Choice(["float32", "float16", "bfloat16"])
    return click.option("--dtype", type=kinds, help=f"Dtype of the factors [{default}].")


def max_shard_option(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """--max-shard-size; `default` says what shards there are without."""
    text = f"Maximum size of a shard, such as 2GB [{default}]."
    return click.option("--max-shard-size", type=ByteSize(), metavar="SIZE", help=text)


class Slices(click.ParamType[tuple[bool, ...]]):
    """`1,0,1`: which slices of a fused layer are adapted."""

    name = "slices"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[bool, ...]:
        """Parses it, or fails as a usage error."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not set(parts) <= {"0", "1"} or "1" not in parts:
            self.fail(f"{value!r} is not a list of slices such as 1,0,1", param, ctx)
        return tuple(part == "1" for part in parts)


TOLD = ("alpha", "enable_lora", "fan_in_fan_out", "component")


def told_options(function: Callable[..., None]) -> Callable[..., None]:
    """What an adapter's file does not say; `told` reads them."""
    function = component_option(function)
    function = click.option(
        "--fan-in-fan-out", is_flag=True, help="loralib only: square weights are stored (in, out)."
    )(function)
    function = click.option(
        "--enable-lora",
        type=Slices(),
        default=(),
        metavar="1,0,1",
        help="loralib only: which slices of a fused layer are adapted, if the shapes do not show it.",
    )(function)
    return click.option("--alpha", type=float, help="loralib only: lora_alpha, which its files do not contain.")(
        function
    )


def component_option(function: Callable[..., None]) -> Callable[..., None]:
    """--component."""
    return click.option(
        "--component",
        metavar="PART",
        help="Part of a pipeline that the base is: unet, transformer, text_encoder, text_encoder_2 or text_encoder_3.",
    )(function)


def told(how: dict[str, Any]) -> dict[str, Any]:
    """Turns the options of `told_options` into the library's `told`."""
    from formats.adapter import Told

    said = Told(*(how.pop(name) for name in TOLD))
    return {**how, "told": said}


def merging_options(undo: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What merge and unmerge share: the adapters, --undo (with its help), and the options of every verb that writes."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for each in (told_options, output_options):
            function = each(function)
        function = click.option("--undo", type=PATH, metavar="FILE", help=undo)(function)
        return click.argument("adapters", type=WeighedPath(), nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")(
            function
        )

    return decorate


_RULES = (
    ("energy", "Choose for each weight the smallest rank that keeps this share of ‖ΔW‖², such as 0.9."),
    ("residual", "Choose the smallest rank with a relative error ‖ΔW − BA‖/‖ΔW‖ of at most this."),
    ("sv-ratio", "Keep singular values above the largest one divided by this (kohya: 10; LyCORIS: 0.1)."),
    ("sv-threshold", "Keep singular values above this value."),
    ("sv-quantile", "Choose the smallest rank whose singular values add up to this share of their total."),
)


def rank_options(function: Callable[..., None]) -> Callable[..., None]:
    """The ways to choose a rank; `chosen_ranks` reads them."""
    bounds = (
        ("--max-rank", "Upper limit for every chosen rank."),
        ("--min-rank", "Lower limit for every chosen rank."),
    )
    for name, text in bounds:
        function = click.option(name, type=int, help=text)(function)
    for name, text in reversed(_RULES):
        function = click.option(f"--{name}", type=float, help=text)(function)
    function = click.option(
        "--budget",
        type=ByteSize(),
        help="Size of the adapter, such as 20MB: choose the ranks that keep the most energy within it.",
    )(function)
    return click.option(
        "--rank",
        "ranks",
        multiple=True,
        metavar="N|PATTERN=N",
        help="Rank of the factors. PATTERN=N sets it for matching weights and overrides every other rule.",
    )(function)


def chosen_ranks(how: dict[str, Any], *, needed: bool = True) -> dict[str, Any]:
    """Turns the options of `rank_options` into the library's `rank` and `overrides`; a usage error where that fails.

    Where none is `needed`, none of them means no rank.
    """
    from surgery.model.patterns import rank_override
    from surgery.ranks import rank_rule
    from surgery.ranks.budget import Budget

    given = how.pop("ranks")
    plain = [text for text in given if text.lstrip("-").isdecimal()]
    rules = {name.replace("-", "_"): how.pop(name.replace("-", "_")) for name, _ in _RULES}
    bounds = {"minimum": how.pop("min_rank"), "maximum": how.pop("max_rank")}
    budget = how.pop("budget")
    if not needed and not given and all(each is None for each in (budget, *rules.values(), *bounds.values())):
        return {**how, "rank": None, "overrides": {}}
    if budget is not None and (plain or any(value is not None for value in rules.values())):
        raise click.UsageError("--budget chooses the ranks: no other rule goes with it, but for --rank PATTERN=N")
    rank: Budget | RankRule
    with usage_errors():
        overrides = dict(rank_override(text) for text in given if text not in plain)
        if budget is not None:
            rank = Budget(budget, bounds["minimum"] or 1, bounds["maximum"])
        else:
            rank = rank_rule(rank=int(plain[-1]) if plain else None, **bounds, **rules)
    return {**how, "rank": rank, "overrides": overrides}


def choice_options(function: Callable[..., None]) -> Callable[..., None]:
    """Which tensors of a pair are looked at; `chosen_tensors` reads them."""
    function = click.option(
        "--kind",
        "kinds",
        multiple=True,
        metavar="PATTERN=KIND",
        help="State what a weight is where surgery cannot be certain: linear, transposed, embedding, conv, …",
    )(function)
    for name, text in (
        ("exclude", "Skip tensors that match."),
        ("include", "Consider only tensors that match."),
    ):
        function = click.option(f"--{name}", multiple=True, metavar="PATTERN", help=text)(function)
    return function


def chosen_tensors(how: dict[str, Any]) -> dict[str, Any]:
    """Turns the options of `choice_options` into the library's arguments."""
    kinds = {}
    for text in how.pop("kinds"):
        pattern, separator, kind = text.rpartition("=")
        if not separator or not pattern:
            raise click.UsageError(f"--kind takes PATTERN=KIND, not {text!r}")
        kinds[pattern] = kind
    return {**how, "kinds": kinds}


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns what the library says of an argument by itself, whatever the files, into a usage error."""
    try:
        yield
    except ReportedError as error:
        raise click.UsageError(str(error)) from error
