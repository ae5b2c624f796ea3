"""What a bench leaves behind: every block and all that was known about the machine, as plain data and as JSON.

The JSON document is the report itself, so it can be printed again, drawn, or judged anew by somebody who doubts it.
Knows neither clock nor graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from surgery.report import Report

Verdict = Literal["equivalent", "slower", "faster", "inconclusive"]
Role = Literal["candidate", "positive control"]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The blocks of one set of sessions.

    Attributes:
        log_ratios: log(time of the graph / time of the reference) of each block, in the order measured.
        control: log(A' / A) of each block of two sessions of the reference.
        at: when each block of `log_ratios` began, in seconds since the bench began.
        control_at: the same for `control`.
        seconds: the reference's median run in each block of `log_ratios`, which shows how the machine drifts.
    """

    log_ratios: tuple[float, ...]
    control: tuple[float, ...]
    at: tuple[float, ...]
    control_at: tuple[float, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One graph against the reference at one shape. Ratios are time of the graph / time of the reference.

    Attributes:
        graph: the `.onnx` file.
        shape: batch and sequence.
        role: whether it is judged, or there to show that a slower graph would be found.
        verdict: equivalent, slower, faster or inconclusive, always as against the margin.
        reason: why, in a sentence.
        ratio: the mean over epochs of the median block's ratio.
        interval: its interval, at the level of the look that decided: never less than 90 %.
        p_equivalent: of the two one-sided tests at the margin; small speaks for equivalence.
        control_ratio, control_interval: the same for two sessions of the reference.
        noise_floor: the margin, as a ratio less 1, within which two sessions of the reference can be told to be equal.
        latency_reference, latency: seconds of one run, the median.
        quantiles_reference, quantiles: seconds of one run by quantile: "0.05", "0.25", "0.75", "0.95", "0.99".
        tokens_per_second: of the graph, at the median; None where it takes no tokens.
        runs_per_block: of either session.
        looks: how often the verdict was tried.
        level: error allowed to each claim at the last look.
        seconds: how long it took, loading included.
        device_bytes: what three sessions take of the device's memory, two of them the reference's; None if unknown.
        epochs: every set of sessions.
    """

    graph: str
    shape: tuple[int, int]
    role: Role
    verdict: Verdict
    reason: str
    ratio: float
    interval: tuple[float, float]
    p_equivalent: float
    control_ratio: float
    control_interval: tuple[float, float]
    noise_floor: float
    latency_reference: float
    latency: float
    quantiles_reference: Mapping[str, float]
    quantiles: Mapping[str, float]
    tokens_per_second: float | None
    runs_per_block: int
    looks: int
    level: float
    seconds: float
    device_bytes: int | None
    epochs: tuple[Epoch, ...]


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """What bench found. No tensor is touched, so the ledger is empty; `output` is the record's file, if one was asked for.

    Attributes:
        reference: the graph that the others are compared with.
        graphs: those others, the positive control left out.
        provider: the execution provider that really ran, as ONNX Runtime names it.
        provider_options: its options, as ONNX Runtime reports them.
        margin: what was declared: 0.01 means within 1 % of the reference.
        seed: of inputs, order and bootstrap.
        threads: intra-op threads asked for; None leaves it to ONNX Runtime.
        cuda_graph: whether runs were captured into a CUDA graph and replayed.
        sha256: of each file read.
        same_graph: for each other graph, whether its `.onnx` is the reference's byte for byte, so that only weights
            differ.
        assigned: for each graph, how many nodes each provider got; empty where this ONNX Runtime does not tell.
        versions: of everything that computes.
        machine: processor, cores, system, driver; clocks, temperature and load before and after, where readable.
        started: when, in UTC, by ISO 8601.
        comparisons: every graph at every shape.
    """

    reference: str
    graphs: tuple[str, ...]
    provider: str
    provider_options: Mapping[str, str]
    margin: float
    seed: int
    threads: int | None
    cuda_graph: bool
    sha256: Mapping[str, str]
    same_graph: Mapping[str, bool]
    assigned: Mapping[str, Mapping[str, int]]
    versions: Mapping[str, str]
    machine: Mapping[str, str]
    started: str
    comparisons: tuple[Comparison, ...]
