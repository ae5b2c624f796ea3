"""bench: are these graphs as fast as the first, within a margin declared in advance?

It gives all graphs the same inputs, measures their times, decides each verdict, and records everything needed to check
it. `surgery.onnx.timing.latency` measures the times, and `surgery.onnx.timing.verdict` decides.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from formats.open_files import OpenFiles
from formats.spec import TensorRef
from surgery.errors import Unsupported
from surgery.onnx.files.graph_file import files_of, load_graph
from surgery.onnx.timing.record import BenchReport, Comparison, Role
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Job, header, runs
from surgery.pipeline.plan import Elsewhere, Plan, Step
from surgery.report import Stopwatch
from surgery.report_files import RecordFile
from surgery.version import __version__

if TYPE_CHECKING:
    from surgery.onnx.run.feeds import Feeds
    from surgery.onnx.run.session import Setting
    from surgery.onnx.timing.latency import Rehearsal, Taken
    from surgery.onnx.timing.verdict import Ruling

_QUANTILES = (0.05, 0.25, 0.75, 0.95, 0.99)


def prepare_bench(
    reference: str | Path,
    *graphs: str | Path,
    shapes: Sequence[tuple[int, int]] = ((1, 128),),
    provider: str = "cpu",
    margin: float = 0.01,
    seconds: float = 60.0,
    threads: int | None = None,
    seed: int = 0,
    cuda_graph: bool = False,
    positive_control: str | Path | None = None,
    record: str | Path | None = None,
    force: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> Job[BenchReport]:
    """Prepares a job that compares the latency of graphs with a reference graph that takes the same inputs.

    Args:
        reference: a `.onnx` file.
        graphs: the graphs to compare with the reference.
        shapes: pairs of batch and sequence; each is compared separately. If a graph has a cache, sequence is the number
            of cached tokens, and a run computes one more token.
        provider: `cpu`, `cuda` or another that this ONNX Runtime has; a provider that would not really run is an error.
        margin: the largest difference that does not matter to you, as a ratio.
        seconds: longest time to measure each graph at each shape, loading included; less if the result is clear.
        threads: intra-op threads of each session.
        seed: seed for inputs, order and bootstrap.
        cuda_graph: capture each session's run into a CUDA graph and time its replay.
        positive_control: a graph that is known to be slower; if it is not measured as slower, nothing is concluded.
        record: a JSON file to write the report to.
        force: overwrite an existing `record`.
        progress: called after each set of sessions with the current comparison and the elapsed share of its time.

    Raises:
        PathNotFound, CorruptFile: a graph is missing or damaged.
        InputsDiffer: a graph takes other inputs than the reference.
        ProviderUnavailable: the provider is not installed, or would not run the graph.
        Unsupported: inputs or a shape that bench cannot feed, an invalid margin or time, or too little time for any
            verdict (the last when it runs).
        OutputExists, WriteFailed: see Staging.
    """
    watch, files = Stopwatch(), OpenFiles()
    if not graphs:
        raise Unsupported(
            "bench needs a graph besides the reference", where=reference, then="surgery bench REFERENCE GRAPH"
        )
    check_settings(shapes, margin, seconds, threads, seed)
    candidates = tuple(dict.fromkeys(map(Path, graphs)))
    controls = () if positive_control is None else (Path(positive_control),)
    paths = (Path(reference), *controls, *candidates)
    kept = RecordFile.at(record, paths, force)
    models = {path: load_graph(path, files) for path in paths}

    from surgery.onnx.run import feeds as inputs
    from surgery.onnx.run.session import CUDA, Setting, provider_name

    setting = Setting(provider_name(provider), threads, cuda_graph)
    if cuda_graph and setting.provider != CUDA:
        raise Unsupported(
            "CUDA graphs need the CUDA provider",
            expected="--provider cuda",
            found=provider,
            then="pass --provider cuda, or omit --cuda-graph",
        )
    first = inputs.graph_inputs(models[paths[0]])
    for path in paths[1:]:
        inputs.require_same_inputs(paths[0], path, first, inputs.graph_inputs(models[path]))
    laboratory = _Laboratory(
        reference=paths[0],
        controls=controls,
        candidates=candidates,
        read={path: files_of(model, path) for path, model in models.items()},
        setting=setting,
        feeds={shape: inputs.make_feeds(models[paths[0]], paths[0], shape, seed) for shape in shapes},
        tokens={shape: inputs.tokens_per_run(models[paths[0]], shape) for shape in shapes},
        margin=margin,
        seconds=seconds,
        seed=seed,
        progress=progress,
    )
    plan = Plan("bench", tuple(laboratory.steps()))

    def work(resources: Resources) -> BenchReport:
        report = laboratory.report(plan, watch, kept.path)
        kept.write(report)
        return report

    return Job(plan, paths, kept.outputs, files, work, Resources())


bench = runs(prepare_bench)


def check_settings(
    shapes: Sequence[tuple[int, int]], margin: float, seconds: float, threads: int | None, seed: int
) -> None:
    """Raises Unsupported for settings with which nothing can be measured."""
    if not (shapes and all(min(shape) > 0 for shape in shapes)):
        raise Unsupported("a measurement needs positive shapes", found=f"shapes {shapes}", then="pass another --shape")
    if not (0 < margin < 1 and 0 < seconds < math.inf and (threads is None or threads > 0) and seed >= 0):
        raise Unsupported(
            "bench cannot measure with these settings",
            expected="a margin between 0 and 1, positive seconds and threads, and a seed that is not negative",
            found=f"margin {margin}, {seconds} seconds, threads {threads}, seed {seed}",
            then="correct the one that is out of range",
        )


def check_time(path: Path, shape: tuple[int, int], a: Rehearsal, b: Rehearsal, seconds: float) -> None:
    """Raises Unsupported if `seconds` are too few for a verdict on b, the graph at `path`, against a."""
    from surgery.onnx.timing.latency import least_seconds

    needed = least_seconds(a, b)
    if needed > seconds:
        raise Unsupported(
            "too little time for any verdict",
            where=f"{path} at {shape[0]}×{shape[1]}",
            expected=f"about {math.ceil(needed)} seconds or more",
            found=f"{seconds:g} seconds",
            then="pass more --seconds, or choose a smaller --shape",
        )


@dataclass(frozen=True)
class _Laboratory:
    """The data shared by all comparisons of a bench.

    Attributes:
        reference, controls, candidates: the graphs.
        read: the files of each graph.
        setting: the settings of the sessions.
        feeds, tokens: inputs and tokens of one run, by shape; tokens are None if the graphs take none.
        margin, seconds, seed: as for bench.
        progress: called after each set of sessions, if given.
    """

    reference: Path
    controls: tuple[Path, ...]
    candidates: tuple[Path, ...]
    read: Mapping[Path, tuple[TensorRef, ...]]
    setting: Setting
    feeds: Mapping[tuple[int, int], Feeds]
    tokens: Mapping[tuple[int, int], int | None]
    margin: float
    seconds: float
    seed: int
    progress: Callable[[str, float], None] | None

    @property
    def judged(self) -> tuple[tuple[Path, Role], ...]:
        """Every graph that is compared with the reference."""
        controls: list[tuple[Path, Role]] = [(path, "positive control") for path in self.controls]
        return (*controls, *((path, "candidate") for path in self.candidates))

    def steps(self) -> Iterator[Step]:
        """The comparisons, for display in the plan."""
        for (batch, sequence), (path, _) in itertools.product(self.feeds, self.judged):
            inputs = (*self.read[self.reference], *self.read[path])
            yield Step(f"{path} at {batch}×{sequence}", inputs, (), Elsewhere("time"))

    def report(self, plan: Plan, watch: Stopwatch, record: Path | None) -> BenchReport:
        """Measures the times, and reports the verdicts."""
        from surgery.onnx.run.machine import condition, machine

        start = time.perf_counter()
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        hashes = {name: digest for files in self.read.values() for name, digest in _hashes(files)}
        described = machine() | condition("before")
        others = [path for path, _ in self.judged]
        rehearsed = self.rehearse((self.reference, *others))
        comparisons = [
            self.compare(path, role, shape, rehearsed, start) for shape in self.feeds for path, role in self.judged
        ]
        first = next(iter(self.feeds))
        some = rehearsed[self.reference, first]
        return BenchReport(
            **{**header(plan, watch, record), "ledger": {}},
            reference=str(self.reference),
            graphs=tuple(map(str, self.candidates)),
            provider=self.setting.provider,
            provider_options=some.options,
            margin=self.margin,
            seed=self.seed,
            threads=self.setting.threads,
            cuda_graph=self.setting.cuda_graph,
            sha256=hashes,
            same_graph={str(path): hashes[str(path)] == hashes[str(self.reference)] for path in others},
            assigned={str(path): rehearsed[path, first].nodes for path in (self.reference, *others)},
            session=some.settings,
            versions=_versions(self.setting.device),
            machine=described | condition("after"),
            started=started,
            comparisons=tuple(_believed(comparisons)),
        )

    def rehearse(self, paths: Sequence[Path]) -> dict[tuple[Path, tuple[int, int]], Rehearsal]:
        """Runs every graph at every shape, to find in advance a graph that cannot run, or is too slow."""
        from surgery.onnx.timing.latency import rehearse

        # part of the first session's time and memory is for libraries; with CUDA, most of it
        rehearse(self.reference, next(iter(self.feeds.values())), self.setting)
        done = {
            (path, shape): rehearse(path, feeds, self.setting)
            for shape, feeds in self.feeds.items()
            for path in dict.fromkeys(paths)
        }
        for path, shape in itertools.product(paths[1:], self.feeds):
            check_time(path, shape, done[self.reference, shape], done[path, shape], self.seconds)
        return done

    def compare(
        self,
        path: Path,
        role: Role,
        shape: tuple[int, int],
        rehearsed: Mapping[tuple[Path, tuple[int, int]], Rehearsal],
        start: float,
    ) -> Comparison:
        """Compares one graph with the reference at one shape; the times of blocks count from the clock time `start`."""
        import numpy as np

        from surgery.onnx.timing.latency import measure
        from surgery.onnx.timing.verdict import equivalence_p, follow, noise_floor

        watch = Stopwatch()
        kept: list[Taken] = []

        def epochs() -> Iterator[tuple[tuple[float, ...], tuple[float, ...], float]]:
            a, b = rehearsed[self.reference, shape], rehearsed[path, shape]
            for taken in measure(
                (self.reference, a),
                (path, b),
                self.feeds[shape],
                self.setting,
                seconds=self.seconds,
                seed=self.seed,
                start=start,
            ):
                kept.append(taken)
                if self.progress is not None:
                    self.progress(f"{path} at {shape[0]}×{shape[1]}", taken.share)
                yield taken.epoch.log_ratios, taken.epoch.control, taken.share

        ruling = follow(epochs(), self.margin, seed=self.seed)
        times_a = np.concatenate([taken.times_a for taken in kept])
        times_b = np.concatenate([taken.times_b for taken in kept])
        tokens, latency = self.tokens[shape], float(np.median(times_b))
        return Comparison(
            graph=str(path),
            shape=shape,
            role=role,
            verdict=ruling.verdict,
            reason=_reason(ruling, kept, watch.seconds),
            ratio=math.exp(ruling.effect.mean),
            interval=_ratios(ruling.effect.interval(ruling.level, seed=self.seed)),
            p_equivalent=equivalence_p(ruling.effect, self.margin),
            control_ratio=math.exp(ruling.control.mean),
            control_interval=_ratios(ruling.control.interval(seed=self.seed)),
            noise_floor=noise_floor(ruling.control, seed=self.seed),
            latency_reference=float(np.median(times_a)),
            latency=latency,
            quantiles_reference={str(q): float(np.quantile(times_a, q)) for q in _QUANTILES},
            quantiles={str(q): float(np.quantile(times_b, q)) for q in _QUANTILES},
            tokens_per_second=None if tokens is None else tokens / latency,
            runs_per_block=kept[0].runs_per_block,
            looks=ruling.looks,
            level=ruling.level,
            seconds=watch.seconds,
            device_bytes_reference=rehearsed[self.reference, shape].device_bytes,
            device_bytes=rehearsed[path, shape].device_bytes,
            epochs=tuple(taken.epoch for taken in kept),
        )


def _reason(ruling: Ruling, kept: Sequence[Taken], seconds: float) -> str:
    """The ruling's reason; if it is inconclusive, also what a verdict would take."""
    if ruling.verdict != "inconclusive":
        return ruling.reason
    if ruling.missing is None:
        return f"{ruling.reason}; more time would hardly help: choose another margin, or stop other load on the machine"
    more = ruling.missing / len(kept)
    blocks = sum(len(taken.epoch.log_ratios) for taken in kept)
    return (
        f"{ruling.reason}; about {ruling.missing} more sets of sessions would decide it: {math.ceil(more * blocks)} "
        f"more blocks, --seconds {math.ceil((1 + more) * seconds)} in total"
    )


def _believed(comparisons: Sequence[Comparison]) -> Iterator[Comparison]:
    """The comparisons; a shape gets no verdict if its positive control was not found slower."""
    failed = {each.shape: each for each in comparisons if each.role == "positive control" and each.verdict != "slower"}
    for each in comparisons:
        control = failed.get(each.shape)
        if control is None or each is control:
            yield each
        else:
            reason = f"the positive control was found {control.verdict}, but it must be slower ({control.reason})"
            yield dataclasses.replace(each, verdict="inconclusive", reason=reason)


def _hashes(files: Sequence[TensorRef]) -> Iterator[tuple[str, str]]:
    """The SHA-256 of each file, by path."""
    for file in files:
        with open(file.checkpoint.path, "rb") as stream:
            yield file.checkpoint.path, hashlib.file_digest(stream, "sha256").hexdigest()


def _ratios(interval: tuple[float, float]) -> tuple[float, float]:
    return math.exp(interval[0]), math.exp(interval[1])


def _versions(device: str) -> dict[str, str]:
    import numpy
    import onnx
    import onnxruntime

    built: dict[str, str] = {}
    if device == "cuda":
        from onnxruntime.capi import build_and_package_info

        built = {"cuda, of onnxruntime": str(getattr(build_and_package_info, "cuda_version", "unknown"))}
    return {
        **built,
        "surgery": __version__,
        "onnxruntime": onnxruntime.__version__,
        "onnx": onnx.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }
