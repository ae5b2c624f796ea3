"""compare: what each of several adapters costs one model: parameters, nodes and time, and whether it folds.

The base is exported once. What goes into the weights whole is put under the base's graph, and checked against torch
there; what stays becomes nodes, by export-onnx. Then bench times all against the base. Knows no mathematics.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formats.checkpoint import Checkpoint
from formats.errors import OutputExists
from formats.paths import open_checkpoint
from surgery.errors import Unsupported
from surgery.onnx.timing.compared import AdapterGraph, ComparedAdapter, CompareReport
from surgery.operations.export.export_onnx import ExportReport, export_onnx
from surgery.operations.fold.fold import FoldReport, fold
from surgery.operations.latency.bench import bench, check_settings, check_time
from surgery.operations.latency.compare_plan import BASE, NamedAdapter, Planned, concerning, named, plan_adapter
from surgery.report import Stopwatch, peak_rss
from surgery.report_files import kept_record

if TYPE_CHECKING:
    from surgery.onnx.run.session import Setting

_FILE, _BRANCH = "model.onnx", "branch"
Progress = Callable[[str, float], None]


def compare(
    model: str | Path,
    adapters: Sequence[NamedAdapter],
    *,
    out: str | Path | None = None,
    branches: bool = True,
    shapes: Sequence[tuple[int, int]] = ((1, 128),),
    provider: str = "cpu",
    margin: float = 0.01,
    seconds: float = 60.0,
    threads: int | None = None,
    seed: int = 0,
    record: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> CompareReport:
    """Makes graphs of a model with each of several adapters, and compares them with the model's own.

    Args:
        model: a folder that transformers loads, of a model that is run in one pass.
        adapters: whatever fold takes; each a path, or a name and a path.
        out: keep the graphs in this folder, which must be new or empty.
        branches: also make the graph with all of an adapter left as nodes, where fold makes another of it.
        shapes, provider, margin, threads, seed: as for bench.
        seconds: as for bench, for each graph and shape; 0 leaves timing out.
        record: a JSON file to write the report to.
        force: replace what stands at `record`.
        progress: called with what is made or timed and the share of it that is done.

    Raises:
        NothingToDo: no adapter.
        Unsupported: two adapters of one name, a model of several graphs, settings that make no sense, an adapter or a
            graph that cannot be put to use, and why.
        ProviderUnavailable: the provider is not there, or does not take a graph.
        OutputExists: something stands at `out` or `record`.
        ReportedError: each adapter, as fold; exports and times, as export-onnx and bench. All but the clock's own
            surprises come before anything is timed.
    """
    watch = Stopwatch("torch")
    paths = named(adapters)
    check_settings(shapes, margin, seconds or 1.0, threads, seed)
    source = Path(model)

    from surgery.onnx.run.session import Setting, provider_name

    running = provider_name(provider)
    with kept_record(record, (source, *paths.values()), force) as keep, open_checkpoint(source) as base:
        planned = [plan_adapter(source, name, path, base) for name, path in paths.items()]
        _check_model(source)
        size = sum(spec.size for spec in base.specs.values() if spec.dtype.is_float)
        with _workplace(out) as work:
            making = _Making(source, base, work, running, shapes[0], branches, len(planned), progress)
            own = making.base_graph()
            _check_time(Path(own.path), shapes if seconds else (), Setting(running, threads, False), seconds)
            compared = making.others(own, planned, size)
            graphs = [graph.path for each in compared for graph in each.graphs]
            timed = None
            if seconds:
                timed = bench(
                    own.path,
                    *graphs,
                    shapes=shapes,
                    provider=provider,
                    margin=margin,
                    seconds=seconds,
                    threads=threads,
                    seed=seed,
                    progress=progress,
                )
        report = CompareReport(
            operation="compare",
            output=None if out is None else str(out),
            seconds=watch.seconds,
            peak_rss_bytes=peak_rss(),
            ledger={},
            notes=tuple(note for each in planned for note in _notes(each, branches)),
            model=str(source),
            parameters=size,
            graph=own.path,
            sha256=own.sha256,
            provider=running,
            nodes=own.nodes,
            adapters=compared,
            record=None if record is None else str(record),
            bench=timed,
        )
        keep(report)
    return report


def _notes(adapter: Planned, branches: bool) -> Iterator[str]:
    if adapter.tokens:
        yield (
            f"{adapter.name}: the model computes {adapter.tokens} tokens more than the input has, in every layer; "
            "that is in its ratio"
        )
    yield from adapter.notes if branches else ()


def _check_model(source: Path) -> None:
    """Refuses a model that is not one graph, before any is made."""
    from surgery.onnx.trace.architecture import read_architecture

    programs = read_architecture(source).kind.programs
    if len(programs) > 1:
        raise Unsupported(
            "compare times one graph against another, and this model is several",
            where=source,
            found=", ".join(f"{program.prefix}{_FILE}" for program in programs),
            then="export them with and without the adapter, and bench each: surgery export-onnx, surgery bench",
        )


def _check_time(graph: Path, shapes: Sequence[tuple[int, int]], setting: Setting, seconds: float) -> None:
    """Refuses a time that is too short even for the base against itself, before the other graphs are made."""
    from surgery.onnx.files.graph_file import load_graph
    from surgery.onnx.run.feeds import make_feeds
    from surgery.onnx.timing.latency import rehearse

    for shape in shapes:
        seen = rehearse(graph, make_feeds(load_graph(graph), graph, shape, 0), setting)
        check_time(graph, shape, seen, seen, seconds)


@contextlib.contextmanager
def _workplace(out: str | Path | None) -> Iterator[Path]:
    """A folder for the graphs: of the user's, emptied again if anything fails, or a temporary one."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="surgery-compare-") as temporary:
            yield Path(temporary)
        return
    folder = Path(out)
    free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not free:
        raise OutputExists("the graphs need a folder of their own", where=folder, then="name a new one with -o")
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        for made in folder.iterdir():
            shutil.rmtree(made)
        if new:
            folder.rmdir()
        raise


@dataclass(frozen=True)
class _Making:
    """Makes the graphs.

    Attributes:
        model: the base's folder.
        base: its tensors.
        work: where the graphs go.
        provider, shape: what nodes are counted for.
        branches: whether to leave adapters whole in a graph too.
        count: of the adapters.
        progress: told of each adapter, if anybody is to be.
    """

    model: Path
    base: Checkpoint
    work: Path
    provider: str
    shape: tuple[int, int]
    branches: bool
    count: int
    progress: Progress | None

    def base_graph(self) -> AdapterGraph:
        """The base's."""
        self._tell(BASE, 0)
        return self._described(export_onnx(self.model, self.work / BASE / _FILE), BASE, None)

    def others(self, own: AdapterGraph, planned: Sequence[Planned], size: int) -> tuple[ComparedAdapter, ...]:
        """Every adapter with its graphs; `own` is the base's, and `size` its parameters."""
        compared = []
        for number, adapter in enumerate(planned):
            self._tell(adapter.name, number + 1)
            with concerning(adapter.name, adapter.path):
                graphs = tuple(self._graphs(adapter, own))
            compared.append(
                ComparedAdapter(
                    name=adapter.name,
                    path=str(adapter.path),
                    method=adapter.method,
                    placement=adapter.placement,
                    non_linearity=adapter.non_linearity,
                    parameters=adapter.parameters,
                    share=adapter.parameters / size,
                    folds=adapter.folds,
                    becomes=adapter.becomes,
                    tokens=adapter.tokens,
                    graphs=graphs,
                )
            )
        return tuple(compared)

    def _tell(self, name: str, done: int) -> None:
        if self.progress is not None:
            self.progress(f"making graphs: {name}", done / (1 + self.count))

    def _graphs(self, adapter: Planned, own: AdapterGraph) -> Iterator[AdapterGraph]:
        """As fold leaves it, and as a branch."""
        place = self.work / adapter.name
        target = place / adapter.form.replace(" ", "") / _FILE
        if adapter.changes:
            with tempfile.TemporaryDirectory(prefix="surgery-compare-") as temporary:
                folded = Path(temporary) / "model"
                report = fold(self.model, adapter.path, folded)
                how: dict[str, Any] = {"graph": own.path, "verify": True} if self._fits(report, folded) else {}
                yield self._described(export_onnx(folded, target, **how), adapter.form, own)
        else:
            yield self._described(export_onnx(self.model, target, adapters=[adapter.path]), adapter.form, own)
        if self.branches and adapter.branches:
            target = place / _BRANCH / _FILE
            yield self._described(
                export_onnx(self.model, target, adapters=[adapter.path], adapters_as=_BRANCH), _BRANCH, own
            )

    def _fits(self, report: FoldReport, folded: Path) -> bool:
        """Whether a folded model goes under the base's graph."""
        with open_checkpoint(folded) as checkpoint:
            return report.grafts is None and not report.settings and checkpoint.specs == self.base.specs

    def _described(self, report: ExportReport, form: str, own: AdapterGraph | None) -> AdapterGraph:
        """A graph with what the provider makes of it. Raises ProviderUnavailable or Unsupported where it does not."""
        from surgery.onnx.run.runtime import optimise

        (graph,) = report.graphs
        made = optimise(Path(graph.path), self.provider, self.shape)
        if made.refusal:
            raise Unsupported(
                "ONNX Runtime does not run this graph at this shape",
                where=graph.path,
                found=f"{self.shape[0]}×{self.shape[1]}: {made.refusal}",
                then="choose a --shape that the model takes with every adapter",
            )
        assert report.max_rel_error is not None  # all are compared with torch
        assert report.tolerance is not None
        found, limit = report.max_rel_error, report.tolerance
        if report.adapted_rel_error is not None and report.adapted_tolerance is not None:
            found, limit = report.adapted_rel_error, report.adapted_tolerance
        return AdapterGraph(
            form=form,
            path=graph.path,
            sha256=graph.sha256,
            same_graph=own is None or graph.sha256 == own.sha256,
            nodes=made.nodes,
            added=0 if own is None else made.nodes - own.nodes,
            error=found,
            tolerance=limit,
        )
