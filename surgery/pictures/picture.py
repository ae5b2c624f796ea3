"""The curves of `surgery.ranks.spectra` as charts for choosing a rank, with the text that goes with them.

`surgery.pictures.page` assembles them. Tooltips are SVG titles. The same spectra give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from surgery.pictures.charts import Plot, Scale, cell, nbytes_text, percent, round_ticks, svg, text_at
from surgery.ranks.spectra import Point, Spectrum, budgeted, doubling, known_rank, uniform

GOALS = (0.5, 0.9, 0.99)  # shares of energy in the summary
HEAT = 0.9  # the share of energy for which the map shows the rank
PANELS = 12  # the most small charts
MAP_ROWS, MAP_COLUMNS = 40, 130  # the largest map that fits a page
SHADES = 6

_INTEGER = re.compile(r"(?<=\.)\d+(?=\.)")
_ERRORS = tuple((tick / 100, f"{tick} %") for tick in (0, 20, 40, 60, 80, 100))
_ENERGIES = tuple(((1 - share / 100) ** 0.5, f"{share} %") for share in (0, 50, 75, 90, 95, 99, 100))


@dataclass(frozen=True)
class Group:
    """The weights of one kind in all layers.

    Attributes:
        name: the kind, such as `self_attn.q_proj`.
        members: pairs of layer and spectrum; the layer is None for weights outside the layers.
    """

    name: str
    members: tuple[tuple[int | None, Spectrum], ...]

    @property
    def total(self) -> float:
        """Σ‖ΔW‖²."""
        return sum(spectrum.total for _, spectrum in self.members)


@dataclass(frozen=True)
class View:
    """The content of the page and the poster: SVG elements by name, and the rows of the table."""

    title: str
    lead: str
    tiles: tuple[tuple[str, str, str], ...]
    by_rank: str
    by_size: str
    rows: tuple[tuple[str, ...], ...]
    panels: tuple[str, ...]
    omitted: str
    heat: tuple[str, int, int] | None


def groups_of(spectra: Sequence[Spectrum]) -> list[Group]:
    """Groups weights by kind, in the order in which kinds appear. The first number in a name is its layer."""
    found: dict[str, list[tuple[int | None, Spectrum]]] = {}
    for spectrum in spectra:
        numbers = _INTEGER.findall(spectrum.name)
        key = _INTEGER.sub("*", spectrum.name.removesuffix(".weight"))
        found.setdefault(key, []).append((int(numbers[0]) if numbers else None, spectrum))
    short = {key: key.partition("*.")[2] if "*." in key else ".".join(key.split(".")[-2:]) for key in found}
    names = [short[key] if list(short.values()).count(short[key]) == 1 else key for key in found]
    return [
        Group(name, tuple(sorted(members, key=lambda member: (member[0] or 0, member[1].name))))
        for name, members in zip(names, found.values(), strict=True)
    ]


def view(title: str, spectra: Sequence[Spectrum]) -> View:
    """Draws everything about a list of at least one spectrum."""
    limit = known_rank(spectra)
    curve = uniform(spectra, _dense(limit))
    marks = uniform(spectra, doubling(limit))
    best = budgeted(spectra, [point.nbytes for point in curve])
    groups = groups_of(spectra)
    lead = (
        f"{len(spectra)} weights changed. This is what LoRA factors of each rank would keep of the change, and how "
        "large they would be."
    )
    layers = [layer for group in groups for layer, _ in group.members if layer is not None]
    depth = max(layers, default=0)
    shown = sorted(groups, key=lambda group: -group.total)[:PANELS]
    panels = tuple(_panel(group, curve, depth, sum(g.total for g in groups)) for group in groups if group in shown)
    omitted = f"{len(groups) - len(shown)} kinds with smaller changes are not drawn." if len(groups) > PANELS else ""
    return View(
        title=title,
        lead=lead,
        tiles=tuple(_tile(spectra, goal, limit) for goal in GOALS),
        by_rank=_by_rank(spectra, curve, marks),
        by_size=_by_size(curve, marks, best),
        rows=_rows(spectra, marks),
        panels=panels,
        omitted=omitted,
        heat=_heat(groups),
    )


def _dense(limit: int) -> list[int]:
    """About six ranks per doubling: enough for smooth curves, and few enough for a thousand lines."""
    steps = range(6 * limit.bit_length() + 1)
    return sorted({min(limit, round(2 ** (step / 6))) for step in steps})


def _tile(spectra: Sequence[Spectrum], goal: float, limit: int) -> tuple[str, str, str]:
    """The goal, the least uniform rank that meets it, and the size at that rank."""
    asked = f"to keep {100 * goal:g} % of the change"
    low, high = 0, limit + 1
    while high - low > 1:  # the energy rises with the rank
        middle = (low + high) // 2
        low, high = (low, middle) if uniform(spectra, [middle])[0].energy >= goal else (middle, high)
    if high > limit:
        return asked, f"rank > {limit}", "more than was measured"
    point = uniform(spectra, [high])[0]
    return asked, f"rank {high}", nbytes_text(point.nbytes)


def _by_rank(spectra: Sequence[Spectrum], curve: Sequence[Point], marks: Sequence[Point]) -> str:
    import numpy as np

    ranks = [point.rank or 0 for point in curve]
    plot = _plot(Scale(1, max(2, ranks[-1]), logarithmic=True))
    single = np.array([[spectrum.residual(rank) for spectrum in spectra] for rank in ranks])  # (ranks, weights)
    low, high = (list(zip(ranks, np.percentile(single, share, axis=1), strict=True)) for share in (10, 90))
    body = _frame(plot, [(rank, str(rank)) for rank in doubling(ranks[-1]) if _is_apart(rank, ranks[-1])], "rank")
    body += plot.area(high, low, "band")
    body += plot.line([(point.rank or 0, point.residual) for point in curve], "line one")
    body += "".join(plot.dot(mark.rank or 0, mark.residual, "one", _mark_title(mark)) for mark in marks)
    return plot.svg(body, "Error against rank, the same rank for all weights")


def _is_apart(rank: int, last: int) -> bool:
    """Whether a label does not overlap the last one."""
    return rank == last or rank * 1.4 < last


def _by_size(curve: Sequence[Point], marks: Sequence[Point], best: Sequence[Point]) -> str:
    low, high = curve[0].nbytes, max(curve[-1].nbytes, curve[0].nbytes + 1)
    plot = _plot(Scale(low, high, logarithmic=True))
    same = [(point.nbytes, point.residual) for point in curve]
    # drawn at the size that was allowed; less than one column of it is left unused
    spread = [(point.nbytes, chosen.residual) for point, chosen in zip(curve, best, strict=True)]
    certain = next((index for index, chosen in enumerate(best) if chosen.limited), len(best))
    body = _frame(
        plot,
        [(tick, nbytes_text(tick).replace(".00", "").replace(".0", "")) for tick in round_ticks(low, high)],
        "size of the factors",
    )
    body += plot.area(same, spread, "gain") + plot.line(same, "line one")
    body += plot.line(spread[:certain], "line two") if certain else ""
    body += plot.line(spread[max(0, certain - 1) :], "line two guess") if certain < len(best) else ""
    for mark in marks:
        body += plot.dot(mark.nbytes, mark.residual, "one", _mark_title(mark))
    for (size, residual), chosen in zip(spread, best, strict=True):
        said = " or less" if chosen.limited else ""
        title = f"best ranks within {nbytes_text(size)}: error {percent(residual)}{said}"
        body += plot.dot(size, residual, "two quiet", title)
    for mark in marks[1:-1]:
        body += plot.note(mark.nbytes, mark.residual, f"r={mark.rank}", "label one", "start", (6, -6))
    return plot.svg(body, "Error against size, the same rank for all weights and the best ranks")


def _plot(x: Scale) -> Plot:
    return Plot(460, 330, (50, 30, 48, 42), x, Scale(0, 1))


def _frame(plot: Plot, ticks: Sequence[tuple[float, str]], below: str) -> str:
    middle = plot.note((plot.x.low * plot.x.high) ** 0.5, 0, below, "name", "middle", (0, 34))
    heads = text_at(8, 14, "error", "name") + text_at(plot.width - 6, 14, "energy kept", "name", "end")
    return plot.columns(ticks) + plot.rows(_ERRORS) + plot.rows_right(_ENERGIES) + heads + middle


def _mark_title(point: Point) -> str:
    return (
        f"rank {point.rank}, {nbytes_text(point.nbytes)}: error {percent(point.residual)}, "
        f"energy {percent(point.energy)}"
    )


def _rows(spectra: Sequence[Spectrum], marks: Sequence[Point]) -> tuple[tuple[str, ...], ...]:
    best = budgeted(spectra, [mark.nbytes for mark in marks])
    return tuple(
        (
            str(mark.rank),
            nbytes_text(mark.nbytes),
            percent(mark.residual),
            percent(mark.energy),
            ("≤ " if chosen.limited else "") + percent(chosen.residual),
            ("≥ " if chosen.limited else "") + percent(chosen.energy),
        )
        for mark, chosen in zip(marks, best, strict=True)
    )


def _panel(group: Group, curve: Sequence[Point], depth: int, everything: float) -> str:
    """One kind of weight: a line for each weight, darker for deeper layers, on top of all weights in grey."""
    ranks = [point.rank or 0 for point in curve]
    plot = Plot(210, 160, (42, 40, 8, 24), Scale(1, max(2, ranks[-1]), logarithmic=True), Scale(0, 1))
    body = text_at(4, 14, _short(group.name, 24), "head", title=group.name)
    body += text_at(4, 29, f"{percent(group.total / everything)} of the change", "tick")
    body += plot.rows([(0, "0 %"), (0.5, "50 %"), (1, "100 %")])
    body += plot.columns([(rank, str(rank)) for rank in ranks if rank in (1, 8, 64, 512)], grid=False)
    body += plot.line([(point.rank or 0, point.residual) for point in curve], "line all")
    width = "thin" if len(group.members) <= 16 else "many"
    for layer, spectrum in group.members:
        known = [rank for rank in ranks if rank <= len(spectrum.values)]
        shade = f"d{_shade(0.6 if layer is None else layer / max(1, depth))}"
        needed = spectrum.needed(HEAT)
        said = f"rank {needed}" if needed else f"more than rank {len(spectrum.values)}"
        title = f"{spectrum.name}: {said} for {100 * HEAT:g} % of its energy"
        body += plot.line([(rank, spectrum.residual(rank)) for rank in known], f"line {width} {shade}", title)
    return plot.svg(body, f"Error against rank of {group.name}")


def _shade(share: float) -> int:
    return min(SHADES - 1, int(share * SHADES))


def _heat(groups: Sequence[Group]) -> tuple[str, int, int] | None:
    """A map of the rank that each weight needs, by kind (rows) and layer (columns), with its width and height; None if
    too large."""
    layers = sorted({layer for group in groups for layer, _ in group.members if layer is not None})
    alone = [(group.name, spectrum) for group in groups for layer, spectrum in group.members if layer is None]
    stacked = [group for group in groups if any(layer is not None for layer, _ in group.members)]
    if len(stacked) + len(alone) > MAP_ROWS or len(layers) > MAP_COLUMNS:
        return None
    needs = [_needed(spectrum) for group in groups for _, spectrum in group.members]
    scale = Scale(max(1, min(needs)), max(2, *needs), logarithmic=True)
    left, tall = 196, 22
    wide = max(7.0, min(36.0, 760 / max(1, len(layers))))
    skip = max(1, round(24 / wide))
    body = "".join(
        text_at(left + (index + 0.5) * wide - 0.75, 12, str(layer), "tick", "middle")
        for index, layer in enumerate(layers)
        if index % skip == 0
    )
    body += text_at(left - 8, 12, "layer", "tick", "end") if layers else ""
    down = 20.0
    for group in stacked:
        body += _row_name(group.name, left, down + tall / 2)
        for index, layer in enumerate(layers):
            members = [spectrum for place, spectrum in group.members if place == layer]
            if members:
                body += _cell(members, scale, left + index * wide, down, wide, tall)
        down += tall
    down += 8 if stacked and alone else 0
    for name, spectrum in alone:
        body += _row_name(name, left, down + tall / 2)
        body += _cell([spectrum], scale, left, down, max(wide, 36.0), tall)
        down += tall
    width, height = round(left + max(len(layers) * wide, 140)) + 4, round(down) + 4
    return svg(width, height, body, f"Rank that holds {100 * HEAT:g} % of the energy, by kind and layer"), width, height


def _row_name(name: str, left: int, middle: float) -> str:
    return text_at(left - 8, middle + 3, _short(name, 28), "tick", "end", name)


def _short(name: str, room: int) -> str:
    """A name, cut to the end that fits, at a dot if possible."""
    if len(name) <= room:
        return name
    end = name[-(room - 1) :]
    return f"…{end.partition('.')[2] or end}"


def _needed(spectrum: Spectrum) -> int:
    """The rank for the map's share of energy; the number of known values plus one if they do not reach it."""
    return spectrum.needed(HEAT) or len(spectrum.values) + 1


def _cell(members: Sequence[Spectrum], scale: Scale, across: float, down: float, wide: float, tall: float) -> str:
    """One cell of the map; it shows the median if several weights share it."""
    needs = sorted(members, key=_needed)
    middle = needs[len(needs) // 2]
    rank, beyond = _needed(middle), middle.needed(HEAT) is None
    text = f">{len(middle.values)}" if beyond else str(rank)
    what = middle.name if len(members) == 1 else f"{len(members)} weights such as {middle.name}"
    return cell(across, down, wide, tall, f"h{_shade(scale.share(rank))}", text, f"{what}: rank {text}")
