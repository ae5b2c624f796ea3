"""bench: is B.onnx as fast as A.onnx, within a margin declared beforehand?

Feeds both the same inputs, has the time taken, has the verdict drawn, and keeps with it everything that somebody who
doubts it would ask for. The clock is `surgery.onnx.latency`, the judgement `surgery.onnx.verdict`.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formats.errors import PathNotFound
from surgery.errors import Unsupported
from surgery.onnx.graph_file import load_graph
from surgery.report import Report, Stopwatch, peak_rss
from surgery.threads import cores
from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.onnx.verdict import Estimate


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """What bench found. Ratios are time of B / time of A. Nothing is written, so the ledger is empty.

    Attributes:
        a, b: the two graphs.
        verdict: equivalent, slower, faster or inconclusive, always as against the margin.
        reason: why, in a sentence.
        ratio: the mean over epochs of the median block's ratio.
        interval: its 90 % interval.
        margin: what was declared: 0.02 means within 2 % of A.
        p_equivalent: of the two one-sided tests at the margin; small speaks for equivalence.
        noise_floor: the margin within which two sessions of A itself could be told to be equal.
        control_ratio, control_interval: the same two sessions' ratio.
        latency_a, latency_b: median seconds of one run.
        shape: batch and sequence.
        provider: the execution provider that really ran, as ONNX Runtime names it.
        threads: intra-op threads asked for; None leaves it to ONNX Runtime.
        seed: of inputs, order and bootstrap.
        blocks, runs_per_block, epochs: how much was measured; an epoch is one set of sessions.
        log_ratios, control_log_ratios: every block of every epoch, in order.
        same_graph: whether the two `.onnx` files are byte-identical, so that only weights differ.
        sha256: of each file read.
        versions: of everything that computes.
        machine: processor, cores and system.
    """

    a: str
    b: str
    verdict: str
    reason: str
    ratio: float
    interval: tuple[float, float]
    margin: float
    p_equivalent: float
    noise_floor: float
    control_ratio: float
    control_interval: tuple[float, float]
    latency_a: float
    latency_b: float
    shape: tuple[int, int]
    provider: str
    threads: int | None
    seed: int
    blocks: int
    runs_per_block: int
    epochs: int
    log_ratios: tuple[tuple[float, ...], ...]
    control_log_ratios: tuple[tuple[float, ...], ...]
    same_graph: bool
    sha256: Mapping[str, str]
    versions: Mapping[str, str]
    machine: Mapping[str, str]


def bench(
    a: str | Path,
    b: str | Path,
    *,
    shape: tuple[int, int] = (1, 128),
    provider: str = "cpu",
    margin: float = 0.02,
    seconds: float = 60.0,
    threads: int | None = None,
    seed: int = 0,
) -> BenchReport:
    """Compares the latency of two graphs that take the same inputs.

    Args:
        a: the reference, a `.onnx` file.
        b: the graph that is judged.
        shape: batch and sequence.
        provider: `cpu`, `cuda` or another that this ONNX Runtime has; one that would not really run is an error.
        margin: the largest difference that does not matter to you, as a ratio.
        seconds: how long to measure, loading included.
        threads: intra-op threads of each session.
        seed: of inputs, order and bootstrap.

    Raises:
        PathNotFound, CorruptFile: no graph there.
        InputsDiffer: the two graphs take different inputs.
        ProviderUnavailable: the provider is not there, or would not run.
        Unsupported: inputs or a shape that we cannot feed, a margin or a time that makes no sense.
    """
    watch = Stopwatch()
    a, b = Path(a), Path(b)
    if not (0 < margin < 1 and seconds > 0 and min(shape) > 0 and (threads is None or threads > 0)):
        raise Unsupported(
            "bench cannot measure this",
            expected="a margin between 0 and 1, and positive seconds, shape and threads",
            found=f"margin {margin}, {seconds} seconds, shape {shape}, threads {threads}",
        )
    graph_a, graph_b = load_graph(a), load_graph(b)

    from surgery.onnx import feeds as inputs
    from surgery.onnx.latency import measure
    from surgery.onnx.session import provider_name
    from surgery.onnx.verdict import decide, equivalence_p, estimate, noise_floor

    inputs.require_same_inputs(a, b, inputs.graph_inputs(graph_a), inputs.graph_inputs(graph_b))
    feeds = inputs.make_feeds(graph_a, a, shape, seed)
    name = provider_name(provider)
    hashes = _hashes(a, graph_a) | _hashes(b, graph_b)
    measured = measure(a, b, feeds, provider=name, seconds=seconds, threads=threads, seed=seed)
    effect, control = estimate(measured.log_ratios, seed=seed), estimate(measured.control, seed=seed)
    verdict, reason = decide(effect, control, margin)
    return BenchReport(
        operation="bench",
        output=None,
        seconds=watch.seconds,
        peak_rss_bytes=peak_rss(),
        ledger={},
        a=str(a),
        b=str(b),
        verdict=verdict,
        reason=reason,
        ratio=math.exp(effect.mean),
        interval=_ratios(effect),
        margin=margin,
        p_equivalent=equivalence_p(effect, margin),
        noise_floor=noise_floor(control),
        control_ratio=math.exp(control.mean),
        control_interval=_ratios(control),
        latency_a=measured.latency_a,
        latency_b=measured.latency_b,
        shape=(shape[0], shape[1]),
        provider=measured.provider,
        threads=threads,
        seed=seed,
        blocks=sum(map(len, measured.log_ratios)),
        runs_per_block=measured.runs_per_block,
        epochs=len(measured.log_ratios),
        log_ratios=measured.log_ratios,
        control_log_ratios=measured.control,
        same_graph=hashes[str(a)] == hashes[str(b)],
        sha256=hashes,
        versions=_versions(),
        machine=_machine(),
    )


def _hashes(path: Path, graph: Any) -> dict[str, str]:
    """SHA-256 of the graph's file and of every file its weights lie in."""
    import onnx

    external = {
        entry.value
        for tensor in graph.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    files = [path, *(path.parent / location for location in sorted(external))]
    hashes = {}
    for file in files:
        if not file.is_file():
            raise PathNotFound("the graph's weights are not where it says", where=file)
        with file.open("rb") as stream:
            hashes[str(file)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def _ratios(found: Estimate) -> tuple[float, float]:
    return math.exp(found.low), math.exp(found.high)


def _versions() -> dict[str, str]:
    import numpy
    import onnx
    import onnxruntime

    return {
        "surgery": __version__,
        "onnxruntime": onnxruntime.__version__,
        "onnx": onnx.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def _machine() -> dict[str, str]:
    return {"processor": _processor(), "cores": str(cores()), "system": platform.platform()}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
