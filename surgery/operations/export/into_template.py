"""reweigh: puts merged weights into an ONNX graph that another tool exported, given the base that it was exported from.

It finds how each weight of the graph is made of the base's tensors, applies the same recipes to the merged tensors, one
at a time, and writes graph and weights. The graph does not change; if its weights are in separate files, the graph file
is the same byte for byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from formats.adapter import NOTHING_TOLD, Told
from formats.errors import CorruptFile
from formats.open_files import OpenFiles
from formats.spec import TensorSpec
from formats.staging import Staging, copy_range, disk_errors, write_at
from surgery.errors import NothingToDo, TemplateMismatch, Unsupported
from surgery.exact.survival import Surviving
from surgery.hashes import payload_hash
from surgery.model.base_model import BaseModel
from surgery.onnx.files.graph_file import External, all_tensors, external, load_graph, payload
from surgery.onnx.foreign.fitting import Fitting, MergedChange, Tensors, fit
from surgery.onnx.foreign.slots import Slot, find_slots
from surgery.operations.merge.adapters import AdapterPaths, adapter_files, adapter_paths, open_for_merge
from surgery.operations.merge.plan import plan_merge
from surgery.operations.merge.view import MergedView
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Job, header, runs
from surgery.pipeline.plan import Elsewhere, Fate, Plan, Step, no_fates
from surgery.report import Report, Stopwatch

if TYPE_CHECKING:
    import onnx

_ALIGNMENT = 64  # bytes; used for weights that get new offsets


@dataclass(frozen=True, kw_only=True)
class ReweighReport(Report):
    """The result of replacing a graph's weights. The ledger counts the base's tensors.

    Attributes:
        template: the graph whose weights were replaced.
        base: the checkpoint that it was exported from.
        recipes: how each weight of the graph is made of the checkpoint's tensors.
        changed: names of the weights that differ from the template's.
        constants: float tensors of the graph that are not weights; they stay unchanged.
        graph_sha256: SHA-256 of the `.onnx` file.
        same_graph: whether the `.onnx` file equals the template's byte for byte; true if all changed weights are in
            separate files.
        surviving: if adapters were merged, how much of each delta is stored; by the base's names.
    """

    template: str
    base: str
    recipes: Mapping[str, str]
    changed: tuple[str, ...]
    constants: tuple[str, ...]
    graph_sha256: str
    same_graph: bool
    surviving: Mapping[str, Surviving] = field(default_factory=dict)


def prepare_reweigh(
    template: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    adapters: AdapterPaths = (),
    told: Told = NOTHING_TOLD,
    force: bool = False,
) -> Job[ReweighReport]:
    """Prepares a job that writes TEMPLATE with the weights of MODEL, adapters merged into them.

    No merged checkpoint is written.

    Args:
        template: a `.onnx` file, exported from `base` by any exporter.
        model: a checkpoint with the base's tensors.
        out: the `.onnx` file to write.
        base: the checkpoint that the template was exported from; by default `model`.
        adapters: paths, or (path, weight), to merge into the model.
        told: what the adapters' files do not say, as for `merge`.
        force: overwrite an existing output.

    Raises:
        TemplateMismatch: the weights are not the base's, or are ambiguous; or a change has no place in the graph.
        Quantised: the graph has quantised weights.
        UnsafeFile: weights are outside the template's folder.
        NothingToDo: the model's weights equal the template's.
        FormatError, SurgeryError: see their trees; for adapters as `merge`.
    """
    watch, files = Stopwatch(loading="torch"), OpenFiles()
    origin, named = Path(model if base is None else base), adapter_paths(adapters)
    work = _Work(Path(template), Path(out), origin, (Path(model), *(path for path, _ in named)), force)
    if work.out.suffix != ".onnx":
        raise Unsupported(
            "the output must be a .onnx file",
            where=work.out,
            expected="a name that ends in .onnx",
            then=f"pass -o {work.out / 'model.onnx'}",
        )
    before, given = files.checkpoint(origin), BaseModel.open(model, files)
    after, merged, notes = given.checkpoint, None, given.checkpoint.notes
    reading = [Step(name, (before.tensor(name),), (), Elsewhere("find")) for name in before.specs]
    reading += [Step(name, (after.tensor(name),), (), Elsewhere("read")) for name in after.specs if after is not before]
    if named:
        merging, _ = plan_merge(given, *open_for_merge(given, adapter_files(named, files), told=told))
        merged, notes = MergedView(merging, files), merging.notes
        reading += [replace(step, outputs=(), op=Elsewhere("merge")) for step in merging.steps]
    if after is not before:
        notes = (*before.notes, *notes)
    graph = load_graph(work.template, files)
    places = [external(tensor, work.template) for tensor in all_tensors(graph)]
    outside = {index: place for index, place in enumerate(places) if place is not None}
    held_in = {work.template.parent / place.location for place in outside.values()}
    work = replace(work, inputs=(*work.inputs, *sorted(held_in)))
    layout = _layout(outside, work)
    _check_outputs(layout, work)
    slots = find_slots(graph, work.template)
    filling = [
        Step(each.name, (), (TensorSpec(each.name, each.dtype, each.shape),), Elsewhere("fill")) for each in slots
    ]
    plan = Plan("export-onnx", (*reading, *filling), notes=tuple(notes))

    def run(resources: Resources) -> ReweighReport:
        fitting = fit(slots, work.template, before, work.base)
        change = MergedChange(fitting, before, merged or after, work.template)
        with _staged(layout, work) as written:
            changed = _fill(graph, fitting, change, layout, written, work)
            change.refuse_lost()
            if not changed:
                raise NothingToDo(
                    "the graph already holds exactly these weights",
                    where=work.template,
                    then="check the model and the adapters, or use the graph unchanged",
                )
            content = _graph_bytes(graph, changed, layout, work)
            with disk_errors(work.out):
                write_at(written[work.out.name], content, 0)
        recipes = fitting.recipes
        return ReweighReport(
            **{**header(plan, watch, work.out), "ledger": _fates(fitting, change, before)},
            template=str(work.template),
            base=str(work.base),
            recipes={slot.name: str(recipes[slot.index]) for slot in slots if slot.index in recipes},
            changed=tuple(slot.name for slot in changed),
            constants=tuple(slot.name for slot in slots if slot.index not in recipes),
            graph_sha256=hashlib.sha256(content).hexdigest(),
            same_graph=content == work.template.read_bytes(),
            surviving=dict(merged.surviving) if merged else {},
        )

    inputs = (work.template, *dict.fromkeys((origin, Path(model))), *(path for path, _ in named))
    outputs = (work.out, *(work.out.parent / name for name in layout.sizes))
    return Job(plan, inputs, outputs, files, run, Resources())


reweigh = runs(prepare_reweigh)


@dataclass(frozen=True)
class _Work:
    """The paths of one run; inputs other than template and base are only protected from being overwritten."""

    template: Path
    out: Path
    base: Path
    inputs: tuple[Path, ...]
    force: bool


@dataclass(frozen=True)
class _Layout:
    """Where tensors outside the graph go: the file next to the output and the first byte, by the tensor's index.

    `kept` is true if these are the template's own places.
    """

    places: Mapping[int, External]
    sizes: Mapping[str, int]
    kept: bool


def _layout(outside: Mapping[int, External], work: _Work) -> _Layout:
    """The template's own file names and offsets if these are free; otherwise one file named after the output."""
    names = {place.location for place in outside.values()}
    elsewhere = work.out.parent.resolve() != work.template.parent.resolve()
    if elsewhere and all(Path(name).name == name and name != work.out.name for name in names):
        sizes = {name: (work.template.parent / name).stat().st_size for name in names}
        return _Layout(outside, sizes, True)
    beside, end = f"{work.out.name}.data", 0
    places: dict[int, External] = {}
    shared: dict[External, External] = {}  # tensors may share bytes
    for key, place in outside.items():
        if place not in shared:
            shared[place] = External(beside, end, place.length)
            end += -(-place.length // _ALIGNMENT) * _ALIGNMENT
        places[key] = shared[place]
    return _Layout(places, {beside: end} if places else {}, False)


def _guarded(work: _Work) -> list[Path]:
    return [work.template, work.base, *work.inputs]


def _check_outputs(layout: _Layout, work: _Work) -> None:
    """Refuses outputs that could not be written, before any long work. Raises OutputExists or WriteFailed."""
    size, folder = sum(layout.sizes.values()), work.out.parent
    for name in (work.out.name, *layout.sizes):
        Staging(folder / name, folder=False, inputs=_guarded(work), force=work.force).check_room(size)
    if not folder.exists():
        Staging(folder, folder=True, inputs=_guarded(work), force=work.force)


@contextlib.contextmanager
def _staged(layout: _Layout, work: _Work) -> Iterator[Mapping[str, int]]:
    """The output's files, not yet named: name → descriptor. On a normal exit they get their names. A new folder appears
    as a whole; otherwise an old graph is removed first, then the weights appear, then the graph."""
    folder = work.out.parent
    if not folder.exists():
        with Staging(folder, folder=True, inputs=_guarded(work), force=work.force) as whole:
            sizes = {work.out.name: 0, **layout.sizes}
            yield {name: whole.create(name, size) for name, size in sizes.items()}
        return
    with contextlib.ExitStack() as stack:  # unwinds in reverse: the graph last of all
        files = {}
        for name, size in ((work.out.name, 0), *layout.sizes.items()):
            staging = stack.enter_context(Staging(folder / name, folder=False, inputs=_guarded(work), force=work.force))
            files[name] = staging.create("", size)
        yield files
        with disk_errors(work.out):
            for descriptor in files.values():
                os.fsync(descriptor)  # everything that can fail comes before the old graph is removed
            if work.force:
                work.out.unlink(missing_ok=True)


def _fill(
    model: onnx.ModelProto,
    fitting: Fitting,
    change: MergedChange,
    layout: _Layout,
    files: Mapping[str, int],
    work: _Work,
) -> list[Slot]:
    """Writes every tensor to its file or into the graph; returns the weights that changed."""
    slots = {slot.index: slot for slot in fitting.slots if slot.index in fitting.recipes}
    changed = []
    written: dict[External, str] = {}
    for index, tensor in enumerate(all_tensors(model)):
        slot, place = slots.get(index), layout.places.get(index)
        if slot is None and place is None:
            continue
        held = data = payload(tensor, work.template)
        if slot is not None:
            data = change.payload(slot, held)
            if not np.array_equal(data, held):
                changed.append(slot)
        if place is not None:
            digest = payload_hash(data)
            if written.setdefault(place, digest) != digest:
                raise TemplateMismatch(
                    "two weights of the graph share the same bytes, and the merge makes them differ",
                    where=f"{work.template}: {tensor.name}",
                    then="export the merged model: surgery export-onnx MERGED -o OUT.onnx",
                )
            with disk_errors(work.out.parent / place.location):
                write_at(files[place.location], data.data, place.offset)
        elif slot is not None and data is not held:
            _put(tensor, data.tobytes())
    if layout.kept:
        _copy_gaps(layout, files, work)
    return changed


def _copy_gaps(layout: _Layout, files: Mapping[str, int], work: _Work) -> None:
    """Copies the bytes between the tensors: padding, or the header of a safetensors file."""
    for name, size in layout.sizes.items():
        places = sorted({(each.offset, each.length) for each in layout.places.values() if each.location == name})
        end = 0
        with (work.template.parent / name).open("rb") as stream, disk_errors(work.out.parent / name):
            for begin, length in (*places, (size, 0)):
                if begin < end:
                    raise CorruptFile(
                        "two tensors of the graph overlap",
                        where=work.template.parent / name,
                        then="export or copy the template again",
                    )
                copy_range(stream.fileno(), end, files[name], end, begin - end)
                end = begin + length


def _put(tensor: onnx.TensorProto, data: bytes) -> None:
    """Sets a tensor's bytes in the graph, whichever field held them."""
    for name in ("float_data", "int32_data", "double_data"):
        tensor.ClearField(name)
    tensor.raw_data = data


def _graph_bytes(model: onnx.ModelProto, changed: Sequence[Slot], layout: _Layout, work: _Work) -> bytes:
    """The output's graph: the template's exact bytes if nothing in it changed."""
    if layout.kept and all(slot.outside is not None for slot in changed):
        return work.template.read_bytes()
    for index, tensor in enumerate(all_tensors(model)):
        place = layout.places.get(index)
        if place is not None and not layout.kept:
            del tensor.external_data[:]
            for key, value in (("location", place.location), ("offset", place.offset), ("length", place.length)):
                tensor.external_data.add(key=key, value=str(value))
    data: bytes = model.SerializeToString()
    return data


def _fates(fitting: Fitting, change: MergedChange, base: Tensors) -> dict[str, int]:
    fates = no_fates()
    for name in base.specs:
        held = name in fitting.sources
        fate = Fate.UNUSED if not held else Fate.MERGED if change.differs(name) else Fate.COPIED
        fates[fate.value] += 1
    return fates
