"""A view of spectra as one self-contained file: a page (HTML) or a poster (SVG).

No script and no network; light or dark as the reader's system is. Knows no file and computes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from surgery.curve import Spectrum
from surgery.pictures.charts import escape, text_at
from surgery.pictures.picture import HEAT, SHADES, View, view

_HEADS = ("rank", "size", "error", "energy", "error", "energy")
_LIGHT = {
    "paper": "#ffffff", "card": "#f6f7f9", "ink": "#1b1f24", "soft": "#5c6570", "faint": "#e3e6ea", "edge": "#aab2bc",
    "one": "#1f62b4", "two": "#c2570c", "gain": "#c2570c1f", "band": "#1f62b41f", "all": "#c3c9d1",
    "d": ("#8cc5dd", "#62a9d0", "#3f8bc0", "#2a6cab", "#1c4e8d", "#12316b"),
    "h": ("#e4eff7", "#bfdaec", "#8bbbdd", "#5094c8", "#246aa8", "#123f73"),
    "t": ("#1b1f24", "#1b1f24", "#1b1f24", "#ffffff", "#ffffff", "#ffffff"),
}  # fmt: skip
_DARK = {
    "paper": "#14171b", "card": "#1c2127", "ink": "#e8eaed", "soft": "#9aa4af", "faint": "#2a3038", "edge": "#5b6570",
    "one": "#6cb0f5", "two": "#f0984a", "gain": "#f0984a26", "band": "#6cb0f526", "all": "#454d57",
    "d": ("#2f6785", "#3c80a8", "#519ac6", "#73b4dd", "#9fcdec", "#d3e9f8"),
    "h": ("#1d2b38", "#23445f", "#2c628c", "#4186b8", "#72addb", "#b9daf2"),
    "t": ("#e8eaed", "#e8eaed", "#ffffff", "#ffffff", "#14171b", "#14171b"),
}  # fmt: skip
_FONT = "font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"

_DRAWING = """
text{font-size:12px;fill:var(--soft)}
.head{font-size:12.5px;font-weight:600;fill:var(--ink)}
.name{font-size:12px;fill:var(--soft)}
.tick{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}
.label{font-size:11px;font-weight:600;paint-order:stroke;stroke:var(--paper);stroke-width:3px}
.grid{stroke:var(--faint);fill:none}.base,.stroke{stroke:var(--edge);fill:none}
.line{fill:none;stroke-width:2.4;stroke-linejoin:round;stroke-linecap:round}
.line.one{stroke:var(--one)}.line.two{stroke:var(--two)}.guess{stroke-dasharray:2 6}
text.one{fill:var(--one)}g.one circle{fill:var(--one)}g.two circle{fill:var(--two)}
.line.all{stroke:var(--all);stroke-width:5}.line.thin{stroke-width:1.6}.line.many{stroke-width:.8}
.line.thin:hover,.line.many:hover{stroke-width:4}
.band{fill:var(--band)}.gain{fill:var(--gain)}
g.one circle.aim,g.two circle.aim{fill:transparent}g.quiet circle{fill:transparent}
g.quiet:hover circle:last-child{fill:var(--two)}
.cell text{font-size:10.5px;font-variant-numeric:tabular-nums}.cell:hover rect{stroke:var(--ink);stroke-width:1.5}
"""
_PAGE = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);line-height:1.5;font-size:15px}
main{max-width:1040px;margin:0 auto;padding:28px 16px 48px}
h1{font-size:24px;line-height:1.25;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:16px;margin:40px 0 4px}
p{margin:0 0 12px;max-width:74ch;color:var(--soft)}
b.one{color:var(--one)}b.two{color:var(--two)}
svg{display:block;width:100%;height:auto}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0 0}
.tile{background:var(--card);border-radius:10px;padding:12px 16px}
.tile span{display:block;color:var(--soft);font-size:13px}
.tile strong{display:block;font-size:24px;line-height:1.3;font-variant-numeric:tabular-nums}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:28px}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:16px 14px}
@media(min-width:700px){.panels{grid-template-columns:repeat(auto-fill,minmax(200px,1fr))}}
.wide{overflow-x:auto}.wide svg{max-width:none}
table{border-collapse:collapse;width:100%;max-width:700px;font-variant-numeric:tabular-nums;font-size:14px}
code{white-space:nowrap}th,td{text-align:right;padding:5px 0 5px 26px;white-space:nowrap}
th:first-child,td:first-child{padding-left:0}
thead th{font-weight:500;color:var(--soft);border-bottom:1px solid var(--edge)}
thead tr:first-child th{border:0;padding-bottom:0;text-align:right}
tbody tr+tr td{border-top:1px solid var(--faint)}
td.two{color:var(--two)}td.lead{font-weight:600}
.ramp{display:inline-block;width:92px;height:9px;border-radius:5px;margin:0 6px}
.deep{background:linear-gradient(90deg,var(--d0),var(--d1),var(--d2),var(--d3),var(--d4),var(--d5))}
.hot{background:linear-gradient(90deg,var(--h0),var(--h1),var(--h2),var(--h3),var(--h4),var(--h5))}
footer{margin-top:36px;border-top:1px solid var(--faint);padding-top:12px;font-size:13px;color:var(--soft)}
@media(max-width:520px){th,td{padding-left:9px}table{font-size:12.5px}.tiles{grid-template-columns:repeat(3,1fr);gap:8px}
.tile{padding:9px 10px}.tile strong{font-size:17px}.tile span{font-size:12px}}
"""

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
    return "".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            '<meta name="viewport" content="width=device-width,initial-scale=1">\n',
            '<meta name="color-scheme" content="light dark">\n',
            f"<title>{escape(title)}: which rank?</title>\n<style>{_style()}{_PAGE}</style>\n</head>\n<body>\n<main>\n",
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
            f"<footer>{escape(_MEANING)}</footer>\n</main>\n</body>\n</html>\n",
        )
    )


def poster(title: str, spectra: Sequence[Spectrum]) -> str:
    """The SVG document: the charts and the table below each other."""
    shown = view(title, spectra)
    parts = [text_at(30, 46, f"{title}: which rank?", "title"), text_at(30, 70, shown.lead, "name")]
    down = 96.0
    parts += [_placed(shown.by_rank, 22, down, 460, 330), _placed(shown.by_size, 508, down, 460, 330)]
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
        parts.append(_placed(panel, 22 + 240 * (index % 4), down + 176 * (index // 4), 220, 168))
    down += 176 * -(-len(shown.panels) // 4) + 24
    if shown.heat:
        drawing, width, height = shown.heat
        scale = min(1.0, 946 / width)
        parts.append(text_at(30, down, f"Rank that holds {100 * HEAT:g} % of each weight's energy", "head"))
        parts.append(_placed(drawing, 22, down + 12, scale * width, scale * height))
        down += 24 + scale * height
    style = f"<style>{_style()}.title{{font-size:24px;font-weight:600;fill:var(--ink)}}.figure{{font-size:13px;"
    style += "fill:var(--ink);font-variant-numeric:tabular-nums}text.two{fill:var(--two)}</style>"
    tall = round(down + 20)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 990 {tall}" width="990" height="{tall}">{style}'
        f'<rect width="990" height="{tall}" fill="var(--paper)"/>{"".join(parts)}</svg>\n'
    )


def _placed(drawing: str, across: float, down: float, width: float, height: float) -> str:
    """A drawing at a place of another."""
    box = f'x="{across:.1f}" y="{down:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return re.sub(r"^<svg ", f"<svg {box} ", drawing)


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


def _style() -> str:
    """Colours of both schemes, and the classes of the drawings."""
    shades = "".join(
        f".d{i}{{stroke:var(--d{i})}}.h{i} rect{{fill:var(--h{i})}}.h{i} text{{fill:var(--t{i})}}"
        for i in range(SHADES)
    )
    light, dark = _variables(_LIGHT), _variables(_DARK)
    schemes = f":root{{{light};{_FONT}}}\n@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return schemes + _DRAWING + shades


def _variables(colours: Mapping[str, Sequence[str]]) -> str:
    flat = [
        (f"{name}{index}" if len(values) > 1 else name, value)
        for name, given in colours.items()
        for values in [(given,) if isinstance(given, str) else given]
        for index, value in enumerate(values)
    ]
    return ";".join(f"--{name}:{value}" for name, value in flat)
