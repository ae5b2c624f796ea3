"""The result of bench as one self-contained file: a page (HTML), or only its ratio chart (SVG, for a README).

The page shows the verdict first, then the evidence: ratios against the margin, the blocks, the drift, the graphs'
bytes, and the record of the run. It has no script and needs no network; it is light or dark like the reader's system.
This module computes nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence

from surgery.onnx.timing.record import BenchReport, Comparison
from surgery.pictures.charts import escape, nbytes_text, text_at
from surgery.pictures.latency_charts import (
    NARROW,
    SIGNS,
    WIDE,
    change,
    cut,
    distribution,
    drift,
    machine_drift,
    ratio_chart,
    span,
)
from surgery.pictures.style import document, placed, sheet, variables

MARKS = (
    variables({"three": "#16794a"}, {"three": "#58c98d"})
    + """
.mark .bar{stroke-width:3.4;stroke-linecap:round}.mark circle{stroke:var(--paper);stroke-width:1.2}
.mark.control .bar{stroke-width:2}.control .bar{stroke:var(--edge)}.control circle{fill:var(--edge)}
.equivalent .bar{stroke:var(--one)}.equivalent circle,text.equivalent{fill:var(--one)}
.slower .bar{stroke:var(--two)}.slower circle,text.slower{fill:var(--two)}
.faster .bar{stroke:var(--three)}.faster circle,text.faster{fill:var(--three)}
.inconclusive .bar{stroke:var(--soft)}.inconclusive circle,text.inconclusive{fill:var(--soft)}
.bars.one{fill:var(--one)}.bars.all{fill:var(--edge)}text.control{fill:var(--soft)}
.dots{fill:none;stroke-linecap:round;stroke-width:3.4}.dots.one{stroke:var(--one);opacity:.55}
.dots.all{stroke:var(--edge);opacity:.7}
"""
)
TITLE = ".title{font-size:17px;font-weight:600;fill:var(--ink)}"
LAYOUT = """
h1{margin-bottom:4px}h2{overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:12px;margin:18px 0 0}
.card{background:var(--card);border-radius:10px;border-left:5px solid var(--soft);padding:10px 14px}
.card span{display:block;font-size:13px;color:var(--soft);overflow-wrap:anywhere}
.card strong{display:block;font-size:21px;line-height:1.35;font-variant-numeric:tabular-nums}
.card.equivalent{border-color:var(--one)}.card.equivalent strong,b.equivalent{color:var(--one)}
.card.slower{border-color:var(--two)}.card.slower strong,b.slower{color:var(--two)}
.card.faster{border-color:var(--three)}.card.faster strong,b.faster{color:var(--three)}
.card.inconclusive strong,b.inconclusive{color:var(--soft)}
.desk{display:none}@media(min-width:760px){.desk{display:block}.phone{display:none}}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(290px,1fr));gap:22px;margin:10px 0}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(158px,1fr));gap:8px 22px;margin:6px 0 0}
dt{font-size:13px;color:var(--soft)}
dd{margin:0;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
dl.record{grid-template-columns:fit-content(40%) 1fr;gap:4px 18px;font-size:14px}
dl.record dt{overflow-wrap:anywhere}
.hash{font-size:12px;overflow-wrap:anywhere;white-space:normal}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);border-radius:8px;padding:10px 14px;
font-size:13px}
@media(max-width:520px){.cards{gap:8px}.card{padding:6px 12px}.card strong{font-size:17px}}
h3{font-size:14px;margin:22px 0 4px}
"""
MEANING = (
    "Both graphs run in one process on the same inputs, in A B B A blocks in shuffled order; a block gives one ratio "
    "of medians. The sessions are recreated several times. Each set of sessions counts once, by its median block; the "
    "interval and the two one-sided tests are computed over sets. The verdict is evaluated several times during the "
    "run, and the first clear answer ends it; tests and interval are corrected for these repeated looks. The control "
    "is a second session of the reference, measured against the reference in the same way: it shows the noise. "
    "“Equivalent” means that the ratio was shown to be within the margin that was declared beforehand; “slower” and "
    "“faster” mean that it was shown to be outside. A difference that is merely not significant is called inconclusive."
)
_SAME = "the same bytes as the reference: nothing was added to the graph, only weights differ"
_CLAIMS = {
    "equivalent": "{graph} is as fast as {reference}, within {margin}",
    "slower": "{graph} is slower than {reference}, by more than {margin}",
    "faster": "{graph} is faster than {reference}, by more than {margin}",
    "inconclusive": "{graph} against {reference}: cannot tell, at a margin of {margin}",
}


def latency_page(report: BenchReport) -> str:
    """The HTML document."""
    names = short_names([report.reference, *(each.graph for each in report.comparisons)])
    reference = names[report.reference]
    heading = _heading(report, names)
    drawings = [
        f'<div class="{place}">{ratio_chart(report.comparisons, report.margin, names, width)[0]}</div>'
        for place, width in (("desk", WIDE), ("phone", NARROW))
    ]
    body = "".join(
        (
            f"<h1>{escape(heading)}</h1>\n<p>{escape(lead(report))}</p>\n",
            f'<div class="cards">{"".join(_card(each, names[each.graph]) for each in report.comparisons)}</div>\n',
            "<h2>Time against the reference</h2>\n",
            f"<p>A dot is the ratio, a bar its interval, against {escape(reference)}; in grey, {escape(reference)} "
            "against itself. What lies within the band is too small to matter: the margin, declared beforehand.</p>\n",
            "".join(drawings),
            *(f"\n{_section(each, report, names[each.graph], reference)}" for each in report.comparisons),
            _structure(report, names),
            record_section(report, command(report)),
            f"<footer>{escape(MEANING)}</footer>\n",
        )
    )
    return document(heading, body, MARKS + LAYOUT)


def latency_poster(report: BenchReport) -> str:
    """The SVG document: only the chart of the ratios."""
    names = short_names([report.reference, *(each.graph for each in report.comparisons)])
    chart, height = ratio_chart(report.comparisons, report.margin, names, WIDE)
    body = text_at(14, 32, _heading(report, {path: cut(name, 24) for path, name in names.items()}), "title") + text_at(
        14, 52, lead(report), "name"
    )
    body += placed(chart, 0, 64, WIDE, height)
    return sheet(body, WIDE, 64 + height, MARKS + TITLE)


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The parts of the paths that distinguish them, without the folders and the endings that all share."""
    parts = {path: path.replace("\\", "/").split("/") for path in paths}
    if len(parts) == 1:
        return {path: split[-1] for path, split in parts.items()}
    while all(len(split) > 1 for split in parts.values()) and len({split[0] for split in parts.values()}) == 1:
        parts = {path: split[1:] for path, split in parts.items()}
    while all(len(split) > 1 for split in parts.values()) and len({split[-1] for split in parts.values()}) == 1:
        parts = {path: split[:-1] for path, split in parts.items()}
    return {path: "/".join(split) for path, split in parts.items()}


def _heading(report: BenchReport, names: Mapping[str, str]) -> str:
    """The verdict in a sentence; for several graphs, the number of each verdict."""
    judged = [each for each in report.comparisons if each.role == "candidate"] or list(report.comparisons)
    words = {"reference": names[report.reference], "margin": f"{100 * report.margin:g} %"}
    if len({(each.graph, each.verdict) for each in judged}) == 1:
        return _CLAIMS[judged[0].verdict].format(graph=names[judged[0].graph], **words)
    counts = [(sum(each.verdict == verdict for each in judged), verdict) for verdict in SIGNS]
    found = ", ".join(f"{count}\N{NO-BREAK SPACE}{verdict}" for count, verdict in counts if count)
    return f"Against {words['reference']}, within {words['margin']}: {found}"


def lead(report: BenchReport) -> str:
    """One line that says what the figures are based on."""
    blocks = sum(len(epoch.log_ratios) for each in report.comparisons for epoch in each.epochs)
    with_graph = ", with CUDA graphs" if report.cuda_graph else ""
    return (
        f"{blocks:,} paired blocks on {report.provider.removesuffix('ExecutionProvider')}{with_graph}, "
        f"{_machine_name(report)}, {report.started[:10]}."
    )


def _machine_name(report: BenchReport) -> str:
    return next((report.machine[key] for key in ("gpu", "processor") if report.machine.get(key)), "a machine unknown")


def _card(comparison: Comparison, name: str) -> str:
    shape = " × ".join(map(str, comparison.shape))
    role = "" if comparison.role == "candidate" else f", {comparison.role}"
    return (
        f'<div class="card {comparison.verdict}"><span>{escape(name)}, {shape}{escape(role)}</span>'
        f"<strong>{SIGNS[comparison.verdict]} {comparison.verdict}</strong>"
        f"<span>{change(comparison.ratio)} ({span(comparison.interval)})</span></div>"
    )


def _section(comparison: Comparison, report: BenchReport, name: str, reference: str) -> str:
    """One comparison: verdict and reason, figures, blocks."""
    shape = " × ".join(map(str, comparison.shape))
    margin = report.margin
    figures = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in _figures(comparison)
    )
    charts = (
        distribution(comparison, margin, name, reference),
        drift(comparison, margin, name),
        machine_drift(comparison, reference),
    )
    reason = comparison.reason[:1].upper() + comparison.reason[1:]
    return (
        f"<section><h2>{escape(name)}, {shape}: "
        f'<b class="{comparison.verdict}">{comparison.verdict}</b></h2>\n<p>{escape(reason)}.</p>\n'
        f"<dl>{figures}</dl>\n"
        f'<div class="charts">{"".join(f"<div>{chart}</div>" for chart in charts)}</div></section>\n'
    )


def _figures(comparison: Comparison) -> Iterable[tuple[str, str]]:
    blocks = sum(len(epoch.log_ratios) for epoch in comparison.epochs)
    yield "change of the time", change(comparison.ratio)
    yield "interval", span(comparison.interval)
    yield "change of the control", change(comparison.control_ratio)
    yield "interval of the control", span(comparison.control_interval)
    yield "noise floor", f"{100 * comparison.noise_floor:.2f} %"
    yield "p of equivalence", f"{comparison.p_equivalent:.2g}"
    yield "one run", _time(comparison.latency)
    yield "5 to 95 % of runs", _middle(comparison.quantiles)
    yield "reference, one run", _time(comparison.latency_reference)
    yield "reference, 5 to 95 %", _middle(comparison.quantiles_reference)
    if comparison.tokens_per_second is not None:
        yield "tokens per second", f"{comparison.tokens_per_second:,.0f}"
    if comparison.device_bytes is not None:
        yield "memory of a session", nbytes_text(comparison.device_bytes)
    if comparison.device_bytes_reference is not None:
        yield "reference, memory", nbytes_text(comparison.device_bytes_reference)
    yield "blocks", f"{blocks} of {comparison.runs_per_block} runs"
    yield "sets of sessions", str(len(comparison.epochs))
    yield "looks", f"{comparison.looks}, error {comparison.level:.3g}"
    yield "measured for", f"{comparison.seconds:.0f} s"


def _middle(quantiles: Mapping[str, float]) -> str:
    return f"{_time(quantiles['0.05'])} … {_time(quantiles['0.95'])}"


def _time(seconds: float) -> str:
    unit, scale = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * scale:.4g} {unit}"


def _structure(report: BenchReport, names: Mapping[str, str]) -> str:
    """Whether the graphs are identical, and which provider runs their nodes."""
    said = {path: _SAME if same else "another graph than the reference" for path, same in report.same_graph.items()}
    said = {report.reference: "the reference", **said}
    for path, counts in report.assigned.items():
        nodes = ", ".join(f"{count} on {provider}" for provider, count in counts.items())
        said[path] = "; nodes run: ".join(filter(None, (said.get(path), nodes)))
    return f"<h2>The graphs</h2>\n{_pairs({names.get(path, path): text for path, text in said.items()})}\n"


def record_section(report: BenchReport, again: str) -> str:
    """Everything needed to check the result; `again` is the command that repeats the measurement."""
    settings = {
        "started": report.started,
        "reference": report.reference,
        "provider": report.provider,
        "CUDA graphs": "yes" if report.cuda_graph else "no",
        "threads": "the runtime's choice" if report.threads is None else str(report.threads),
        "margin": f"{100 * report.margin:g} %",
        "seed": str(report.seed),
    }
    options = {name: value for name, value in report.provider_options.items() if value}
    groups: tuple[tuple[str, Mapping[str, str]], ...] = (
        ("Settings", settings),
        ("Sessions", report.session),
        ("Machine", report.machine),
        ("Versions", report.versions),
        ("Options of the provider", options),
    )
    parts = "".join(f"<div><h3>{title}</h3>{_pairs(pairs)}</div>" for title, pairs in groups if pairs)
    hashes = "".join(
        f'<dt>{escape(path)}</dt><dd><code class="hash">{digest}</code></dd>' for path, digest in report.sha256.items()
    )
    return (
        f"<h2>The record</h2>\n<p>{escape(' '.join(report.notes))}</p>\n<pre>{escape(again)}</pre>\n"
        f'<div class="charts">{parts}</div><h3>SHA-256</h3><dl class="record">{hashes}</dl>\n'
    )


def _pairs(pairs: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in pairs.items())
    return f'<dl class="record">{rows}</dl>'


def command(report: BenchReport) -> str:
    """The command line that repeats this measurement."""
    shapes = dict.fromkeys(each.shape for each in report.comparisons)
    controls = dict.fromkeys(each.graph for each in report.comparisons if each.role == "positive control")
    parts = ["surgery", "bench", report.reference, *report.graphs]
    parts += [part for batch, sequence in shapes for part in ("--shape", f"{batch}x{sequence}")]
    parts += ["--provider", report.provider.removesuffix("ExecutionProvider").lower()]
    parts += ["--margin", f"{report.margin:g}", "--seed", str(report.seed)]
    parts += [] if report.threads is None else ["--threads", str(report.threads)]
    parts += ["--cuda-graph"] if report.cuda_graph else []
    parts += [part for graph in controls for part in ("--positive-control", graph)]
    return shlex.join(parts)
