"""The page and the picture of a comparison, in a browser: every figure, nothing over another, nothing from outside."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import Page, browser
from latency_records import BASE, comparison, record
from test_latency_page import OVERLAPS

from surgery.onnx.timing.compared import AdapterGraph, Becoming, ComparedAdapter, CompareReport
from surgery.onnx.timing.record import Comparison
from surgery.pictures.compare_page import command, compare_page, compare_poster
from surgery.pictures.latency_charts import change, span

FORMS = pytest.mark.parametrize("form", [compare_page, compare_poster], ids=["page", "poster"])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A browser for all tests of this file."""
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def graph(form: str, path: str, added: int) -> AdapterGraph:
    """One of a base with 83 nodes."""
    same = form == "merged"
    return AdapterGraph(
        form=form,
        path=path,
        sha256="ab" * 32,
        same_graph=same,
        nodes=83 + added,
        added=added,
        error=1e-7,
        tolerance=1e-5,
    )


def adapter(name: str, *graphs: AdapterGraph, **changes: object) -> ComparedAdapter:
    """A Houlsby adapter, but for what is changed."""
    plain: dict[str, object] = {
        "name": name,
        "path": f"adapters/{name}",
        "method": "Houlsby",
        "placement": "sequential",
        "non_linearity": "silu",
        "parameters": 123_456,
        "share": 0.0123,
        "folds": "half",
        "becomes": (Becoming(way="half-folded", reason="silu is not linear", parts=4),),
        "tokens": 0,
        "graphs": graphs,
    }
    return ComparedAdapter(**{**plain, **changes})  # type: ignore[arg-type]


def report(*shapes: tuple[int, int], name: str = "houlsby") -> CompareReport:
    """A LoRA and a Houlsby adapter, each as two graphs, at these shapes."""
    linear = {"method": "LoRA", "placement": "parallel", "non_linearity": "none", "folds": "yes"}
    adapters = (
        adapter("lora", graph("merged", "g/lora/m.onnx", 0), graph("branch", "g/lora/b.onnx", 24), **linear),
        adapter(name, graph("half-folded", "g/h/h.onnx", 20), graph("branch", "g/h/b.onnx", 28)),
    )
    times: list[Comparison] = []
    for shape in shapes or ((1, 128),):
        times += [comparison("g/lora/m.onnx", shape=shape), comparison("g/lora/b.onnx", 1.12, "slower", shape=shape)]
        times += [comparison("g/h/h.onnx", 1.034, "slower", shape=shape)]
        times += [comparison("g/h/b.onnx", 1.012, "inconclusive", shape=shape)]
    return CompareReport(
        operation="compare", output=None, seconds=1.0, peak_rss_bytes=1, ledger={}, notes=("a note",), model="bert",
        parameters=10_000_000, graph=BASE, sha256="ab" * 32, provider="CPUExecutionProvider", nodes=83,
        adapters=adapters, record=None, bench=record(*times),
    )  # fmt: skip


@pytest.mark.parametrize("width", [390, 760, 1280])
@pytest.mark.parametrize(
    "shown", [report(), report((1, 8), (16, 256), name="an-adapter-of-a-rather-long-name-as-people-have-them")]
)
def test_a_browser_shows_it_all_and_asks_for_nothing(
    page: Page, tmp_path: Path, shown: CompareReport, width: int
) -> None:
    """Every figure is in the text; texts of drawings do not overlap; nothing is wider than the window."""
    file = tmp_path / "report.html"
    file.write_text(compare_page(shown), encoding="utf-8")
    page.complaints.clear()
    page.requests.clear()
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    page.open(file)
    page.looks(width, "light")
    assert (page.requests, page.complaints) == ([file.as_uri()], [])
    assert page.says("document.documentElement.scrollWidth") <= width
    assert page.says(OVERLAPS) == []
    text = page.says("document.body.innerText")
    for each, made, found in shown.rows():
        assert found is not None
        for said in (each.name, each.method, each.placement, f"{each.parameters:,}", made.form, change(found.ratio)):
            assert said in text
        assert span(found.interval) in text
        assert all(becoming.reason in text for becoming in each.becomes)
    assert text.count("16×256") == (4 if "16 × 256" in text else 0)  # in the drawing, for each graph
    assert "a note" in text
    assert command(shown) in text


def test_each_adapter_is_named_once_in_the_table() -> None:
    """Its further graphs, and shapes, leave those cells empty."""
    rows = re.findall(r"<tr.*?</tr>", compare_page(report((1, 8), (2, 16))))
    assert [row.count("<td>houlsby</td>") for row in rows] == [0] * 5 + [1] + [0] * 3
    assert ["2 × 16" in row for row in rows] == [False] + [False, True] * 4


@FORMS
def test_it_is_self_contained_and_well_formed(form: Callable[[CompareReport], str]) -> None:
    """No script, no address to load anything from; names are escaped; the same report gives the same bytes."""
    shown = report(name="<b>&\"evil'")
    document = form(shown)
    assert "<script" not in document
    assert "<b>&" not in document
    assert not re.search(r"(src|href)=|url\(|@import", document)
    assert ET.fromstring(re.sub(r"<meta [^>]*>|<!doctype html>", "", document)) is not None
    assert document == form(shown)


def test_the_command_measures_it_again() -> None:
    """With the names that the adapters had."""
    assert command(report((1, 8))) == (
        "surgery compare bert --adapter lora=adapters/lora --adapter houlsby=adapters/houlsby --shape 1x8 "
        "--provider cpu --margin 0.01 --seed 7 --threads 2"
    )
