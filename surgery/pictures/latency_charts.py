"""Charts of the latency of graphs relative to a reference: ratios with intervals, and the blocks they are based on.

Everything is shown as a change in per cent of the reference's time, and every chart shows the margin as a band. All
figures come from the report; this module computes only positions and knows no file. The same report gives the same
bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from surgery.onnx.timing.record import Comparison
from surgery.pictures.charts import Plot, Scale, svg, text_at

SIGNS = {"equivalent": "=", "slower": "▲", "faster": "▼", "inconclusive": "?"}
WIDE, NARROW = 860, 390  # width of the ratio chart in pixels, for desktops and for phones
_PANEL = (340, 230)  # width and height of the block charts in pixels
_BINS = 40
_STEEP = 6  # if a change exceeds this many margins, the ratio chart's axis is stretched around zero
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000)  # per cent


def change(ratio: float) -> str:
    """A ratio as a change in per cent: 1.0123 is +1.23 %."""
    return f"{_signed(100 * (ratio - 1))}\N{NO-BREAK SPACE}%"


def span(interval: tuple[float, float]) -> str:
    """An interval of ratios as changes in per cent."""
    low, high = (_signed(100 * (ratio - 1)) for ratio in interval)
    return f"{low} … {high} %".replace(" ", "\N{NO-BREAK SPACE}")


def _signed(share: float) -> str:
    decimals = 2 if abs(share) < 9.995 else 1 if abs(share) < 99.95 else 0
    text = f"{share:+,.{decimals}f}".replace("-", "−")
    return text.replace("−0.00", "±0.00").replace("+0.00", "±0.00")


def ratio_chart(
    comparisons: Sequence[Comparison],
    margin: float,
    names: Mapping[str, str],
    width: int,
    details: Mapping[str, str] | None = None,
) -> tuple[str, int]:
    """Draws all ratios with their intervals on the band of the margin, controls in grey. Returns the height as well.

    Args:
        comparisons: the comparisons, one per row.
        margin: the margin that was declared.
        names: names of the graphs, by path.
        width: width in pixels.
        details: a line of description for each graph, by path. Rows are then larger, and show the input's shape only
            if there are several shapes.
    """
    axis, place, ticks = _axis(comparisons, margin)
    narrow = width < 600
    row, left, right, top = (72, 14, 14, 26) if narrow else (50, 220, 196, 26)
    room = 22 if narrow else 28
    if details is not None:
        row, left, room = (90, left, 30) if narrow else (row, 340, 44)
    several = len({comparison.shape for comparison in comparisons}) > 1
    height = top + row * len(comparisons) + 44
    plot = Plot(width, height, (left, top, right, 44), axis, Scale(0, 1))
    edge = -100 * margin / (1 + margin), 100 * margin  # the two one-sided tests' bounds: ±log(1 + margin)
    band = [place(each) for each in edge]
    body = plot.area([(band[0], 1), (band[1], 1)], [(band[0], 0), (band[1], 0)], "band")
    body += _below(plot, [(place(tick), _tick(tick)) for tick in ticks], height - 44)
    body += plot.line([(0, 0), (0, 1)], "base")
    stretched = ", axis stretched" if place is not float else ""
    about = f"change of the time{stretched}; band: margin of {100 * margin:g} %"
    body += text_at((left + width - right) / 2, height - 10, about, "name", "middle")
    for index, comparison in enumerate(comparisons):
        down = top + row * index
        name = names[comparison.graph]
        shape = f"{comparison.shape[0]}×{comparison.shape[1]}"
        about = f"{shape}, {comparison.role}" if comparison.role != "candidate" else shape
        if details is not None:
            about = f"{details[comparison.graph]}; {about}" if several else details[comparison.graph]
        found = f"{change(comparison.ratio)}  ({span(comparison.interval)})"
        said = f"{SIGNS[comparison.verdict]} {comparison.verdict}"
        line = down + (row - 32 if narrow else 20)
        if narrow:
            first = cut(name, room) if details is not None else f"{cut(name, room)}, {about}"
            body += text_at(left, down + 8, first, "head", title=comparison.graph)
            body += text_at(width - right, down + 8, said, f"head {comparison.verdict}", "end")
            body += text_at(left, down + 24, about, "tick") if details is not None else ""
            body += text_at(left, line - 16, found, "tick")
        else:
            body += text_at(14, down + 18, cut(name, room), "head", title=comparison.graph)
            body += text_at(14, down + 34, about, "tick")
            body += text_at(width - right + 16, down + 18, said, f"head {comparison.verdict}")
            body += text_at(width - right + 16, down + 34, found, "tick")
        body += _interval(plot, place, comparison.control_ratio, comparison.control_interval, line + 9, "control")
        body += _interval(plot, place, comparison.ratio, comparison.interval, line, comparison.verdict)
    return svg(width, height, body, "Time against the reference, with intervals, and the band of the margin"), height


def _axis(comparisons: Sequence[Comparison], margin: float) -> tuple[Scale, Callable[[float], float], list[float]]:
    """A scale for changes in per cent, the function that maps a change to it, and its ticks. If a change is so large
    that the margin would be invisible, the scale is stretched around zero (arcsinh)."""
    band = 100 * margin
    ends = [r for each in comparisons for r in (*each.interval, *each.control_interval)]
    low = min(-1.6 * band, *(100 * (ratio - 1) for ratio in ends))
    high = max(1.6 * band, *(100 * (ratio - 1) for ratio in ends))
    steep = max(-low, high) > _STEEP * band
    place: Callable[[float], float] = (lambda value: math.asinh(2 * value / band)) if steep else float
    pad = 0.04 * (place(high) - place(low))
    scale = Scale(place(low) - pad, place(high) + pad)
    ticks = [0.0, *(sign * tick for tick in _TICKS for sign in (1, -1) if low <= sign * tick <= high)]
    return scale, place, _apart(ticks, lambda tick: scale.share(place(tick)))


def _apart(ticks: Sequence[float], share: Callable[[float], float]) -> list[float]:
    """Zero, and the other ticks whose labels have room, taken from the outermost inwards."""
    kept = [ticks[0]]
    for tick in sorted(ticks[1:], key=lambda each: -abs(each)):
        if all(abs(share(tick) - share(other)) > 0.11 for other in kept):
            kept.append(tick)
    return sorted(kept)


def _tick(value: float) -> str:
    return "0" if value == 0 else f"{value:+g} %".replace("-", "−")


def _below(plot: Plot, ticks: Sequence[tuple[float, str]], down: float) -> str:
    """Faint vertical lines, with labels below the chart."""
    lines = "".join(plot.line([(value, plot.y.low), (value, plot.y.high)], "grid") for value, _ in ticks)
    return lines + "".join(text_at(plot.at(value, 0)[0], down + 15, label, "tick", "middle") for value, label in ticks)


def _interval(
    plot: Plot, place: Callable[[float], float], ratio: float, interval: tuple[float, float], down: float, style: str
) -> str:
    """An interval as a bar, with the ratio as a dot on it."""
    low, middle, high = (plot.at(place(100 * (each - 1)), 0)[0] for each in (interval[0], ratio, interval[1]))
    title = f"<title>{change(ratio)} ({span(interval)})</title>"
    bar = f'<path class="bar" d="M{low:.1f},{down:.1f}L{max(high, low + 1):.1f},{down:.1f}"/>'
    dot = f'<circle cx="{middle:.1f}" cy="{down:.1f}" r="{3 if style == "control" else 5}"/>'
    return f'<g class="mark {style}">{title}{bar}{dot}</g>'


def cut(name: str, room: int) -> str:
    """A name, cut to its end if it does not fit."""
    return name if len(name) <= room else f"…{name[1 - room :]}"


def _range(comparison: Comparison, margin: float) -> Scale:
    """A scale in per cent that covers the margin and all but the outermost blocks of both series."""
    blocks = sorted(_changes(comparison) + _changes_of_control(comparison))
    spared = len(blocks) // 50
    low = min(blocks[spared], -160 * margin)
    high = max(blocks[-1 - spared], 160 * margin)
    pad = 0.06 * (high - low)
    return Scale(low - pad, high + pad)


def _changes(comparison: Comparison) -> list[float]:
    """Every block of the graph as a change in per cent, in the order of measurement."""
    return [100 * math.expm1(value) for epoch in comparison.epochs for value in epoch.log_ratios]


def _changes_of_control(comparison: Comparison) -> list[float]:
    return [100 * math.expm1(value) for epoch in comparison.epochs for value in epoch.control]


def _round_marks(scale: Scale) -> list[float]:
    """About five round values in a linear range, including zero if it is in the range."""
    rough = (scale.high - scale.low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 5, 10) if each * power >= rough)
    return [index * step for index in range(math.ceil(scale.low / step), math.floor(scale.high / step) + 1)]


def distribution(comparison: Comparison, margin: float, name: str, reference: str) -> str:
    """A histogram of the blocks' changes: the graph's upwards, those of the reference against itself downwards."""
    width, height = _PANEL
    x = _range(comparison, margin)
    counts = [_counted(values, x) for values in (_changes(comparison), _changes_of_control(comparison))]
    most = max(*counts[0], *counts[1])
    plot = Plot(width, height, (22, 26, 22, 38), x, Scale(-1.3 * most, 1.05 * most))  # room for a label below
    body = _band(plot, margin, across=True)
    body += _below(plot, [(tick, _tick(round(tick, 6))) for tick in _round_marks(x)], height - 38)
    step = (x.high - x.low) / _BINS
    for sign, numbers, style in ((1, counts[0], "bars one"), (-1, counts[1], "bars all")):
        d = ""
        for index, count in enumerate(numbers):
            if count:
                start = plot.at(x.low + index * step, 0)
                end = plot.at(x.low + (index + 1) * step, sign * count)
                d += f"M{start[0]:.1f},{start[1]:.1f}V{end[1]:.1f}H{end[0] - 0.8:.1f}V{start[1]:.1f}Z"
        body += f'<path class="{style}" d="{d}"/>'
    body += plot.line([(x.low, 0), (x.high, 0)], "base")
    body += text_at(24, 18, f"{cut(name, 18)} against {cut(reference, 18)}", "label one")
    body += text_at(24, height - 44, f"{cut(reference, 24)} against itself", "label control")
    body += text_at(width / 2, height - 6, "change of the time, by block", "name", "middle")
    return plot.svg(body, f"Distribution of the blocks of {name} and of the control")


def _counted(values: Sequence[float], x: Scale) -> list[int]:
    """Counts by bin; values beyond the ends are counted in the outermost bins."""
    counts = [0] * _BINS
    for value in values:
        counts[min(_BINS - 1, int(x.share(value) * _BINS))] += 1
    return counts


def drift(comparison: Comparison, margin: float, name: str) -> str:
    """Every block at the time of its measurement, controls in grey, and the median of each set of sessions."""
    plot = _over_time(comparison, _range(comparison, margin))
    body = _band(plot, margin, across=False) + _rows(plot)
    body += _dots(plot, _times_of_control(comparison), _changes_of_control(comparison), "dots all")
    body += _dots(plot, _times(comparison), _changes(comparison), "dots one")
    for epoch in comparison.epochs:
        middle = 100 * math.expm1(median(epoch.log_ratios))
        title = f"median of these sessions: {_signed(middle)} %"
        body += plot.line([(min(epoch.at), middle), (max(epoch.at), middle)], "line one", title)
    body += text_at(6, 14, f"{cut(name, 22)} against the reference", "name")
    return plot.svg(body, f"Blocks of {name} over time")


def machine_drift(comparison: Comparison, reference: str) -> str:
    """The reference's own time in every block as a change from its median, which shows the machine's drift."""
    seconds = [each for epoch in comparison.epochs for each in epoch.seconds]
    middle = median(seconds)
    values = [100 * (each / middle - 1) for each in seconds]
    ordered = sorted(values)
    spared = len(values) // 50
    low, high = min(ordered[spared], -1.0), max(ordered[-1 - spared], 1.0)
    plot = _over_time(comparison, Scale(low - 0.06 * (high - low), high + 0.06 * (high - low)))
    body = _rows(plot) + _dots(plot, _times(comparison), values, "dots all")
    body += text_at(6, 14, f"{cut(reference, 22)}, against its median", "name")
    return plot.svg(body, f"The time of {reference} itself over time")


def _over_time(comparison: Comparison, y: Scale) -> Plot:
    width, height = _PANEL
    times = _times(comparison) + _times_of_control(comparison)
    first = min(times)
    return Plot(width, height, (62, 26, 12, 38), Scale(first, max(*times, first + 1e-3)), y)


def _rows(plot: Plot) -> str:
    """Axis labels: changes at the left, seconds below."""
    body = ""
    for tick in _round_marks(plot.y):
        body += plot.line([(plot.x.low, tick), (plot.x.high, tick)], "base" if tick == 0 else "grid")
        body += plot.note(plot.x.low, tick, _tick(round(tick, 6)), "tick", "end", (-6, 4))
    body += plot.columns([(tick, f"{tick:.6g}") for tick in _round_marks(plot.x)], grid=False)
    return body + text_at(plot.width / 2, plot.height - 6, "seconds since the start", "name", "middle")


def _dots(plot: Plot, times: Sequence[float], values: Sequence[float], style: str) -> str:
    places = [plot.at(at, value) for at, value in zip(times, values, strict=True)]
    return f'<path class="{style}" d="{"".join(f"M{x:.1f},{y:.1f}h0" for x, y in places)}"/>'


def _times(comparison: Comparison) -> list[float]:
    return [at for epoch in comparison.epochs for at in epoch.at]


def _times_of_control(comparison: Comparison) -> list[float]:
    return [at for epoch in comparison.epochs for at in epoch.control_at]


def _band(plot: Plot, margin: float, *, across: bool) -> str:
    low, high = -100 * margin / (1 + margin), 100 * margin
    if across:
        return plot.area([(low, plot.y.high), (high, plot.y.high)], [(low, plot.y.low), (high, plot.y.low)], "band")
    return plot.area([(plot.x.low, high), (plot.x.high, high)], [(plot.x.low, low), (plot.x.high, low)], "band")
