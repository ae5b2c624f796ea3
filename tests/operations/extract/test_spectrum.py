from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

import surgery
from formats.errors import OutputExists, UnknownTensor
from surgery.errors import NothingToDo, SurgeryError

pytestmark = pytest.mark.processor


def test_the_residuals_are_those_of_the_extraction(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """At every rank of the table, for every weight and in total, up to the factors' rounding."""
    report = surgery.spectrum(*pair, max_rank=8)  # beyond 11 the weights are smaller than their factors
    for point in report.uniform:
        made = surgery.extract(*pair, tmp_path / str(point.rank), rank=point.rank, dtype="float32")
        assert point.residual == pytest.approx(made.residual, rel=1e-3, abs=2e-5)
        assert {weight.name: weight.residual(point.rank) for weight in report.weights} == {
            module.name: pytest.approx(module.residual, rel=1e-3, abs=2e-5) for module in made.modules
        }


def test_the_size_is_that_of_the_factors_that_extract_writes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Payload bytes of all lora_A and lora_B, in the dtype they would be stored in."""
    for dtype in ("float32", "bfloat16"):
        report = surgery.spectrum(*pair, dtype=dtype)
        surgery.extract(*pair, tmp_path / dtype, rank=2, dtype=dtype)
        stored = load_file(tmp_path / dtype / "adapter_model.safetensors")
        factors = [tensor for name, tensor in stored.items() if "lora_" in name]
        assert report.uniform[1].rank == 2
        assert report.uniform[1].nbytes == sum(tensor.nbytes for tensor in factors)


def test_singular_values_are_the_exact_ones_as_far_as_asked(pair: tuple[Path, Path]) -> None:
    """In float64, from the difference of the files."""
    base, tuned = load_file(pair[0]), load_file(pair[1])
    for weight in surgery.spectrum(*pair, max_rank=3).weights:
        delta = tuned[weight.name].double() - base[weight.name].double()
        exact = torch.linalg.svdvals(delta)
        assert len(weight.values) == min(3, *delta.shape)
        torch.testing.assert_close(torch.tensor(weight.values).double(), exact[: len(weight.values)], rtol=1e-5, atol=0)
        assert weight.total == pytest.approx(float(exact.square().sum()), rel=1e-6)


def test_patterns_choose_the_weights(pair: tuple[Path, Path]) -> None:
    """Over the names of tensors; one that matches none of them, or no weight that factors can carry, is an error."""
    every = [weight.name for weight in surgery.spectrum(*pair).weights]
    report = surgery.spectrum(*pair, include=["layers.0.*"], exclude=["*.up.weight"])
    assert [weight.name for weight in report.weights] == [
        name for name in every if name.startswith("layers.0.") and not name.endswith(".up.weight")
    ]
    with pytest.raises(UnknownTensor):
        surgery.spectrum(*pair, include=["*.scale"])
    with pytest.raises(NothingToDo):
        surgery.spectrum(*pair, include=["*.bias"])


def test_two_equal_models_have_no_spectrum(pair: tuple[Path, Path]) -> None:
    """Nothing changed: an error, as for extract."""
    with pytest.raises(NothingToDo):
        surgery.spectrum(pair[0], pair[0])


@pytest.mark.parametrize("suffix", [".html", ".svg"])
def test_a_picture_appears_whole_and_replaces_nothing_unasked(
    pair: tuple[Path, Path], tmp_path: Path, suffix: str
) -> None:
    """Nor does it hide an error behind a computation: what is in the way is seen first."""
    picture = tmp_path / f"ranks{suffix}"
    report = surgery.spectrum(*pair, picture)
    assert report.output == str(picture)
    first = picture.read_bytes()
    with pytest.raises(OutputExists):
        surgery.spectrum(*pair, picture)
    surgery.spectrum(*pair, picture, force=True)
    assert picture.read_bytes() == first
    with pytest.raises(SurgeryError, match="cannot have this suffix"):
        surgery.spectrum(*pair, tmp_path / "ranks.png")
    with pytest.raises(NothingToDo):
        surgery.spectrum(pair[0], pair[0], tmp_path / f"none{suffix}")
    assert not (tmp_path / f"none{suffix}").exists()


def test_the_command_prints_every_weight_and_the_total(
    pair: tuple[Path, Path], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    """A column for each rank, a row for each rank in total, and where the picture is."""
    result = cli("spectrum", *pair, "--max-rank", 4, "--report", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    for expected in ("layers.0.up", "r=4", "energy", "r.html"):
        assert expected in result.stdout
    assert (tmp_path / "r.html").exists()


def test_json_holds_spectra_and_curves(pair: tuple[Path, Path], cli_json: Callable[..., dict[str, Any]]) -> None:
    """Enough to draw another picture."""
    report = cli_json("spectrum", *pair)
    assert report["output"] is None
    assert {"name", "shape", "size", "bytes_per_rank", "total", "values"} == report["weights"][0].keys()
    assert report["uniform"][0].keys() == {"rank", "nbytes", "energy", "residual", "limited"}
    assert len(report["budget"]) == len(report["uniform"])


def test_a_dry_run_shows_what_would_be_measured(
    pair: tuple[Path, Path], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    """As a table and as one document; a picture that cannot be is refused as the run refuses it."""
    words = ("spectrum", *pair, "--report", tmp_path / "r.html", "--dry-run")
    assert "measure" in cli(*words).stdout
    plan = json.loads(cli(*words, "--json").stdout)
    assert plan["operation"] == "spectrum"
    assert plan["outputs"] == [str(tmp_path / "r.html")]
    assert not (tmp_path / "r.html").exists()
    (tmp_path / "r.html").write_text("precious")
    real, dry = cli(*words[:-1]), cli(*words)
    assert (real.exit_code, real.stderr) == (dry.exit_code, dry.stderr) != (0, "")
