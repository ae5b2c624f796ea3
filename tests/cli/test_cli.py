"""What the command line promises beyond the verbs: inspect, diff, the reference, the exit codes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from miniature import perturbed, weights
from places import ROOT
from safetensors.torch import save_file

import surgery


def test_the_reference_is_what_help_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/cli.md, docs/methods.md and docs/dialects.md are generated; `make docs` writes them."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.TARGET.read_text(encoding="utf-8") == generate.reference()
    assert generate.DIALECTS.read_text(encoding="utf-8") == generate.dialects()
    assert generate.METHODS.read_text(encoding="utf-8") == generate.methods()


def test_inspect_tells_a_model_from_an_adapter(
    pair: tuple[Path, Path], tmp_path: Path, cli: Callable[..., Result], cli_json: Callable[..., Any]
) -> None:
    """Counts come from the header; an adapter shows its rank and targets; a merged file the adapters in it."""
    report = cli_json("inspect", pair[0])
    expected = sum(tensor.numel() for tensor in weights().values())
    assert (report["kind"], report["parameters"], len(report["tensors"])) == ("model", expected, 8)
    assert report["tensors"][0]["dtype"] == "I64"
    surgery.extract(*pair, tmp_path / "adapter", rank=4)
    report = cli_json("inspect", tmp_path / "adapter")
    assert report["kind"] == "adapter"
    assert (report["adapter"]["rank"], report["adapter"]["dialect"]) == (4, "peft")
    merged = surgery.merge(pair[0], tmp_path / "adapter", tmp_path / "m.st")
    assert cli_json("inspect", tmp_path / "m.st")["merged"] == list(merged.adapters)
    result = cli("inspect", tmp_path / "m.st", "--tensors")
    assert "layers.0.down.weight" in result.stdout
    assert merged.adapters[0][:16] in result.stdout


def test_diff_names_what_changed_and_how(tmp_path: Path, cli_json: Callable[..., Any]) -> None:
    """Values, dtype, shape, added, removed, identical: each by its own word."""
    base = weights()
    tuned = dict(base)
    tuned["layers.0.up.weight"] = base["layers.0.up.weight"] * 1.5
    tuned["layers.0.up.bias"] = base["layers.0.up.bias"].double()
    tuned["layers.0.norm.weight"] = torch.zeros(17)
    tuned["head.weight"] = torch.zeros(1)
    del tuned["layers.0.norm.bias"]
    save_file(base, tmp_path / "b.st")
    save_file(tuned, tmp_path / "t.st")
    report = cli_json("diff", tmp_path / "b.st", tmp_path / "t.st")
    changes = {change["name"]: change for change in report["changes"]}
    assert {name: change["how"] for name, change in changes.items()} == {
        "layers.0.up.weight": "values",
        "layers.0.up.bias": "dtype",
        "layers.0.norm.weight": "shape",
        "head.weight": "added",
        "layers.0.norm.bias": "removed",
    }
    assert changes["layers.0.up.weight"]["relative"] == pytest.approx(0.5, rel=1e-6)
    assert report["ledger"]["identical"] == 4
    headers = cli_json("diff", tmp_path / "b.st", tmp_path / "t.st", "--headers")
    assert "layers.0.up.weight" not in {change["name"] for change in headers["changes"]}


def test_diff_of_twins_says_so(pair: tuple[Path, Path], cli: Callable[..., Result]) -> None:
    """No differences, exit code 0."""
    result = cli("diff", pair[0], pair[0])
    assert result.exit_code == 0
    assert "0 tensors differ, 8 are identical" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["inspect", "nowhere.st"], 1),
        (["extract", "nowhere.st", "either.st", "--rank", "4"], 1),
        (["merge", "nowhere", "adapter", "-o", "out"], 1),
        (["unmerge", "nowhere", "adapter", "-o", "out"], 1),
        (["extract", "a", "b"], 2),
        (["merge", "a", "b"], 2),
        (["extract", "a", "b", "--rank", "many"], 2),
        (["merge", "a", "b", "-o", "c", "--memory", "much"], 2),
        (["dissect"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_exit_codes(cli: Callable[..., Result], arguments: list[str], code: int) -> None:
    """1 for what failed, 2 for what was asked wrongly; never a traceback."""
    result = cli(*arguments)
    assert result.exit_code == code
    assert "Traceback" not in result.output


def test_a_memory_budget_is_a_size_with_a_unit(
    pair: tuple[Path, Path], tmp_path: Path, cli: Callable[..., Result]
) -> None:
    """As people write sizes."""
    for index, size in enumerate(["1000", "2kB", "64MiB", "0.5GB"]):
        result = cli("extract", *pair, "--rank", 2, "-o", tmp_path / str(index), "--memory", size)
        assert result.exit_code == 0, result.output


def test_reports_are_frozen_and_errors_carry_their_details(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The library's side of the same coin."""
    report = surgery.extract(*pair, tmp_path / "adapter", rank=2)
    with pytest.raises(AttributeError):
        report.rank = 3  # type: ignore[misc]
    with pytest.raises(surgery.ReportedError) as caught:
        surgery.merge(pair[0], pair[1], tmp_path / "m.st")
    assert caught.value.exit_code == 1
    assert "peft, adapterhub, kohya" in caught.value.details["expected"]


def test_nothing_but_json_goes_to_stdout(pair: tuple[Path, Path], tmp_path: Path, cli: Callable[..., Result]) -> None:
    """One document, also for inspect and diff."""
    save_file(perturbed(weights()), tmp_path / "x.st")
    for arguments in (["inspect", pair[0]], ["diff", pair[0], tmp_path / "x.st"]):
        json.loads(cli(*arguments, "--json").stdout)


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["inspect", "nowhere.st", "--json"], 1), (["no"], 2)]
)
def test_the_program_ends_with_all_of_its_output_and_its_code(arguments: list[str], code: int) -> None:
    """Though it does not wait for Python to take everything down."""
    program = [sys.executable, "-c", "from surgery.cli import run; run()", *arguments]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == code
    if code == 1:
        assert json.loads(done.stdout)["error"]["type"] == "PathNotFound"
        assert done.stderr.startswith("error: ")
    else:
        assert "Usage" in done.stdout + done.stderr
