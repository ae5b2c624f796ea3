"""What compare leaves behind: every adapter in words and figures, its graphs, and the bench of them.

Plain data, and its JSON can be printed or drawn again. Knows neither adapter files nor clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from surgery.onnx.timing.record import BenchReport, Comparison, read_report
from surgery.report import Report


@dataclass(frozen=True, kw_only=True)
class Becoming:
    """What becomes of some parts of an adapter in a fold.

    Attributes:
        way: "folded", "widened", "half-folded" or "graph".
        reason: why, in a line.
        parts: how many there are.
    """

    way: str
    reason: str
    parts: int


@dataclass(frozen=True, kw_only=True)
class AdapterGraph:
    """The model with an adapter, as one graph.

    Attributes:
        form: "merged", "folded", "widened", "half-folded", "branch" or "constants", or two of these with a + between.
        path: the `.onnx` file.
        sha256: of it.
        same_graph: whether it is the base's byte for byte, so that only weights differ.
        nodes: that the provider runs after its own optimisation.
        added: how many more these are than the base's.
        error: the largest difference from the adapted model in torch, in relation to the largest output.
        tolerance: what that was held against.
    """

    form: str
    path: str
    sha256: str
    same_graph: bool
    nodes: int
    added: int
    error: float
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class ComparedAdapter:
    """An adapter.

    Attributes:
        name: in the table.
        path: of its file or folder.
        method: as the field calls it, such as "LoRA" or "Houlsby"; of several parts with a + between.
        placement: "parallel": it reads what the adapted part reads; "sequential": it reads or scales what that gives;
            "input": tokens before the input's; "in place": tensors replaced; of several parts with a + between.
        non_linearity: f of its bottlenecks, "softmax" of a prefix; "none" where it is linear.
        parameters: how many numbers were trained.
        share: of the base's parameters.
        folds: "yes", "half", "in part" or "no": how much of it goes into the weights.
        becomes: what becomes of its parts, and why.
        tokens: how many more than the input's the model computes with it.
        graphs: first as fold leaves it; then, where that is another graph, with all of it left as nodes.
    """

    name: str
    path: str
    method: str
    placement: str
    non_linearity: str
    parameters: int
    share: float
    folds: str
    becomes: tuple[Becoming, ...]
    tokens: int
    graphs: tuple[AdapterGraph, ...]


@dataclass(frozen=True, kw_only=True)
class CompareReport(Report):
    """What compare found. No tensor of the model is changed, so the ledger is empty; `output` is the folder of graphs,
    if they were kept.

    Attributes:
        model: the base.
        parameters: how many it has.
        graph: the base's `.onnx` file.
        sha256: of it.
        provider: that the nodes were counted for, as ONNX Runtime names it.
        nodes: that it runs of the base's graph.
        adapters: in the order given.
        record: the record's file, if there is one.
        bench: the times, every block; None where timing was left out.
    """

    model: str
    parameters: int
    graph: str
    sha256: str
    provider: str
    nodes: int
    adapters: tuple[ComparedAdapter, ...]
    record: str | None
    bench: BenchReport | None

    def rows(self) -> Iterator[tuple[ComparedAdapter, AdapterGraph, Comparison | None]]:
        """The table: every graph of every adapter, with its time at each shape."""
        found = self.bench.comparisons if self.bench is not None else ()
        for adapter in self.adapters:
            for graph in adapter.graphs:
                yield from ((adapter, graph, each) for each in found if each.graph == graph.path)
                if self.bench is None:
                    yield adapter, graph, None


def read_comparison(path: str | Path) -> CompareReport:
    """A report from what `--record` wrote.

    Raises:
        PathNotFound, CorruptFile: see `read_report`.
    """
    return read_report(path, CompareReport, "compare")
