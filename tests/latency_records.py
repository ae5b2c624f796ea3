"""Records of bench as it would leave them, without a clock: seeded noise around whatever ratio is asked for."""

from __future__ import annotations

import math

import numpy as np

from surgery.onnx.timing.record import BenchReport, Comparison, Epoch, Verdict

MARGIN = 0.01
BASE, MERGED, ADAPTER = "work/base/model.onnx", "work/merged/model.onnx", "work/adapter/model.onnx"


def comparison(
    graph: str = MERGED,
    ratio: float = 1.001,
    verdict: Verdict = "equivalent",
    *,
    shape: tuple[int, int] = (1, 128),
    epochs: int = 8,
    blocks: int = 12,
    noise: float = 0.01,
    role: str = "candidate",
    seed: int = 0,
) -> Comparison:
    """A graph whose blocks lie around a ratio."""
    rng = np.random.default_rng(seed)
    sets = []
    for number in range(epochs):
        session = 0.002 * rng.standard_normal()
        at = 10.0 * number + 2 + np.arange(blocks) * 0.6
        sets.append(
            Epoch(
                log_ratios=_numbers(math.log(ratio) + session + noise * rng.standard_normal(blocks)),
                control=_numbers(session + noise * rng.standard_normal(blocks)),
                at=_numbers(at),
                control_at=_numbers(at + 0.3),
                seconds=_numbers(0.0123 * (1 + 0.02 * np.sin(at / 20) + noise * rng.standard_normal(blocks))),
            )
        )
    return Comparison(
        graph=graph,
        shape=shape,
        role=role,  # type: ignore[arg-type]
        verdict=verdict,
        reason=f"the ratio was shown to lie where {verdict} says",
        ratio=ratio,
        interval=(ratio - 0.0031, ratio + 0.0029),
        p_equivalent=0.0123,
        control_ratio=1.0004,
        control_interval=(0.9972, 1.0035),
        noise_floor=0.0035,
        latency_reference=0.0123,
        latency=0.0123 * ratio,
        quantiles_reference={"0.05": 0.0119, "0.25": 0.0121, "0.75": 0.0126, "0.95": 0.0137, "0.99": 0.0151},
        quantiles={"0.05": 0.012, "0.25": 0.0122, "0.75": 0.0127, "0.95": 0.0138, "0.99": 0.0152},
        tokens_per_second=10_406.5,
        runs_per_block=20,
        looks=3,
        level=0.0167,
        seconds=81.2,
        device_bytes_reference=1_400_000_000,
        device_bytes=1_450_000_000,
        epochs=tuple(sets),
    )


def record(*comparisons: Comparison, **changes: object) -> BenchReport:
    """A report of them; of base against merged where none are given."""
    compared = comparisons or (comparison(),)
    graphs = tuple(dict.fromkeys(each.graph for each in compared if each.role == "candidate"))
    plain: dict[str, object] = {
        "operation": "bench",
        "output": None,
        "seconds": 82.0,
        "peak_rss_bytes": 1_000_000,
        "ledger": {},
        "reference": BASE,
        "graphs": graphs,
        "provider": "CPUExecutionProvider",
        "provider_options": {"arena": "yes"},
        "margin": MARGIN,
        "seed": 7,
        "threads": 2,
        "cuda_graph": False,
        "sha256": {BASE: "ab" * 32, **dict.fromkeys(graphs, "ab" * 32)},
        "same_graph": {graph: graph == MERGED for graph in graphs},
        "assigned": {path: {"CPUExecutionProvider": 142} for path in (BASE, *graphs)},
        "versions": {"surgery": "0.1.0", "onnxruntime": "1.31.1"},
        "machine": {"processor": "A Processor 9000", "cores": "2", "system": "Linux"},
        "started": "2026-11-22T10:11:12+00:00",
        "comparisons": compared,
        "session": {"inter_op_num_threads": "1", "session.intra_op.allow_spinning": "no spinning"},
    }
    return BenchReport(**{**plain, **changes})  # type: ignore[arg-type]


def several() -> BenchReport:
    """Three graphs at two shapes, with every verdict among them."""
    return record(
        comparison(),
        comparison(shape=(16, 256), ratio=0.9994, seed=1),
        comparison("work/branch/model.onnx", 1.036, "slower", seed=2),
        comparison("work/branch/model.onnx", 1.012, "inconclusive", shape=(16, 256), noise=0.05, seed=3),
        comparison("work/folded/model.onnx", 0.951, "faster", seed=4),
        comparison(ADAPTER, 1.303, "slower", role="positive control", seed=5),
    )


def _numbers(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
