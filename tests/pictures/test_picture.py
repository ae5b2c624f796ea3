from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable

import numpy as np
import pytest

from surgery.pictures.charts import Plot, Scale, nbytes_text, percent, round_ticks
from surgery.pictures.page import page, poster
from surgery.pictures.picture import MAP_COLUMNS, groups_of, view
from surgery.ranks.spectra import Spectrum

FORMS = pytest.mark.parametrize("form", [page, poster], ids=["page", "poster"])


def spectrum(name: str, size: int = 40, known: int = 16, decay: float = 0.5) -> Spectrum:
    """A weight of size × size with a power law's spectrum."""
    values = np.arange(1.0, size + 1) ** -decay
    return Spectrum(name, (size, size), size, 8 * size, float((values**2).sum()), tuple(values[:known].tolist()))


def model(layers: int = 3) -> list[Spectrum]:
    """Two kinds in every layer, a head without one."""
    kinds = {"self_attn.q_proj": 0.8, "mlp.up_proj": 0.3}
    stacked = [
        spectrum(f"model.layers.{layer}.{kind}.weight", decay=decay + layer / 50)
        for layer in range(layers)
        for kind, decay in kinds.items()
    ]
    return [*stacked, spectrum("lm_head.weight", size=2, known=2)]


def texts(document: str) -> list[str]:
    """Everything written in it."""
    return [element.text or "" for element in ET.fromstring(document).iter()]


@FORMS
def test_it_is_self_contained_and_well_formed(form: Callable[..., str]) -> None:
    """No script, no address to load anything from; both schemes; every drawing has a description."""
    document = form("tuned − base", model())
    assert "<script" not in document
    assert not re.search(r"(src|href)=|url\(|@import", document)
    assert set(re.findall(r"https?://[^\"]*", document)) <= {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme:dark" in document
    for drawing in re.findall(r"<svg.*?</svg>", document, re.DOTALL):
        assert 'aria-label="' in drawing
    well_formed = re.sub(r"<meta [^>]*>|<!doctype html>", "", document)
    assert ET.fromstring(well_formed) is not None


@FORMS
def test_names_are_escaped(form: Callable[..., str]) -> None:
    """A model's name or a tensor's cannot become markup."""
    document = form("<b>&\"tuned'", [spectrum("layers.0.<script>alert(1)</script>.weight")])
    assert "<b>" not in document
    assert "<script>" not in document
    assert "&lt;script&gt;" in document


@FORMS
def test_the_same_spectra_give_the_same_bytes(form: Callable[..., str]) -> None:
    """Whenever they are drawn."""
    assert form("a − b", model()) == form("a − b", model())


@FORMS
@pytest.mark.parametrize("size", [1, 2, 5])
def test_even_one_small_weight_can_be_drawn(form: Callable[..., str], size: int) -> None:
    """Rank 1 is all there is to a row of numbers."""
    document = form("a − b", [spectrum("head.weight", size, size)])
    assert "nan" not in document
    assert "100.0 %" in document


@FORMS
def test_the_table_holds_every_rank_up_to_what_is_known(form: Callable[..., str]) -> None:
    """1, 2, 4, … with size, error and energy, as the curve says."""
    shown = view("a − b", model())
    assert [row[0] for row in shown.rows] == ["1", "2", "4", "8", "16"]
    document = form("a − b", model())
    for row in shown.rows:
        assert all(figure in document for figure in row)


def test_the_summary_names_the_least_rank_that_keeps_a_share() -> None:
    """Or that it lies beyond what was measured."""
    weight = spectrum("layers.0.a.weight", known=30)
    tiles = view("a − b", [weight]).tiles
    half = weight.needed(0.5)
    assert tiles[0] == ("to keep 50 % of the change", f"rank {half}", nbytes_text(320 * (half or 0)))
    assert tiles[2][1] == "rank > 30"


def test_weights_are_grouped_by_kind_and_ordered_by_layer() -> None:
    """The first number in a name is the layer; kinds that end alike keep their whole names."""
    names = [
        "model.layers.10.mlp.up.weight", "model.layers.2.mlp.up.weight", "lm_head.weight",
        "encoder.layers.0.q.weight", "decoder.layers.0.q.weight", "model.layers.2.experts.1.up.weight",
        "model.layers.2.experts.0.up.weight",
    ]  # fmt: skip
    groups = {group.name: [layer for layer, _ in group.members] for group in groups_of([spectrum(n) for n in names])}
    assert groups == {
        "mlp.up": [2, 10],
        "lm_head": [None],
        "encoder.layers.*.q": [0],
        "decoder.layers.*.q": [0],
        "experts.*.up": [2, 2],
    }


def test_a_map_too_large_for_a_page_and_kinds_beyond_a_dozen_are_left_out() -> None:
    """And the page says how many kinds."""
    assert view("a − b", model(MAP_COLUMNS + 1)).heat is None
    shown = view("a − b", [spectrum(f"layers.0.kind{index}.weight") for index in range(15)])
    assert len(shown.panels) == 12
    assert shown.omitted.startswith("3 kinds")


def test_every_weight_has_a_line_and_a_place_on_the_map_that_say_its_name() -> None:
    """What a mouse finds."""
    said = "".join(texts(poster("a − b", model())))
    for weight in model():
        assert said.count(f"{weight.name}: rank ") + said.count(f"{weight.name}: more than rank ") == 2


def test_figures_are_written_for_people() -> None:
    """Three digits and a unit; shares with more decimals only near nothing and all."""
    sizes = [0, 999, 1000, 19_000_000, 999_400, 999_600, 123_456_789, 5e9, 7e15]
    assert [nbytes_text(size) for size in sizes] == [
        "0 B", "999 B", "1.00 kB", "19.0 MB", "999 kB", "1.00 MB", "123 MB", "5.00 GB", "7000 TB",
    ]  # fmt: skip
    shares = [0, 0.5, 0.9996, 0.00004, 1]
    assert [percent(share) for share in shares] == ["0.0 %", "50.0 %", "99.96 %", "0.004 %", "100.0 %"]
    assert round_ticks(300, 9000) == [500, 1000, 2000, 5000]
    assert round_ticks(1, 1e6) == [10.0**power for power in range(7)]


def test_points_beyond_an_axis_lie_on_its_end() -> None:
    """And an axis without length has its middle."""
    plot = Plot(100, 100, (10, 10, 10, 10), Scale(1, 100, logarithmic=True), Scale(0, 1))
    assert plot.at(10, 0.5) == (50, 50)
    assert plot.at(1000, 2) == (90, 10)
    assert Scale(3, 3).share(3) == 0.5
