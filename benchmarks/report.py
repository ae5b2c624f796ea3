"""From raw runs to a table: medians, spreads, ratios; on the terminal, in Markdown and in one JSON file."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from processes import Contender, Run
from rich import box
from rich.console import Console
from rich.table import Table

_HEADINGS = ("command", "wall, s", "÷ ours", "less imports, s", "÷ ours", "÷ floor", "peak MB")


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and extremes of one figure over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        listed = list(values)
        return cls(statistics.median(listed), min(listed), max(listed))

    def __str__(self) -> str:
        return f"{_figure(self.median)} ({_figure(self.least)}–{_figure(self.most)})"


def _figure(value: float) -> str:
    """Three digits or so."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender's figures.

    Attributes:
        wall_s: of the whole process.
        wall_ratio: to ours in the same round.
        own_s: without start and imports; None if the process does not tell.
        own_ratio: to ours in the same round.
        floor_ratio: of the same to the floor's in the same round; None if the process does not tell, or there is none.
        peak_rss_bytes: the largest of all rounds.
    """

    contender: str
    wall_s: Spread
    wall_ratio: Spread
    own_s: Spread | None
    own_ratio: Spread | None
    floor_ratio: Spread | None
    peak_rss_bytes: int

    def cells(self) -> tuple[str, ...]:
        """As in the table."""
        figures = (self.wall_s, self.wall_ratio, self.own_s, self.own_ratio, self.floor_ratio)
        shown = ["" if figure is None else str(figure) for figure in figures]
        return (self.contender, *shown, f"{self.peak_rss_bytes / 1e6:.0f}")


def summarise(runs: Sequence[Run], contenders: Sequence[Contender], floor: str) -> list[Row]:
    """A row for every contender; the first one is ours, and `floor` the name of one that tells its own time, or "" if
    none is. Ratios are taken within a round, so that what slows the whole
    machine for a while slows both sides of a ratio."""
    by_name = {contender.name: _rounds(runs, contender.name) for contender in contenders}
    wall = {name: [run.wall_s for run in rounds] for name, rounds in by_name.items()}
    own = {contender.name: _own_s(contender, by_name) for contender in contenders}
    ours = contenders[0].name
    return [
        Row(
            contender=name,
            wall_s=Spread.of(wall[name]),
            wall_ratio=Spread.of(_ratios(wall[name], wall[ours])),
            own_s=Spread.of(own[name]) if own[name] else None,
            own_ratio=Spread.of(_ratios(own[name], own[ours])) if own[name] else None,
            floor_ratio=Spread.of(_ratios(own[name], own[floor])) if floor and own[name] else None,
            peak_rss_bytes=max(run.peak_rss_bytes for run in rounds),
        )
        for name, rounds in by_name.items()
    ]


def _rounds(runs: Sequence[Run], name: str) -> list[Run]:
    return sorted((run for run in runs if run.contender == name), key=lambda run: run.round)


def _own_s(contender: Contender, by_name: Mapping[str, list[Run]]) -> list[float]:
    """Seconds without start and imports, by round: what the process says, or its wall time less that of the imports."""
    rounds = by_name[contender.name]
    if contender.imports is None:
        return [run.own_s for run in rounds if run.own_s is not None]
    return [run.wall_s - loading.wall_s for run, loading in zip(rounds, by_name[contender.imports], strict=True)]


def _ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    return [their / our for their, our in zip(theirs, ours, strict=True)]


def others_share(runs: Sequence[Run], cores: int) -> float | None:
    """Share of the machine's CPU time that other processes had during the runs; None if unknown."""
    if any(run.others_cpu_s is None for run in runs):
        return None
    return sum(run.others_cpu_s or 0.0 for run in runs) / (cores * sum(run.wall_s for run in runs))


def as_json(document: Mapping[str, Any]) -> str:
    """Dataclasses as objects, times to the microsecond."""
    plain = json.loads(json.dumps(document, default=dataclasses.asdict))
    return json.dumps(_rounded(plain), indent=1, ensure_ascii=False) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table: its first column is text, the others are figures."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


def timings(title: str, rows: Sequence[Row]) -> Sheet:
    """The contenders' table; without the column of the floor where there is none."""
    cells, floor = [row.cells() for row in rows], _HEADINGS.index("÷ floor")
    kept = [index for index in range(len(_HEADINGS)) if index != floor or any(row[floor] for row in cells)]
    picked = [tuple(row[index] for index in kept) for row in (_HEADINGS, *cells)]
    return Sheet(title, picked[0], picked[1:])


def answers(title: str, lines: Sequence[Mapping[str, Any]]) -> Sheet:
    """A table of mappings with the same keys."""
    return Sheet(title, tuple(lines[0]), [tuple(map(_cell, line.values())) for line in lines])


def _cell(value: Any) -> str:
    return f"{value:.6f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def show(sheets: Sequence[Sheet], remarks: Sequence[str]) -> None:
    """Prints the tables."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    for sheet in sheets:
        table = Table(title=sheet.title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for index, heading in enumerate(sheet.headings):
            table.add_column(heading, justify="right" if index else "left")
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    for remark in remarks:
        console.print(remark, style="dim")


def as_markdown(sheets: Sequence[Sheet], commands: Mapping[str, str], remarks: Sequence[str]) -> str:
    """The same for a file."""
    parts = []
    for number, sheet in enumerate(sheets):
        lines = [sheet.headings, ("---", *("---:" for _ in sheet.headings[1:])), *sheet.rows]
        parts.append(f"{sheet.title}:" if number else f"# {sheet.title}")
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts.append("\n".join(f"- {remark}" for remark in remarks))
    parts.append("\n".join(f"    {command}  # {name}" for name, command in commands.items()))
    return "\n\n".join(parts) + "\n"


def write(folder: Path, name: str, document: str, page: str) -> None:
    """Keeps the raw data and the page about it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(document, encoding="utf-8")
    (folder / f"{name}.md").write_text(page, encoding="utf-8")
