"""The style of pictures: colours for light and dark mode, CSS classes of drawings and pages, frames of documents.

Documents are self-contained: no script, no URL, and the reader's own fonts. This module knows nothing about the
content.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from surgery.pictures.charts import escape

_LIGHT = {
    "paper": "#ffffff", "card": "#f6f7f9", "ink": "#1b1f24", "soft": "#5c6570", "faint": "#e3e6ea", "edge": "#aab2bc",
    "one": "#1f62b4", "two": "#c2570c", "gain": "#c2570c1f", "band": "#1f62b41f", "all": "#c3c9d1",
}  # fmt: skip
_DARK = {
    "paper": "#14171b", "card": "#1c2127", "ink": "#e8eaed", "soft": "#9aa4af", "faint": "#2a3038", "edge": "#5b6570",
    "one": "#6cb0f5", "two": "#f0984a", "gain": "#f0984a26", "band": "#6cb0f526", "all": "#454d57",
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
footer{margin-top:36px;border-top:1px solid var(--faint);padding-top:12px;font-size:13px;color:var(--soft)}
@media(max-width:520px){th,td{padding-left:9px}table{font-size:12.5px}.tiles{grid-template-columns:repeat(3,1fr);gap:8px}
.tile{padding:9px 10px}.tile strong{font-size:17px}.tile span{font-size:12px}}
"""


def document(title: str, body: str, own: str) -> str:
    """An HTML page. `body` is its content, `own` the styles that only this page needs."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_base()}{_PAGE}{own}</style>\n</head>\n<body>\n<main>\n"
        f"{body}</main>\n</body>\n</html>\n"
    )


def sheet(body: str, width: int, height: int, own: str) -> str:
    """An SVG document of this size in pixels. `body` is its content, `own` the styles that only it needs."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<style>{_base()}{own}</style><rect width="{width}" height="{height}" fill="var(--paper)"/>{body}</svg>\n'
    )


def placed(drawing: str, across: float, down: float, width: float, height: float) -> str:
    """A drawing, positioned inside another one."""
    box = f'x="{across:.1f}" y="{down:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return re.sub(r"^<svg ", f"<svg {box} ", drawing)


def variables(light: Mapping[str, str | Sequence[str]], dark: Mapping[str, str | Sequence[str]]) -> str:
    """CSS variables of colours by name, for light and dark mode. Several colours under one name are numbered."""
    return f":root{{{_flat(light)}}}\n@media(prefers-color-scheme:dark){{:root{{{_flat(dark)}}}}}\n"


def _base() -> str:
    return f"{variables(_LIGHT, _DARK)}:root{{{_FONT}}}{_DRAWING}"


def _flat(colours: Mapping[str, str | Sequence[str]]) -> str:
    flat = [
        (f"{name}{index}" if len(values) > 1 else name, value)
        for name, given in colours.items()
        for values in [(given,) if isinstance(given, str) else given]
        for index, value in enumerate(values)
    ]
    return ";".join(f"--{name}:{value}" for name, value in flat)
