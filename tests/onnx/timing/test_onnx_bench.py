from __future__ import annotations

import dataclasses
import datetime
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

from formats.errors import CorruptFile, PathNotFound, UnsafeFile
from surgery.errors import InputsDiffer, ProviderUnavailable, Unsupported
from surgery.onnx.run import session
from surgery.onnx.run.session import provider_name
from surgery.onnx.timing import latency
from surgery.onnx.timing.record import read_record
from surgery.operations.latency.bench import bench


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


def test_report_is_plain_and_complete(twins: Callable[[str], Any], tmp_path: Path) -> None:
    """A real comparison of base and merged at two shapes: everything a doubter would ask for is in the record."""
    base, merged = twins("bert")
    record = tmp_path / "record.json"
    report = bench(base.onnx, merged.onnx, shapes=[(2, 9), (1, 4)], seconds=4, threads=1, seed=4, record=record)
    assert read_record(record) == report
    said = json.loads(record.read_text())
    assert said == json.loads(json.dumps(dataclasses.asdict(report)))
    assert (said["operation"], said["output"]) == ("bench", str(record))
    assert (said["reference"], said["graphs"]) == (str(base.onnx), [str(merged.onnx)])
    assert said["provider"] == "CPUExecutionProvider"
    assert said["same_graph"] == {str(merged.onnx): True}
    assert list(said["assigned"][str(base.onnx)]) == ["CPUExecutionProvider"]
    for exported in (base, merged):
        for file in (exported.onnx, exported.onnx.parent / "model.safetensors"):
            assert said["sha256"][str(file)] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert said["versions"]["onnxruntime"] == onnxruntime.__version__
    assert said["session"]["intra_op_num_threads"] == "1"
    assert said["session"]["session.intra_op.allow_spinning"] == "0"
    assert said["machine"].keys() >= {"processor", "cores", "system", "load before", "load after"}
    assert datetime.datetime.fromisoformat(said["started"]).tzinfo is not None
    assert [each["shape"] for each in said["comparisons"]] == [[2, 9], [1, 4]]
    for each in said["comparisons"]:
        assert each["verdict"] in ("equivalent", "slower", "faster", "inconclusive")
        assert each["interval"][0] <= each["ratio"] <= each["interval"][1]
        assert 0 < each["quantiles"]["0.05"] <= each["latency"] <= each["quantiles"]["0.95"]
        assert each["tokens_per_second"] == pytest.approx(math.prod(each["shape"]) / each["latency"])
        assert each["noise_floor"] >= 0
        assert min(each["device_bytes"], each["device_bytes_reference"]) >= 0  # tiny models hide in what is free
        for epoch in each["epochs"]:
            assert len(epoch["log_ratios"]) == len(epoch["at"]) == len(epoch["seconds"]) >= 3
            assert len(epoch["control"]) == len(epoch["control_at"]) >= 3
        times = [at for epoch in each["epochs"] for at in epoch["at"]]
        assert times == sorted(times)


def test_too_little_time_is_an_error(tmp_path: Path) -> None:
    """It says how much it would take, before anything is measured, and leaves no record."""
    model = _tiny(tmp_path / "a.onnx", TOKENS)
    with pytest.raises(Unsupported, match="too little time") as caught:
        bench(model, model, seconds=1e-6, record=tmp_path / "record.json")
    assert "seconds or more" in caught.value.details["expected"]
    assert not (tmp_path / "record.json").exists()


def test_a_slower_graph_is_found_and_serves_as_positive_control(tmp_path: Path) -> None:
    """A graph of many more nodes is slower beyond any noise, so the run ends early; it also vouches for the rest."""
    small = _tiny(tmp_path / "a.onnx", TOKENS)
    large = _tiny(tmp_path / "b.onnx", TOKENS, nodes=400)
    report = bench(small, large, seconds=4, margin=0.5, threads=1)
    (found,) = report.comparisons
    assert (found.verdict, found.role) == ("slower", "candidate")
    assert found.seconds < 4
    report = bench(small, small, positive_control=large, seconds=2, margin=0.5, threads=1)
    assert [each.role for each in report.comparisons] == ["positive control", "candidate"]
    assert report.graphs == (str(small),)


def test_a_positive_control_that_is_not_slower_decides_nothing(tmp_path: Path) -> None:
    """Where a slower graph would not be found, no equality is claimed."""
    model = _tiny(tmp_path / "a.onnx", TOKENS)
    control = _tiny(tmp_path / "b.onnx", TOKENS)
    report = bench(model, model, positive_control=control, seconds=2, margin=0.5, threads=1)
    assert report.comparisons[1].verdict == "inconclusive"
    assert "positive control was found" in report.comparisons[1].reason


def test_a_decoder_with_a_cache_in_half_precision(tmp_path: Path) -> None:
    """A run computes one token for each of the batch, whatever the cache holds."""
    tensors = onnx.TensorProto
    declare = onnx.helper.make_tensor_value_info
    inputs = [
        declare("input_ids", tensors.INT64, ("batch", "sequence")),
        declare("attention_mask", tensors.INT64, ("batch", "total_sequence")),
        declare("past_key_values.0.key", tensors.FLOAT16, ("batch", 2, "past_sequence", 4)),
    ]
    outputs = [declare(f"{entry.name}.out", entry.type.tensor_type.elem_type, None) for entry in inputs]
    nodes = [onnx.helper.make_node("Identity", [a.name], [b.name]) for a, b in zip(inputs, outputs, strict=True)]
    graph = onnx.helper.make_graph(nodes, "decoder", inputs, outputs)
    path = tmp_path / "decoder.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    (found,) = bench(path, path, shapes=[(3, 10)], seconds=2, margin=0.5, threads=1).comparisons
    assert found.tokens_per_second == pytest.approx(3 / found.latency)


def test_warm_is_when_runs_get_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more runs, neither 1 % below the fastest yet; slower runs do not matter."""
    times = iter([9.0, 8.0, 7.0, 9.0, 5.0, 5.0, 4.99, 6.0, 1.0])
    monkeypatch.setattr(latency, "_run", lambda bound: next(times))
    assert latency._warm("session") == 4.99  # type: ignore[arg-type]
    assert next(times) == 1.0


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
        bench(a, other, seconds=0.5)
    assert "attention_mask" in caught.value.details["expected"]
    assert "attention_mask" not in caught.value.details["found"]
    renamed = _tiny(tmp_path / "c.onnx", {"input_ids": ("n", "t"), "attention_mask": ("n", "t")})
    assert bench(a, renamed, seconds=2).same_graph == {str(renamed): False}
    with pytest.raises(InputsDiffer):
        bench(a, _tiny(tmp_path / "d.onnx", dict.fromkeys(TOKENS, (1, 128))), seconds=0.5)


@pytest.mark.parametrize("provider", ["cuda", "rocm", "nonsense"])
def test_a_provider_that_would_not_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    """ONNX Runtime falls back to the CPU without an error; we do not, and nothing but the error is said."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hides the GPUs there may be
    model = _tiny(tmp_path / "a.onnx", TOKENS)
    with pytest.raises(ProviderUnavailable):
        bench(model, model, provider=provider, seconds=0.5)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("spelling", ["cpu", "CPU", "CPUExecutionProvider"])
def test_providers_by_their_short_names(spelling: str) -> None:
    """As ONNX Runtime spells them, or without the suffix."""
    assert provider_name(spelling) == "CPUExecutionProvider"


def test_cuda_graphs_are_refused_elsewhere(tmp_path: Path) -> None:
    """Only the CUDA provider captures them."""
    model = _tiny(tmp_path / "a.onnx", TOKENS)
    with pytest.raises(Unsupported, match="need the CUDA provider"):
        bench(model, model, cuda_graph=True)


def test_what_a_gpu_is_asked_for() -> None:
    """float32 that stays float32; runs captured where wanted; CUDA behind TensorRT, and the CPU behind neither."""
    assert session._asked("CUDAExecutionProvider", False) == [("CUDAExecutionProvider", {"use_tf32": "0"})]
    captured = {"use_tf32": "0", "enable_cuda_graph": "1"}
    assert session._asked("CUDAExecutionProvider", True) == [("CUDAExecutionProvider", captured)]
    names = [name for name, _ in session._asked("TensorrtExecutionProvider", False)]
    assert names == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]


def test_a_run_before_the_buffers_are_bound_is_not_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph keeps its buffers' addresses, and that run has others; by its graph's number, -1, it is left out."""
    seen: list[str] = []

    class Watched:
        """A session that notes which graph a run belongs to."""

        def __init__(self, real: Any) -> None:
            self.real = real

        def run(self, names: Any, feeds: Any, options: Any) -> Any:
            seen.append(options.get_run_config_entry("gpu_graph_id"))
            return self.real.run(names, feeds, options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

    path = _tiny(tmp_path / "a.onnx", TOKENS)
    monkeypatch.setattr(session, "open_session", lambda *a, **k: Watched(onnxruntime.InferenceSession(str(path))))
    feeds: Any = {name: np.ones((1, 4), np.int64) for name in TOKENS}
    bound = session.bind(path, feeds, session.Setting("CPUExecutionProvider", None, cuda_graph=True))
    bound.run()
    assert seen == ["-1"]


def test_a_shape_that_only_the_runtime_refuses(twins: Callable[[str], Any]) -> None:
    """More positions than the model has: known before anything is measured, with the shape in the message."""
    base, merged = twins("bert")
    with pytest.raises(Unsupported, match="on such inputs") as caught:
        bench(base.onnx, merged.onnx, shapes=[(1, 8), (1, 65)])
    assert "input_ids[1, 65]" in caught.value.details["found"]


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


@pytest.mark.parametrize("location", ["../weights", "/weights"])
def test_weights_that_lead_elsewhere(tmp_path: Path, location: str) -> None:
    """Nothing is read outside of the graph's folder."""
    model = onnx.load(_tiny(tmp_path / "a.onnx", TOKENS))
    outside = model.graph.initializer.add(name="w", dims=[1], data_type=1, data_location=1)
    outside.external_data.add(key="location", value=location)
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsafeFile):
        bench(tmp_path / "a.onnx", tmp_path / "a.onnx")


@pytest.mark.parametrize(
    "options", [{"margin": 0.0}, {"margin": 1.5}, {"seconds": 0}, {"seconds": math.inf}, {"threads": 0}, {"seed": -1}]
)
def test_what_makes_no_sense(tmp_path: Path, options: dict[str, Any]) -> None:
    """Refused before anything is loaded."""
    with pytest.raises(Unsupported, match="cannot measure"):
        bench(tmp_path / "a.onnx", tmp_path / "b.onnx", **options)


def test_a_reference_alone_or_no_shape(tmp_path: Path) -> None:
    """There is nothing to compare."""
    with pytest.raises(Unsupported, match="besides the reference"):
        bench(tmp_path / "a.onnx")
    with pytest.raises(Unsupported, match="positive shapes"):
        bench(tmp_path / "a.onnx", tmp_path / "b.onnx", shapes=[(0, 128)])
