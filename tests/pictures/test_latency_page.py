from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import Page, browser
from click.testing import Result
from latency_records import ADAPTER, BASE, MERGED, comparison, record, several

from surgery.onnx.timing.record import BenchReport, Comparison, to_json
from surgery.pictures.latency_charts import change, span
from surgery.pictures.latency_page import command, latency_page, latency_poster, short_names

FORMS = pytest.mark.parametrize("form", [latency_page, latency_poster], ids=["page", "poster"])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A browser for all tests of this file."""
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def said(page: Page, where: Path, report: BenchReport) -> str:
    """Opens the report in the browser, with scripts forbidden; the text that a reader sees."""
    file = where / "report.html"
    file.write_text(latency_page(report), encoding="utf-8")
    page.complaints.clear()
    page.requests.clear()
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    page.open(file)
    text: str = page.says("document.body.innerText")
    assert page.requests == [file.as_uri()]
    assert page.complaints == []
    return text


def test_the_browser_tells_of_requests_and_complaints(page: Page, tmp_path: Path) -> None:
    """Or the tests below would show nothing."""
    file = tmp_path / "chatty.html"
    file.write_text('<img src="http://127.0.0.1:9/a.png"><script>console.log("here"); nothing.there</script>')
    page.call("Emulation.setScriptExecutionDisabled", value=False)
    page.open(file)
    assert page.requests == [file.as_uri(), "http://127.0.0.1:9/a.png"]
    told = "".join(page.complaints)
    assert all(each in told for each in ('"here"', "nothing is not defined", "ERR_"))


def test_a_browser_shows_every_figure_and_asks_for_nothing(page: Page, tmp_path: Path) -> None:
    """No request but the file itself, no message on the console; verdict, interval, blocks and record in the text."""
    report = several()
    text = said(page, tmp_path, report)
    for each in report.comparisons:
        assert f"{change(each.ratio)} ({span(each.interval)})" in text
        assert each.reason[1:] in text
    for figure in (
        "12.3 ms",
        "16.03 ms",
        "10,406",
        "0.35 %",
        "0.012",
        "96 of 20 runs",
        "3, error 0.0167",
        "1.45 GB",
        "the same bytes as",
        "nodes run: 142 on CPUExecutionProvider",
        "11.9 ms … 13.7 ms",
    ):
        assert figure in text
    for known in (
        *report.versions.values(),
        *report.machine.values(),
        *report.sha256.values(),
        *report.sha256,
        *report.session,
        *report.session.values(),
        "arena",
    ):
        assert known in text
    assert report.started in text
    assert command(report) in text


def test_the_verdict_comes_first(page: Page, tmp_path: Path) -> None:
    """In a sentence if there is one, in numbers if there are several; the positive control is none of them."""
    assert said(page, tmp_path, record()).startswith("merged is as fast as base, within 1 %\n")
    slower = record(comparison(ADAPTER, 1.3, "slower"))
    assert said(page, tmp_path, slower).startswith("adapter is slower than base, by more than 1 %\n")
    mixed = said(page, tmp_path, several())
    assert mixed.replace("\N{NO-BREAK SPACE}", " ").startswith(
        "Against base, within 1 %: 2 equivalent, 1 slower, 1 faster, 1 inconclusive\n"
    )


def test_it_fits_a_phone_and_is_dark_where_the_reader_is(page: Page, tmp_path: Path) -> None:
    """Nothing is wider than the window; each width has its own ratio chart; paper and ink change with the scheme."""
    said(page, tmp_path, several())
    found = {}
    for width in (360, 390, 760, 1280):
        for scheme in ("light", "dark"):
            page.looks(width, scheme)
            assert page.says("document.documentElement.scrollWidth") <= width
            assert page.says("Math.max(...[...document.querySelectorAll('dd')].map(each => each.offsetHeight))") < 150
            charts = [page.says(f"document.querySelector('.{name}').offsetHeight") > 0 for name in ("phone", "desk")]
            assert charts == [width < 760, width >= 760]
            found[scheme] = page.says("getComputedStyle(document.body).backgroundColor")
    assert found == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}


ODD = {
    "hardly a block": comparison(epochs=2, blocks=1, noise=0.0),
    "thirty times as slow": comparison(ratio=30.0, verdict="slower"),
    "fifty times as fast": comparison(ratio=0.02, verdict="faster"),
    "very noisy": comparison(noise=0.5, verdict="inconclusive"),
    "a long name": comparison("work/a-folder-of-a-rather-long-name-as-people-have-them/deeper/model.onnx"),
}


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("report", [several(), *map(record, ODD.values())], ids=["several", *ODD])
def test_texts_of_the_drawings_do_not_overlap(page: Page, tmp_path: Path, report: BenchReport, width: int) -> None:
    """Nor leave them."""
    said(page, tmp_path, report)
    page.looks(width, "light")
    assert page.says(OVERLAPS) == []


OVERLAPS = """
[...document.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().width).flatMap(svg => {
  const frame = svg.getBoundingClientRect()
  const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()])
  const beyond = b => b.left < frame.left - 1 || b.right > frame.right + 1 || b.bottom > frame.bottom + 1
  const cross = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3
  return boxes.flatMap(([text, box], i) => [
    ...(beyond(box) ? [text] : []),
    ...boxes.slice(i + 1).filter(([, other]) => cross(box, other)).map(([other]) => `${text} over ${other}`)
  ])
})
"""


@FORMS
@pytest.mark.parametrize("report", [record(), several()], ids=["one", "several"])
def test_it_is_self_contained_and_well_formed(form: Callable[[BenchReport], str], report: BenchReport) -> None:
    """No script, no address to load anything from; both schemes; every drawing has a description."""
    document = form(report)
    assert "<script" not in document
    assert not re.search(r"(src|href)=|url\(|@import", document)
    assert set(re.findall(r"https?://[^\"]*", document)) <= {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme:dark" in document
    assert all('aria-label="' in drawing for drawing in re.findall(r"<svg [^>]*role=[^>]*>", document))
    assert ET.fromstring(re.sub(r"<meta [^>]*>|<!doctype html>", "", document)) is not None


@FORMS
def test_names_are_escaped_and_bytes_repeat(form: Callable[[BenchReport], str]) -> None:
    """A path or a version cannot become markup; the same record gives the same bytes."""
    evil = comparison("<b>&\"graph'/model.onnx")
    report = record(evil, versions={"<script>": "alert(1)"}, machine={"processor": "<i>"})
    document = form(report)
    assert not re.search(r"<b>&|<script|<i>", document)
    assert "&lt;b&gt;&amp;" in document
    assert document == form(report)


@FORMS
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_measurements_can_be_drawn(form: Callable[[BenchReport], str], odd: Comparison) -> None:
    """With finite places for everything."""
    assert not re.search(r"\b(nan|inf)\b", form(record(odd)))


def test_names_are_as_short_as_they_can_be() -> None:
    """What all begin and end with goes; a graph against itself keeps its file's name."""
    assert short_names([BASE, MERGED]) == {BASE: "base", MERGED: "merged"}
    assert short_names(["a.onnx", "b.onnx"]) == {"a.onnx": "a.onnx", "b.onnx": "b.onnx"}
    assert short_names(["/x/a/m.onnx", "/x/b/c/m.onnx"]) == {"/x/a/m.onnx": "a", "/x/b/c/m.onnx": "b/c"}
    assert short_names([BASE, BASE]) == {BASE: "model.onnx"}


def test_changes_are_written_for_people() -> None:
    """Signed per cent, two decimals up to ten; nothing has no sign of its own."""
    assert [change(ratio) for ratio in (1.0, 1.00001, 0.9931, 1.303, 31)] == [
        "±0.00\N{NO-BREAK SPACE}%",
        "±0.00\N{NO-BREAK SPACE}%",
        "−0.69\N{NO-BREAK SPACE}%",
        "+30.3\N{NO-BREAK SPACE}%",
        "+3,000\N{NO-BREAK SPACE}%",
    ]
    assert span((0.995, 1.2)) == "−0.50\N{NO-BREAK SPACE}…\N{NO-BREAK SPACE}+20.0\N{NO-BREAK SPACE}%"


def test_a_record_without_a_positive_control_or_with_cuda_graphs_says_so() -> None:
    """In the command that repeats it."""
    assert command(record()) == (
        f"surgery bench {BASE} {MERGED} --shape 1x128 --provider cpu --margin 0.01 --seed 7 --threads 2"
    )
    asked = command(dataclasses.replace(several(), cuda_graph=True, threads=None))
    assert asked.endswith(f"--cuda-graph --positive-control {ADAPTER}")
    assert "--shape 1x128 --shape 16x256" in asked


def test_a_record_is_drawn_from_the_command_line(cli: Callable[..., Result], tmp_path: Path) -> None:
    """As a page or as a chart; another kind, or something in the way, is refused before anything is measured."""
    kept, out = tmp_path / "record.json", tmp_path / "out.html"
    kept.write_text(to_json(several()), encoding="utf-8")
    assert f"report: {out}" in cli("bench", "--replay", kept, "--report", out).stdout.replace("\n", "")
    assert out.read_text(encoding="utf-8") == latency_page(several())
    assert cli("bench", "--replay", kept, "--report", tmp_path / "out.svg", "--json").exit_code == 0
    assert (tmp_path / "out.svg").read_text(encoding="utf-8") == latency_poster(several())
    refused = cli("bench", tmp_path / "no.onnx", tmp_path / "none.onnx", "--report", out)
    assert refused.exit_code == 1
    assert "the output exists" in refused.stderr
    assert ".html or .svg" in cli("bench", "no.onnx", "none.onnx", "--report", "out.png").stderr
    assert cli("bench", "--replay", kept, "--report", out, "--force").exit_code == 0
