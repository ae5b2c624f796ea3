"""What a bench leaves behind: every block and all that was known about the machine, as plain data and as JSON.

The JSON document is the report itself, so it can be printed again, drawn, or judged anew by somebody who doubts it;
so is every other report that is kept whole. Knows neither clock nor graph.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from formats.errors import CorruptFile, PathNotFound
from surgery.report import Report

Verdict = Literal["equivalent", "slower", "faster", "inconclusive"]
Role = Literal["candidate", "positive control"]
Kept = TypeVar("Kept", bound=Report)


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
        device_bytes_reference, device_bytes: of the device's memory that one session takes, or of the process's; None
            if unknown.
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
    device_bytes_reference: int | None
    device_bytes: int | None
    epochs: tuple[Epoch, ...]


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """What bench found. No tensor is touched, so the ledger is empty; `output` is the record's file, if there is one.

    Attributes:
        reference: the graph that the others are compared with.
        graphs: those others, the positive control left out.
        provider: the execution provider that really ran, as ONNX Runtime names it.
        provider_options: its options, as ONNX Runtime reports them.
        margin: what was declared: 0.01 means within 1 % of the reference.
        seed: of inputs, order and bootstrap.
        threads: intra-op threads asked for; None leaves it to ONNX Runtime.
        session: threads, spinning, order and optimisation of every session, by ONNX Runtime's names; records of older
            versions lack it.
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
    session: Mapping[str, str] = field(default_factory=dict)


def to_json(report: Report) -> str:
    """The record, which `read_report` reads."""
    return json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False) + "\n"


def read_record(path: str | Path) -> BenchReport:
    """A bench's report from its record. Raises as `read_report`."""
    return read_report(path, BenchReport, "bench")


def read_report(path: str | Path, kind: type[Kept], operation: str) -> Kept:
    """A report from its record.

    Args:
        path: the record.
        kind: the report's type.
        operation: its name on the command line.

    Raises:
        PathNotFound: no file there.
        CorruptFile: it is no record of that operation, or of one that lacks what ours have.
    """
    path = Path(path)
    if not path.is_file():
        raise PathNotFound("no such file", where=path, then="check the path of the record")
    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict) or document.get("operation") != operation:
            raise _NotOurs(f"no document of operation {operation}")
        return cast(Kept, _restored(kind, document, "record"))
    except (_NotOurs, ValueError, RecursionError) as error:  # of which JSON's own and Unicode's errors are
        raise CorruptFile(
            f"not a record of surgery {operation}",
            where=path,
            expected=f"what `surgery {operation} --record FILE.json` or `--json` wrote, by a version that writes the "
            "same",
            found=error,
            then="name such a file, or measure again",
        ) from error


class _NotOurs(Exception):
    """What in a document is not as a record has it."""


def _restored(kind: Any, value: Any, where: str) -> Any:
    """A value of JSON as the type that a field has; `where` names the field."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise _NotOurs(f"{where} is {type(value).__name__}")
        kinds = get_type_hints(kind)
        needed = {
            each.name
            for each in dataclasses.fields(kind)
            if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        }
        if not needed <= value.keys() <= kinds.keys():
            odd = (needed - value.keys()) | (value.keys() - kinds.keys())
            raise _NotOurs(f"{where} has other fields: {', '.join(sorted(odd))}")
        return kind(**{name: _restored(kinds[name], each, f"{where}.{name}") for name, each in value.items()})  # type: ignore[operator]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list):
        parts = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(parts) == len(value):
            pairs = zip(parts, value, strict=True)
            return tuple(_restored(part, each, f"{where}[{i}]") for i, (part, each) in enumerate(pairs))
    elif origin is Mapping and isinstance(value, dict):
        return {name: _restored(inner[1], each, f"{where}.{name}") for name, each in value.items()}
    elif origin is Literal and value in inner:
        return value
    elif origin is UnionType:  # of something and None
        return None if value is None else _restored(inner[0], value, where)
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif type(value) is kind:
        return value
    raise _NotOurs(f"{where} is {json.dumps(value)[:40]}")
