"""Lines, areas, axes and cells as SVG text.

Colours come from the classes of the page's style. Coordinates have one decimal, and text is escaped here, so that the
same data always gives the same bytes. This module knows nothing about weights.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`, linear or logarithmic."""

    low: float
    high: float
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """The position of a value: 0 at the low end, 1 at the high end. Values beyond are clamped to the nearer end."""
        place = math.log if self.logarithmic else float
        low, high = place(self.low), place(self.high)
        return 0.5 if high == low else min(1.0, max(0.0, (place(value) - low) / (high - low)))


@dataclass(frozen=True)
class Plot:
    """A rectangle with two axes. Margins in pixels: left, top, right, bottom."""

    width: int
    height: int
    margins: tuple[int, int, int, int]
    x: Scale
    y: Scale

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The pixel position of a point."""
        left, top, right, bottom = self.margins
        across = left + self.x.share(x) * (self.width - left - right)
        down = self.height - bottom - self.y.share(y) * (self.height - top - bottom)
        return across, down

    def line(self, points: Iterable[tuple[float, float]], style: str, title: str = "") -> str:
        """A line through points."""
        return f'<path class="{style}" d="{self._path(points)}">{_title(title)}</path>'

    def area(self, upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]], style: str) -> str:
        """The area between two lines."""
        return f'<path class="{style}" d="{self._path([*upper, *reversed(lower)])}Z"/>'

    def _path(self, points: Iterable[tuple[float, float]]) -> str:
        return "M" + "L".join(_pair(*self.at(*point)) for point in points)

    def dot(self, x: float, y: float, style: str, title: str) -> str:
        """A mark inside a larger, invisible disc, so that it is easy to point at."""
        across, down = self.at(x, y)
        where = f'cx="{across:.1f}" cy="{down:.1f}"'
        return f'<g class="{style}">{_title(title)}<circle class="aim" {where} r="11"/><circle {where} r="3.2"/></g>'

    def note(
        self, x: float, y: float, text: str, style: str, anchor: str = "start", shift: tuple[float, float] = (0, 0)
    ) -> str:
        """Text at a point, shifted by some pixels."""
        across, down = self.at(x, y)
        return text_at(across + shift[0], down + shift[1], text, style, anchor)

    def columns(self, ticks: Iterable[tuple[float, str]], *, grid: bool = True) -> str:
        """Labels below the axis, with faint vertical lines."""
        return "".join(
            (self.line([(value, self.y.low), (value, self.y.high)], "grid") if grid else "")
            + self.note(value, self.y.low, label, "tick", "middle", (0, 16))
            for value, label in ticks
        )

    def rows(self, ticks: Iterable[tuple[float, str]]) -> str:
        """Labels at the left, with faint horizontal lines."""
        return "".join(
            self.line([(self.x.low, value), (self.x.high, value)], "base" if value == self.y.low else "grid")
            + self.note(self.x.low, value, label, "tick", "end", (-7, 4))
            for value, label in ticks
        )

    def rows_right(self, ticks: Iterable[tuple[float, str]]) -> str:
        """Labels at the right with short ticks: a second scale for the same axis."""
        edge = self.width - self.margins[2]
        parts = []
        for value, label in ticks:
            down = self.at(self.x.high, value)[1]
            parts.append(f'<path class="stroke" d="M{_pair(edge, down)}L{_pair(edge + 4, down)}"/>')
            parts.append(text_at(edge + 8, down + 4, label, "tick"))
        return "".join(parts)

    def svg(self, body: str, label: str) -> str:
        """The whole chart, with a description for screen readers."""
        return svg(self.width, self.height, body, label)


def svg(width: int, height: int, body: str, label: str) -> str:
    """An SVG element that scales with the space it has on the page."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}">{body}</svg>'
    )


def text_at(across: float, down: float, text: str, style: str, anchor: str = "start", title: str = "") -> str:
    """Text at a pixel position."""
    end = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{style}" x="{across:.1f}" y="{down:.1f}"{end}>{escape(text)}{_title(title)}</text>'


def cell(across: float, down: float, width: float, height: float, style: str, text: str, title: str) -> str:
    """A rectangle, with text in the middle if there is room for it."""
    box = f'x="{across:.1f}" y="{down:.1f}" width="{width - 1.5:.1f}" height="{height - 1.5:.1f}" rx="2"'
    room = width >= 7 * len(text) + 4
    shown = text_at(across + (width - 1.5) / 2, down + height / 2 + 3.5, text, "", "middle") if room else ""
    return f'<g class="cell {style}">{_title(title)}<rect {box}/>{shown}</g>'


def escape(text: str) -> str:
    """Escapes text for use inside elements and attributes."""
    return html.escape(text)


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _pair(across: float, down: float) -> str:
    return f"{across:.1f},{down:.1f}"


def nbytes_text(count: float) -> str:
    """A number of bytes with three digits and a unit, such as 19.0 MB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        del units[0]
    return f"{count:.0f} {units[0]}" if count >= 99.95 or len(units) == 5 else f"{count:#.3g} {units[0]}"


def percent(share: float) -> str:
    """A share in per cent with one decimal; with more decimals only close to 0 or 100 %."""
    rest = min(share, 1 - share)
    decimals = 1 if rest >= 0.001 or rest <= 0 else 2 if rest >= 0.0001 else 3
    return f"{share:.{decimals}%}".replace("%", " %")


def round_ticks(low: float, high: float) -> list[float]:
    """Tick values 1, 2 and 5 times powers of ten within a logarithmic range; fewer if the range is wide."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 2 else (1, 3) if last - first <= 3 else (1,)
    return [step * 10.0**power for power in range(first, last + 1) for step in steps if low <= step * 10**power <= high]
