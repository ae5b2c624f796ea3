"""A view of spectra as one self-contained file: a page (HTML) or a poster (SVG).

The file has no script and needs no network; it is light or dark like the reader's system. This module knows no file and
computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from surgery.pictures.charts import escape, text_at
from surgery.pictures.picture import HEAT, SHADES, View, view
from surgery.pictures.style import document, placed, sheet, variables
from surgery.ranks.spectra import Spectrum

_HEADS = ("rank", "size", "error", "energy", "error", "energy")
_LIGHT = {
    "d": ("#8cc5dd", "#62a9d0", "#3f8bc0", "#2a6cab", "#1c4e8d", "#12316b"),
    "h": ("#e4eff7", "#bfdaec", "#8bbbdd", "#5094c8", "#246aa8", "#123f73"),
    "t": ("#1b1f24", "#1b1f24", "#1b1f24", "#ffffff", "#ffffff", "#ffffff"),
}
_DARK = {
    "d": ("#2f6785", "#3c80a8", "#519ac6", "#73b4dd", "#9fcdec", "#d3e9f8"),
    "h": ("#1d2b38", "#23445f", "#2c628c", "#4186b8", "#72addb", "#b9daf2"),
    "t": ("#e8eaed", "#e8eaed", "#ffffff", "#ffffff", "#14171b", "#14171b"),
}
_SHADES = variables(_LIGHT, _DARK) + "".join(
    f".d{i}{{stroke:var(--d{i})}}.h{i} rect{{fill:var(--h{i})}}.h{i} text{{fill:var(--t{i})}}" for i in range(SHADES)
)
_RAMPS = """
.ramp{display:inline-block;width:92px;height:9px;border-radius:5px;margin:0 6px}
.deep{background:linear-gradient(90deg,var(--d0),var(--d1),var(--d2),var(--d3),var(--d4),var(--d5))}
.hot{background:linear-gradient(90deg,var(--h0),var(--h1),var(--h2),var(--h3),var(--h4),var(--h5))}
"""
_POSTER = (
    ".title{font-size:24px;font-weight:600;fill:var(--ink)}.figure{font-size:13px;"
    "fill:var(--ink);font-variant-numeric:tabular-nums}text.two{fill:var(--two)}"
)
_MEANING = (
    "Error is ‖ΔW − BA‖ / ‖ΔW‖ and energy its counterpart 1 − error², over all weights together; ΔW is tuned − base, "
    "BA the best factors of a rank (Eckart and Young). Sizes are those of the factors alone. Both are measured from "
    "singular values, before the factors are rounded to their dtype."
)


def page(title: str, spectra: Sequence[Spectrum]) -> str:
    """The HTML document."""
    shown = view(title, spectra)
    tiles = "".join(
        f'<div class="tile"><span>{escape(asked)}</span><strong>{escape(answer)}</strong>'
        f"<span>{escape(size)}</span></div>"
        for asked, answer, size in shown.tiles
    )
    body = "".join(
        (
            f"<h1>{escape(title)}: which rank?</h1>\n<p>{escape(shown.lead)}</p>\n",
            f'<div class="tiles">{tiles}</div>\n',
            '<h2>Error, rank and size</h2>\n<p><b class="one">Blue</b>: the same rank for every weight; the shaded '
            'band holds four fifths of the single weights. <b class="two">Orange</b>: the same size, but each weight '
            "with the rank that captures most (<code>--budget</code>); dotted where that needs more singular values "
            "than were measured.</p>\n",
            f'<div class="pair"><div>{shown.by_rank}</div><div>{shown.by_size}</div></div>\n',
            f'<h2>In figures</h2>\n<div class="wide">{_table(shown.rows)}</div>\n',
            _panels(shown),
            _map(shown),
            f"<footer>{escape(_MEANING)}</footer>\n",
        )
    )
    return document(f"{title}: which rank?", body, _SHADES + _RAMPS)


def poster(title: str, spectra: Sequence[Spectrum]) -> str:
    """The SVG document: the charts, and the table below them."""
    shown = view(title, spectra)
    parts = [text_at(30, 46, f"{title}: which rank?", "title"), text_at(30, 70, shown.lead, "name")]
    down = 96.0
    parts += [placed(shown.by_rank, 22, down, 460, 330), placed(shown.by_size, 508, down, 460, 330)]
    parts.append(text_at(74, down + 352, "blue: the same rank for every weight; band: four fifths of them", "name"))
    parts.append(text_at(560, down + 352, "orange: the same size, the best rank for each weight", "name"))
    down += 394
    parts.append(text_at(460, down, "same rank everywhere", "name", "end"))
    parts.append(text_at(700, down, "best ranks, same size", "name two", "end"))
    down += 21
    for index, text in enumerate(_HEADS):
        parts.append(text_at(100 + 120 * index, down, text, "name" if index < 4 else "name two", "end"))
    for row in shown.rows:
        down += 21
        for index, text in enumerate(row):
            style = "head" if index == 0 else "figure" if index < 4 else "figure two"
            parts.append(text_at(100 + 120 * index, down, text, style, "end"))
    down += 36
    for index, panel in enumerate(shown.panels):
        parts.append(placed(panel, 22 + 240 * (index % 4), down + 176 * (index // 4), 220, 168))
    down += 176 * -(-len(shown.panels) // 4) + 24
    if shown.heat:
        drawing, width, height = shown.heat
        scale = min(1.0, 946 / width)
        parts.append(text_at(30, down, f"Rank that holds {100 * HEAT:g} % of each weight's energy", "head"))
        parts.append(placed(drawing, 22, down + 12, scale * width, scale * height))
        down += 24 + scale * height
    return sheet("".join(parts), 990, round(down + 20), _SHADES + _POSTER)


def _table(rows: Sequence[Sequence[str]]) -> str:
    classes = ("lead", "", "", "", "two", "two")
    heads = "".join(f"<th>{head}</th>" for head in _HEADS)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{style}">{escape(text)}</td>' for style, text in zip(classes, row, strict=True))
        + "</tr>"
        for row in rows
    )
    over = (
        '<tr><th></th><th></th><th colspan="2">same rank everywhere</th><th colspan="2">best ranks, same size</th></tr>'
    )
    return f"<table><thead>{over}<tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _panels(shown: View) -> str:
    panels = "".join(f"<div>{panel}</div>" for panel in shown.panels)
    return (
        '<h2>By kind of weight</h2>\n<p>A line for each weight, from the first layer<span class="ramp deep"></span>to '
        f"the last; in grey, all weights. {escape(shown.omitted)}</p>\n"
        f'<div class="panels">{panels}</div>\n'
    )


def _map(shown: View) -> str:
    if shown.heat is None:
        return ""
    drawing, width, _ = shown.heat
    return (
        f"<h2>Where the rank is needed</h2>\n<p>The rank that holds {100 * HEAT:g} % of each weight's energy, from low"
        '<span class="ramp hot"></span>to high, by kind and layer.</p>\n'
        f'<div class="wide"><div style="width:{width}px">{drawing}</div></div>\n'
    )
