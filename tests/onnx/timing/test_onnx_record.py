"""The record: what bench writes is what it reads, and what the command line does with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from formats.errors import CorruptFile, PathNotFound
from surgery.onnx.timing.record import BenchReport, Comparison, Epoch, Verdict, read_record, to_json


def _epoch(value: float) -> Epoch:
    return Epoch(log_ratios=(value, value), control=(0.0,), at=(1.0, 2.0), control_at=(1.5,), seconds=(0.01, 0.011))


def _comparison(verdict: Verdict, graph: str = "merged.onnx", **changes: Any) -> Comparison:
    values: dict[str, Any] = {
        "graph": graph,
        "shape": (1, 128),
        "role": "candidate",
        "verdict": verdict,
        "reason": "so it was found",
        "ratio": 1.0012,
        "interval": (0.9991, 1.0034),
        "p_equivalent": 0.001,
        "control_ratio": 1.0,
        "control_interval": (0.999, 1.001),
        "noise_floor": 0.001,
        "latency_reference": 0.01,
        "latency": 0.0101,
        "quantiles_reference": {"0.05": 0.009},
        "quantiles": {"0.05": 0.0091},
        "tokens_per_second": 12673.2,
        "runs_per_block": 20,
        "looks": 2,
        "level": 0.003,
        "seconds": 15.0,
        "device_bytes_reference": None,
        "device_bytes": None,
        "epochs": (_epoch(0.001), _epoch(0.002)),
    }
    return Comparison(**{**values, **changes})


def _report(*comparisons: Comparison) -> BenchReport:
    return BenchReport(
        operation="bench",
        output=None,
        seconds=20.0,
        peak_rss_bytes=10**8,
        ledger={},
        reference="base.onnx",
        graphs=("merged.onnx",),
        provider="CPUExecutionProvider",
        provider_options={},
        margin=0.01,
        seed=0,
        threads=None,
        cuda_graph=False,
        sha256={"base.onnx": "ab"},
        same_graph={"merged.onnx": True},
        assigned={"base.onnx": {"CPUExecutionProvider": 142}},
        versions={"surgery": "1"},
        machine={"cores": "2"},
        started="2026-11-22T12:00:00+00:00",
        comparisons=comparisons,
    )


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., Path]:
    """Writes a record of these comparisons."""

    def write(*comparisons: Comparison) -> Path:
        path = tmp_path / "record.json"
        path.write_text(to_json(_report(*comparisons)))
        return path

    return write


def test_what_is_written_is_read(recorded: Callable[..., Path]) -> None:
    """Every field, tuples and mappings included."""
    written = _report(_comparison("equivalent"), _comparison("slower", role="positive control", tokens_per_second=None))
    assert read_record(recorded(*written.comparisons)) == written


def test_records_from_before_sessions_were_described(recorded: Callable[..., Path]) -> None:
    """They lack that field alone, and are read."""
    path = recorded(_comparison("equivalent"))
    document = json.loads(path.read_text())
    del document["session"]
    path.write_text(json.dumps(document))
    assert read_record(path).session == {}


def test_replay_prints_the_report_again(recorded: Callable[..., Path], cli: Callable[..., Result]) -> None:
    """As a table, and with --json as the very document."""
    path = recorded(_comparison("equivalent"))
    said = cli("bench", "--replay", path)
    assert said.exit_code == 0
    assert "1.0012" in said.stdout
    assert "0.9991 – 1.0034" in said.stdout
    assert "equivalent at a margin of 1.0%" in said.stdout
    assert json.loads(cli("bench", "--replay", path, "--json").stdout) == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        (("equivalent", "equivalent"), 0),
        (("equivalent", "inconclusive"), 4),
        (("inconclusive", "slower"), 3),
        (("faster",), 3),
    ],
)
def test_exit_codes(
    verdicts: tuple[Verdict, ...], code: int, recorded: Callable[..., Path], cli: Callable[..., Result]
) -> None:
    """3 where any verdict is another one than expected, else 4 where one is inconclusive, positive controls aside."""
    path = recorded(_comparison("slower", role="positive control"), *map(_comparison, verdicts))
    assert cli("bench", "--replay", path, "--expect", "equivalent").exit_code == code
    assert cli("bench", "--replay", path).exit_code == 0


def test_a_file_that_is_not_ours(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """No JSON, another tool's, another operation's, a field that is not what it must be: one error that says where."""
    document = json.loads(to_json(_report(_comparison("equivalent"))))
    wrong: list[tuple[object, str]] = [
        ("{", "Expecting"),
        ([], "operation bench"),
        ({"operation": "merge"}, "operation bench"),
        ({**document, "seed": "zero"}, "record.seed"),
        ({**document, "more": 1}, "other fields: more"),
        ({name: value for name, value in document.items() if name != "machine"}, "machine"),
        ({**document, "comparisons": [{**document["comparisons"][0], "verdict": "fine"}]}, "comparisons[0].verdict"),
        ({**document, "comparisons": [{**document["comparisons"][0], "shape": [1]}]}, "comparisons[0].shape"),
    ]
    path = tmp_path / "record.json"
    for content, found in wrong:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(CorruptFile, match="not a record of surgery bench") as caught:
            read_record(path)
        assert found in caught.value.details["found"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CorruptFile):
        read_record(path)
    with pytest.raises(PathNotFound):
        read_record(tmp_path / "nowhere.json")
    result = cli("bench", "--replay", path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: not a record")


@pytest.mark.parametrize("arguments", [["a.onnx"], [], ["a.onnx", "b.onnx", "--replay", "c.json"]], ids=" ".join)
def test_usage(arguments: list[str], cli: Callable[..., Result]) -> None:
    """A reference and a graph, or a record."""
    assert cli("bench", *arguments).exit_code == 2


def test_reports_are_frozen() -> None:
    """Nothing is changed after the fact."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        _report().seed = 1  # type: ignore[misc]
