from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from formats.errors import CorruptFile, PathNotFound
from surgery.errors import InputsDiffer, ProviderUnavailable, Unsupported
from surgery.onnx import latency
from surgery.onnx.feeds import graph_inputs, make_feeds, vocabulary
from surgery.onnx.session import provider_name
from surgery.operations.bench import bench


def _tiny(path: Path, inputs: dict[str, tuple[int | str, ...]], nodes: int = 1) -> Path:
    """A graph of a few additions over the given inputs."""
    declared = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT64, shape) for n, shape in inputs.items()]
    names = list(inputs)
    steps = [onnx.helper.make_node("Identity", [names[0]], ["x0"])]
    steps += [onnx.helper.make_node("Add", [f"x{i}", names[i % len(names)]], [f"x{i + 1}"]) for i in range(nodes)]
    out = onnx.helper.make_tensor_value_info(f"x{nodes}", onnx.TensorProto.INT64, inputs[names[0]])
    graph = onnx.helper.make_graph(steps, "tiny", declared, [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


TOKENS: dict[str, tuple[int | str, ...]] = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "sequence"),
}


def test_report_is_plain_and_complete(twins: Callable[[str], Any]) -> None:
    """A real comparison of base and merged: everything a doubter would ask for is in the report."""
    base, merged = twins("bert")
    report = bench(base.onnx, merged.onnx, shape=(2, 9), seconds=1.5, threads=1, seed=4)
    said = json.loads(json.dumps(dataclasses.asdict(report)))
    assert said["operation"] == "bench"
    assert said["output"] is None
    assert said["verdict"] in ("equivalent", "slower", "faster", "inconclusive")
    assert said["provider"] == "CPUExecutionProvider"
    assert said["shape"] == [2, 9]
    assert said["interval"][0] <= said["ratio"] <= said["interval"][1]
    assert said["epochs"] == len(said["log_ratios"]) == len(said["control_log_ratios"])
    assert said["blocks"] == sum(map(len, said["log_ratios"])) >= 3 * said["epochs"]
    assert said["same_graph"] is True
    for exported in (base, merged):
        for file in (exported.onnx, exported.onnx.parent / "model.safetensors"):
            assert said["sha256"][str(file)] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert said["versions"]["onnxruntime"] == onnxruntime.__version__
    assert said["latency_a"] > 0
    assert said["noise_floor"] >= 0
    assert said["margin"] == 0.02


def test_little_time_is_inconclusive(tmp_path: Path) -> None:
    """However little time there is, something is measured and nothing claimed."""
    model = _tiny(tmp_path / "a.onnx", TOKENS)
    report = bench(model, model, seconds=1e-6)
    assert (report.epochs, report.blocks) == (2, 6)
    assert all(map(math.isfinite, report.interval))  # or its JSON would be none
    assert report.verdict == "inconclusive"


def test_blocks_are_paired_and_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is A B B A, or B A A B: each gets the same number of runs and the same mean place in time."""
    order: list[str] = []
    clock = iter(range(1000))

    def run(bound: str) -> float:
        order.append(bound)
        return float(next(clock))

    monkeypatch.setattr(latency, "_run", run)
    first, second = latency._block("a", "b", 2, swap=False)  # type: ignore[arg-type]
    assert order == list("aabbbbaa")
    assert len(first) == len(second) == 4
    assert np.mean(first) == np.mean(second)
    order.clear()
    latency._block("a", "b", 1, swap=True)  # type: ignore[arg-type]
    assert order == list("baab")


def test_different_inputs(tmp_path: Path) -> None:
    """Graphs of other inputs, or the same in fixed shapes, cannot be compared; axis names do not matter."""
    a = _tiny(tmp_path / "a.onnx", TOKENS)
    other = _tiny(tmp_path / "b.onnx", {"input_ids": ("batch", "sequence")})
    with pytest.raises(InputsDiffer) as caught:
        bench(a, other, seconds=0.01)
    assert "attention_mask" in caught.value.details["expected"]
    assert "attention_mask" not in caught.value.details["found"]
    renamed = _tiny(tmp_path / "c.onnx", {"input_ids": ("n", "t"), "attention_mask": ("n", "t")})
    assert bench(a, renamed, seconds=0.01).same_graph is False
    with pytest.raises(InputsDiffer):
        bench(a, _tiny(tmp_path / "d.onnx", dict.fromkeys(TOKENS, (1, 128))), seconds=0.01)


@pytest.mark.parametrize("provider", ["cuda", "rocm", "nonsense"])
def test_a_provider_that_would_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str], provider: str) -> None:
    """ONNX Runtime falls back to the CPU without an error; we do not, and nothing but the error is said."""
    if provider == "cuda" and _cuda_runs():
        pytest.skip("CUDA is there")
    model = _tiny(tmp_path / "a.onnx", TOKENS)
    with pytest.raises(ProviderUnavailable):
        bench(model, model, provider=provider, seconds=0.01)
    assert capfd.readouterr().out == ""


def _cuda_runs() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.mark.parametrize("spelling", ["cpu", "CPU", "CPUExecutionProvider"])
def test_providers_by_their_short_names(spelling: str) -> None:
    """As ONNX Runtime spells them, or without the suffix."""
    assert provider_name(spelling) == "CPUExecutionProvider"


def test_files_that_are_not_there_or_no_graphs(tmp_path: Path, bert: Any) -> None:
    """A missing graph, a missing payload and something else entirely are told apart."""
    model = _tiny(tmp_path / "a.onnx", TOKENS)
    with pytest.raises(PathNotFound):
        bench(model, tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("not a graph at all")
    with pytest.raises(CorruptFile):
        bench(tmp_path / "text.onnx", model)
    (tmp_path / "alone.onnx").write_bytes(bert.onnx.read_bytes())
    with pytest.raises(PathNotFound, match="weights are not where it says"):
        bench(tmp_path / "alone.onnx", tmp_path / "alone.onnx")


@pytest.mark.parametrize(
    "options", [{"margin": 0.0}, {"margin": 1.5}, {"seconds": 0}, {"shape": (0, 128)}, {"threads": 0}]
)
def test_what_makes_no_sense(tmp_path: Path, options: dict[str, Any]) -> None:
    """Refused before anything is loaded."""
    with pytest.raises(Unsupported, match="cannot measure"):
        bench(tmp_path / "a.onnx", tmp_path / "b.onnx", **options)


def test_feeds_follow_the_graph(bert: Any) -> None:
    """Tokens below the vocabulary, masks of ones, one kind of token, in the graph's own dtypes."""
    model = onnx.load(bert.onnx, load_external_data=False)
    assert vocabulary(model) == 100
    feeds = make_feeds(model, bert.onnx, (2, 7), seed=0)
    assert feeds.keys() == {entry.name for entry in graph_inputs(model)}
    assert {(array.dtype, array.shape) for array in feeds.values()} == {(np.dtype(np.int64), (2, 7))}
    assert feeds["input_ids"].max() < 100
    assert feeds["attention_mask"].all()
    assert not feeds["token_type_ids"].any()
    np.testing.assert_array_equal(feeds["input_ids"], make_feeds(model, bert.onnx, (2, 7), seed=0)["input_ids"])


def test_positions_count_up(tmp_path: Path) -> None:
    """position_ids are positions."""
    path = _tiny(tmp_path / "a.onnx", {"input_ids": ("b", "s"), "position_ids": ("b", "s")})
    assert make_feeds(onnx.load(path), path, (2, 3), 0)["position_ids"].tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"pixel_values": ("batch", 3)}, "do not know what to feed"),
        ({"input_ids": (1, 64)}, "does not take this shape"),
        ({"input_ids": ("batch",)}, "does not take this shape"),
    ],
)
def test_inputs_we_cannot_feed(tmp_path: Path, inputs: dict[str, tuple[int | str, ...]], reason: str) -> None:
    """Unknown names and fixed shapes are refused by naming them."""
    model = _tiny(tmp_path / "a.onnx", inputs)
    with pytest.raises(Unsupported, match=reason) as caught:
        bench(model, model, seconds=0.01)
    assert next(iter(inputs)) in caught.value.details["where"]
