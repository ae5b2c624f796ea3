"""The result of compare as one self-contained file: a page with the table (HTML), or a chart of the ratios (SVG).

Each graph of each adapter has one ratio, labelled with the adapter's placement and how much of it folds. The file has
no script and needs no network; it is light or dark like the reader's system. This module computes nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from surgery.onnx.timing.compared import AdapterGraph, ComparedAdapter, CompareReport
from surgery.onnx.timing.record import BenchReport, Comparison
from surgery.pictures.charts import escape, text_at
from surgery.pictures.latency_charts import NARROW, SIGNS, WIDE, change, ratio_chart, span
from surgery.pictures.latency_page import LAYOUT, MARKS, MEANING, TITLE, lead, record_section
from surgery.pictures.style import document, placed, sheet

_TABLE = """
.costs{max-width:none;font-size:13px}.costs th,.costs td{padding-left:9px}.costs td{text-align:left}
.costs th:first-child,.costs td:first-child{padding-left:0}
.costs thead tr:first-child th{text-align:left}.costs thead tr:first-child th.number,.costs td.number{text-align:right}
.costs tbody tr.more td{border-top:0}.costs td.equivalent{color:var(--one)}.costs td.slower{color:var(--two)}
.costs td.faster{color:var(--three)}ul{margin:0;padding-left:20px;color:var(--soft);overflow-wrap:anywhere}
"""
_FORMS = (
    "Merged and folded adapters are in weights of the same shapes: the graph is the base's. Widened ones are more "
    "neurons of the MLP. Half-folded ones have their first product in the projection's before them. Branches and "
    "constants are nodes. Each graph was compared with torch before it was timed."
)


def compare_page(report: CompareReport) -> str:
    """The HTML document."""
    timed, names, details = _drawn(report)
    drawings = [
        f'<div class="{place}">{ratio_chart(_sorted(report), timed.margin, names, width, details)[0]}</div>\n'
        for place, width in (("desk", WIDE), ("phone", NARROW))
    ]
    reasons = "".join(f"<li>{escape(line)}</li>" for line in _reasons(report))
    heading = _heading(report)
    body = (
        f"<h1>{escape(heading)}</h1>\n<p>{escape(lead(timed))}</p>\n"
        f'<div class="wide"><table class="costs">{_head(report)}<tbody>{"".join(_rows(report))}</tbody></table></div>\n'
        f"<p>{', '.join(f'{sign} {verdict}' for verdict, sign in SIGNS.items())}, at a margin of "
        f"{100 * timed.margin:g} % of the base's time.</p>\n"
        f"<h2>Time against the base</h2>\n<p>A dot is the ratio, a bar its interval; in grey, the base against itself. "
        "What lies within the band is too small to matter: the margin, declared beforehand.</p>\n"
        f"{''.join(drawings)}<h2>What becomes of each adapter, and why</h2>\n<p>{_FORMS}</p>\n<ul>{reasons}</ul>\n"
        f"{record_section(timed, command(report))}<footer>{escape(MEANING)}</footer>\n"
    )
    return document(heading, body, MARKS + LAYOUT + _TABLE)


def compare_poster(report: CompareReport) -> str:
    """The SVG document: only the chart."""
    timed, names, details = _drawn(report)
    chart, height = ratio_chart(_sorted(report), timed.margin, names, WIDE, details)
    body = text_at(14, 32, _heading(report), "title") + text_at(14, 52, lead(timed), "name")
    body += placed(chart, 0, 64, WIDE, height)
    return sheet(body, WIDE, 64 + height, MARKS + TITLE)


def _drawn(report: CompareReport) -> tuple[BenchReport, dict[str, str], dict[str, str]]:
    """The times, and for each graph its name and a line of description."""
    assert report.bench is not None  # the command line refuses a picture without times
    pairs = [(adapter, graph) for adapter in report.adapters for graph in adapter.graphs]
    names = {graph.path: f"{adapter.name}, {graph.form}" for adapter, graph in pairs}
    return report.bench, names, {graph.path: _detail(adapter, graph) for adapter, graph in pairs}


def _detail(adapter: ComparedAdapter, graph: AdapterGraph) -> str:
    f = "" if adapter.non_linearity == "none" else f", {adapter.non_linearity}"
    return f"{adapter.placement}{f}; folds: {adapter.folds}; {_nodes(graph)} nodes"


def _nodes(graph: AdapterGraph) -> str:
    return f"{graph.added:+d}".replace("-", "−") if graph.added else "±0"


def _sorted(report: CompareReport) -> Sequence[Comparison]:
    """The comparisons in the order of the table."""
    return [comparison for _, _, comparison in report.rows() if comparison is not None]


def _shapes(report: CompareReport) -> list[tuple[int, int]]:
    return list(dict.fromkeys(comparison.shape for comparison in _sorted(report)))


def _heading(report: CompareReport) -> str:
    count = len(report.adapters)
    many = f"{count} adapters" if count > 1 else f"the adapter {report.adapters[0].name}"
    shapes = " and ".join(f"{batch} × {sequence}" for batch, sequence in _shapes(report))
    model = report.model.replace("\\", "/").rstrip("/").rpartition("/")[2] or report.model
    return f"What {many} cost{'' if count > 1 else 's'} {model}, at {shapes}"


def _head(report: CompareReport) -> str:
    names = ["adapter", "method", "placement", "f", "trained", "of the base", "folds", "as", "nodes"]
    names += ["shape"] if len(_shapes(report)) > 1 else []
    numbers = ("trained", "of the base", "nodes")
    cells = "".join(f"<th{_side(name in numbers)}>{name}</th>" for name in [*names, "time", "interval"])
    return f"<thead><tr>{cells}</tr></thead>"


def _side(number: bool) -> str:
    return ' class="number"' if number else ""


def _rows(report: CompareReport) -> Iterator[str]:
    several, before = len(_shapes(report)) > 1, None
    for adapter, graph, comparison in report.rows():
        assert comparison is not None
        own: list[tuple[str, bool]] = [
            (adapter.name, False),
            (adapter.method, False),
            (adapter.placement, False),
            (adapter.non_linearity, False),
            (f"{adapter.parameters:,}", True),
            (f"{adapter.share:.2%}".replace("%", " %"), True),
            (adapter.folds, False),
        ]
        cells = own if adapter is not before else [("", False)] * len(own)
        cells += [(graph.form, False), (_nodes(graph), True)]
        cells += [(f"{comparison.shape[0]} × {comparison.shape[1]}", False)] if several else []
        shown = "".join(f"<td{_side(number)}>{escape(text)}</td>" for text, number in cells)
        sign, found = SIGNS[comparison.verdict], comparison.verdict
        shown += f'<td class="{found}" title="{found}">{sign} {change(comparison.ratio)}</td>'
        opening = '<tr class="more">' if adapter is before else "<tr>"
        yield f"{opening}{shown}<td>{span(comparison.interval)}</td></tr>"
        before = adapter


def _reasons(report: CompareReport) -> Iterator[str]:
    for adapter in report.adapters:
        for each in adapter.becomes:
            yield f"{adapter.name}: {each.parts} × {each.way}: {each.reason}"
    yield from report.notes


def command(report: CompareReport) -> str:
    """The command line that repeats this comparison."""
    timed = report.bench
    parts = ["surgery", "compare", report.model]
    parts += [part for each in report.adapters for part in ("--adapter", f"{each.name}={each.path}")]
    if timed is not None:
        parts += [part for batch, sequence in _shapes(report) for part in ("--shape", f"{batch}x{sequence}")]
        parts += ["--provider", timed.provider.removesuffix("ExecutionProvider").lower()]
        parts += ["--margin", f"{timed.margin:g}", "--seed", str(timed.seed)]
        parts += [] if timed.threads is None else ["--threads", str(timed.threads)]
    return shlex.join(parts)
