"""compare: measures what each of several adapters costs one model: parameters, nodes and time, and whether it folds.

The base is exported once. An adapter that folds into the weights entirely uses the base's graph, and is checked against
torch there; the other parts become nodes, by export-onnx. Then bench times all graphs against the base's. This module
contains no mathematics.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from formats.checkpoint import Checkpoint
from formats.errors import OutputExists
from formats.open_files import OpenFiles
from formats.spec import DType, TensorRef, TensorSpec
from formats.staging import Staging
from surgery.errors import Unsupported
from surgery.model.base_model import BaseModel
from surgery.onnx.timing.compared import AdapterGraph, ComparedAdapter, CompareReport
from surgery.operations.export.export_onnx import ExportReport, export_job, in_graph
from surgery.operations.export.plan import ExportPlan, exportable, new_graphs, onto_graphs
from surgery.operations.fold.fold import fold_job
from surgery.operations.latency.bench import bench, check_settings, check_time
from surgery.operations.latency.compare_plan import BASE, NamedAdapter, Planned, concerning, named, plan_adapter
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Job, header, runs
from surgery.pipeline.plan import Elsewhere, Plan, Step
from surgery.report import Stopwatch
from surgery.report_files import RecordFile

if TYPE_CHECKING:
    from surgery.onnx.run.session import Setting
    from surgery.onnx.trace.program import Exportable

_FILE, _BRANCH = "model.onnx", "branch"
Progress = Callable[[str, float], None]


def prepare_compare(
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
) -> Job[CompareReport]:
    """Prepares a job that makes a graph of a model with each of several adapters, and compares them with the model's.

    Args:
        model: a folder that transformers loads, of a model that is run in one pass.
        adapters: adapters that fold accepts; each a path, or a name and a path.
        out: keep the graphs in this folder, which must be new or empty.
        branches: also make the graph with the whole adapter as nodes, if fold makes a different one.
        shapes, provider, margin, threads, seed: as for bench.
        seconds: as for bench, for each graph and shape; 0 skips timing.
        record: a JSON file to write the report to.
        force: overwrite an existing `record`.
        progress: called with the graph that is made or timed, and the completed share.

    Raises:
        NothingToDo: no adapter was given.
        Unsupported: two adapters have the same name, the model has several graphs, settings are invalid, or an adapter
            or a graph cannot be used; the message says why.
        ProviderUnavailable: the provider is not installed, or does not take a graph.
        OutputExists: `out` or `record` exists.
        ReportedError: each adapter, as fold; exports and times, as export-onnx and bench. All errors come before
            anything is timed, except errors of the timing itself.
    """
    watch, files = Stopwatch("torch"), OpenFiles()
    paths = named(adapters)
    check_settings(shapes, margin, seconds or 1.0, threads, seed)
    source = Path(model)

    from surgery.onnx.run.session import Setting, provider_name

    running = provider_name(provider)
    inputs = (source, *paths.values())
    kept = RecordFile.at(record, inputs, force)
    folder = None if out is None else Path(out)
    _check_folder(folder, inputs)
    base = BaseModel.open(source, files)
    planned = [plan_adapter(base, name, path) for name, path in paths.items()]
    traced = _one_graph(base)
    own_plan = new_graphs(traced, base, None, in_graph(traced, base))
    making = _Making(base, traced, running, shapes[0], branches, len(planned), progress)
    steps = (*_exports(base, planned, branches, folder), *_timings(planned, branches, shapes if seconds else ()))
    plan = Plan("compare", steps, notes=tuple(note for each in planned for note in _notes(each, branches)))

    def work(resources: Resources) -> CompareReport:
        with _workplace(folder) as place:
            own = making.base_graph(own_plan, place)
            _check_time(Path(own.path), shapes if seconds else (), Setting(running, threads, False), seconds)
            compared = making.others(own, planned, place)
            timed = None
            if seconds:
                timed = bench(
                    own.path,
                    *(graph.path for each in compared for graph in each.graphs),
                    shapes=shapes,
                    provider=provider,
                    margin=margin,
                    seconds=seconds,
                    threads=threads,
                    seed=seed,
                    progress=progress,
                )
        report = CompareReport(
            **{**header(plan, watch, folder), "ledger": {}},
            model=str(source),
            parameters=_parameters(base),
            graph=own.path,
            sha256=own.sha256,
            provider=running,
            nodes=own.nodes,
            adapters=compared,
            record=None if kept.path is None else str(kept.path),
            bench=timed,
        )
        kept.write(report)
        return report

    outputs = (*(() if folder is None else (folder,)), *kept.outputs)
    return Job(plan, inputs, outputs, files, work, Resources())


compare = runs(prepare_compare)


def _parameters(base: BaseModel) -> int:
    return sum(spec.size for spec in base.specs.values() if spec.dtype.is_float)


def _exports(base: BaseModel, planned: Sequence[Planned], branches: bool, folder: Path | None) -> Iterator[Step]:
    """The graphs to make, each with weights of the base's size."""
    whole = _whole(base.checkpoint)
    for name, form, read in ((BASE, BASE, ()), *_graphs(planned, branches)):
        output = TensorSpec(f"{name}, {form}", DType.U8, whole.spec.shape)
        yield Step(output.name, (whole, *read), () if folder is None else (output,), Elsewhere("export"))


def _timings(planned: Sequence[Planned], branches: bool, shapes: Sequence[tuple[int, int]]) -> Iterator[Step]:
    """The graphs that bench times; reads the written files."""
    for batch, sequence in shapes:
        for name, form, _ in _graphs(planned, branches):
            yield Step(f"{name}, {form} at {batch}×{sequence}", (), (), Elsewhere("time"))


def _graphs(planned: Sequence[Planned], branches: bool) -> Iterator[tuple[str, str, tuple[TensorRef, ...]]]:
    """The adapters' graphs: name, form, and the inputs besides the base."""
    for each in planned:
        for form in (each.form, *((_BRANCH,) if branches and each.branches else ())):
            yield each.name, form, (_whole(each.file.checkpoint),)


def _whole(checkpoint: Checkpoint) -> TensorRef:
    """A checkpoint's payload as one tensor, for a plan."""
    size = sum(spec.nbytes for spec in checkpoint.specs.values())
    return TensorRef(checkpoint.ref, TensorSpec(Path(checkpoint.ref.path).name, DType.U8, (size,)))


def _notes(adapter: Planned, branches: bool) -> Iterator[str]:
    if adapter.tokens:
        yield (
            f"{adapter.name}: the model computes {adapter.tokens} tokens more than the input has, in every layer; "
            "its ratio includes that"
        )
    yield from adapter.notes if branches else ()


def _one_graph(base: BaseModel) -> Exportable:
    """The model in the form that is traced. Raises Unsupported if it has several graphs."""
    traced = exportable(base, False, None, ())
    programs = traced.kind.programs
    if len(programs) > 1:
        raise Unsupported(
            "compare needs a model with one graph, and this model is several",
            where=base.path,
            found=", ".join(f"{program.prefix}{_FILE}" for program in programs),
            then="export them with and without the adapter, and bench each: surgery export-onnx, surgery bench",
        )
    return traced


def _check_time(graph: Path, shapes: Sequence[tuple[int, int]], setting: Setting, seconds: float) -> None:
    """Refuses a time too short even to compare the base with itself, before the other graphs are made."""
    from surgery.onnx.files.graph_file import load_graph
    from surgery.onnx.run.feeds import make_feeds
    from surgery.onnx.timing.latency import rehearse

    for shape in shapes:
        seen = rehearse(graph, make_feeds(load_graph(graph), graph, shape, 0), setting)
        check_time(graph, shape, seen, seen, seconds)


def _check_folder(folder: Path | None, inputs: Sequence[Path]) -> None:
    """Refuses a folder in which graphs cannot be kept. Raises OutputExists, PathNotFound or WriteFailed."""
    if folder is None:
        return
    free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not free:
        raise OutputExists("the graphs need a folder of their own", where=folder, then="name a new one with -o")
    Staging(folder, folder=True, inputs=inputs).check_room(0)


@contextlib.contextmanager
def _workplace(folder: Path | None) -> Iterator[Path]:
    """A folder for the graphs: the user's, emptied again if anything fails, or a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="surgery-compare-") as temporary:
            yield Path(temporary)
        return
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
        base: the model.
        traced: the model in the form that is traced.
        provider, shape: the provider and shape for which nodes are counted.
        branches: whether to also make graphs with whole adapters as nodes.
        count: number of adapters.
        progress: called for each adapter, if given.
    """

    base: BaseModel
    traced: Exportable
    provider: str
    shape: tuple[int, int]
    branches: bool
    count: int
    progress: Progress | None

    def base_graph(self, planned: ExportPlan, place: Path) -> AdapterGraph:
        """The base's graph, in the folder at `place`."""
        self._tell(BASE, 0)
        return self._described(self._export(planned, self.base, self.traced, place / BASE / _FILE), BASE, None)

    def others(self, own: AdapterGraph, planned: Sequence[Planned], place: Path) -> tuple[ComparedAdapter, ...]:
        """Every adapter with its graphs; `own` is the base's."""
        compared, size = [], _parameters(self.base)
        for number, adapter in enumerate(planned):
            self._tell(adapter.name, number + 1)
            with concerning(adapter.name, adapter.file.path):
                graphs = tuple(self._graphs(adapter, own, place / adapter.name))
            compared.append(
                ComparedAdapter(
                    name=adapter.name,
                    path=str(adapter.file.path),
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

    def _graphs(self, adapter: Planned, own: AdapterGraph, place: Path) -> Iterator[AdapterGraph]:
        """The adapter's graphs: as fold makes it, and as a branch."""
        target = place / adapter.form.replace(" ", "") / _FILE
        if adapter.changes:
            with tempfile.TemporaryDirectory(prefix="surgery-compare-") as temporary, OpenFiles() as files:
                folded = Path(temporary) / "model"
                report = fold_job(self.base, adapter.file, folded, watch=Stopwatch()).work(Resources())
                model = BaseModel.open(folded, files)
                traced = exportable(model, False, None, ())
                if report.grafts is None and not report.settings and model.specs == self.base.specs:
                    planned = onto_graphs(Path(own.path), model, convert=False)
                else:
                    planned = new_graphs(traced, model, None, in_graph(traced, model))
                yield self._described(self._export(planned, model, traced, target), adapter.form, own)
        else:
            yield self._described(self._left(adapter, None, target), adapter.form, own)
        if self.branches and adapter.branches:
            yield self._described(self._left(adapter, _BRANCH, place / _BRANCH / _FILE), _BRANCH, own)

    def _left(self, adapter: Planned, way: str | None, target: Path) -> ExportReport:
        """The base's graph with all of an adapter in it."""
        kept = in_graph(self.traced, self.base, [adapter.file], way)
        return self._export(new_graphs(self.traced, self.base, None, kept), self.base, self.traced, target)

    def _export(self, planned: ExportPlan, model: BaseModel, traced: Exportable, target: Path) -> ExportReport:
        job = export_job(planned, model, target, against=traced, watch=Stopwatch())
        return job.work(Resources())  # the model's files stay open: others are made of it too

    def _described(self, report: ExportReport, form: str, own: AdapterGraph | None) -> AdapterGraph:
        """A graph with the provider's node counts. Raises ProviderUnavailable or Unsupported if it does not run."""
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
