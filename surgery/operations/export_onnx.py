"""export-onnx: a Hugging Face folder → OUT.onnx, and its weights beside it; adapters in it where that is asked for.

Plans the output, builds the graph without weights, writes both files without a name, has them checked against torch,
and only then lets them appear. What the graph is made of is `surgery.onnx`'s business.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from formats import Checkpoint, open_checkpoint
from formats.adapter import NOTHING_TOLD, Told
from formats.errors import NotACheckpoint, OutputExists, PathNotFound
from formats.layout import Layout
from formats.staging import Staging, disk_errors, write_at
from surgery.errors import Unsupported
from surgery.onnx.architecture import read_architecture
from surgery.onnx.payload import PAYLOAD, Read, attach_payload, holds_payload, payload_layout, write_payload
from surgery.onnx.template import Template, build_template
from surgery.onnx.verify import check_structure
from surgery.operations.export_adapters import Keeping
from surgery.operations.export_grafts import open_grafts
from surgery.plan import Fate
from surgery.report import Report, Stopwatch, peak_rss

_OWN_FOLDER = "give each export a folder of its own: base/model.onnx, merged/model.onnx"


@dataclass(frozen=True, kw_only=True)
class ExportReport(Report):
    """What export-onnx did. The ledger counts the checkpoint's tensors: copied into the payload, or not needed.

    Attributes:
        payload: path of the weights, which the graph finds by name beside it.
        graph_sha256: of the `.onnx` file; equal for models of one architecture, whatever their weights.
        payload_sha256: of the weights' file.
        nodes: nodes of the graph.
        nodes_run: nodes that ONNX Runtime executes after its own optimisation; None if not verified.
        max_abs_error: largest difference from torch at valid tokens, with what is grafted in its model; None if not
            verified.
        max_rel_error: the same in relation to the largest value of its output.
        tolerance: what max_rel_error was held against.
        shapes: (batch, sequence) of each comparison.
        model_class: the transformers class.
        dtype: the checkpoint's floating-point dtype.
        inputs, outputs: the graph's.
        unused: names of the checkpoint's tensors that the graph does not need.
        adapters: "branch", "inputs" or "half-folded"; "constants" of prefixes and prompts; empty without adapters.
        adapted: names of the weights that have LoRA beside them, or of the modules that something else is put to.
        adapted_rel_error: largest difference from the outputs of the merged weights, as max_rel_error; None if not
            verified.
        adapted_tolerance: what it was held against.
    """

    payload: str
    graph_sha256: str
    payload_sha256: str
    nodes: int
    nodes_run: int | None
    max_abs_error: float | None
    max_rel_error: float | None
    tolerance: float | None
    shapes: tuple[tuple[int, int], ...]
    model_class: str
    dtype: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    unused: tuple[str, ...]
    adapters: str
    adapted: tuple[str, ...]
    adapted_rel_error: float | None
    adapted_tolerance: float | None


def export_onnx(
    model: str | Path,
    out: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    adapters_as: str | None = None,
    told: Told = NOTHING_TOLD,
    force: bool = False,
    verify: bool = True,
) -> ExportReport:
    """Writes OUT.onnx and, beside it, `model.safetensors`.

    Args:
        model: a Hugging Face folder: config.json, and weights in one file or in shards.
        out: the `.onnx` file. Its folder must hold no other model's `model.safetensors`.
        adapters: LoRA of linear layers, in any dialect that merge reads, to be left beside the weights; or one
            adapter of bottlenecks, prefixes or prompts, as fold reads it. What fold left for the graph of the model
            it wrote is put there without being named.
        adapters_as: "branch", LoRA's default: the one adapter's factors are weights of the graph. "inputs": the graph
            takes LoRA's as optional inputs, of any rank, for every weight that one of the adapters changes; ONNX
            Runtime fills them from `.onnx_adapter` files, which `convert` writes. "half-folded", the default for
            bottlenecks: those that read what a projection gives have the first of their products in the
            projection's.
        told: what the adapters' files do not say.
        force: replace what stands there; never the model itself.
        verify: compare with torch before anything appears under its name.

    Raises:
        UnknownArchitecture, Unsupported, MissingTensors, UnsupportedDType: a model that cannot be exported, or an
            adapter that no graph can take, and why.
        OutputExists: something stands at the output, or the output is the input.
        VerificationFailed: ONNX Runtime and torch disagree, or the graph and the merged weights.
        ReportedError: the adapters, as merge.
    """
    watch = Stopwatch()
    folder, target = Path(model), Path(out)
    guarded = [Path(adapter) for adapter in adapters]
    _check_paths(folder, target, force, guarded)
    architecture = read_architecture(folder)
    with open_checkpoint(folder) as checkpoint:
        keeping = open_grafts(architecture, guarded, adapters_as, checkpoint) or Keeping.of(
            folder, guarded, adapters_as or "branch", checkpoint.specs, told
        )
        bare = build_template(architecture, checkpoint.specs)
        _check_ties(bare, checkpoint)
        template, read = keeping.grafted(bare, checkpoint)
        where = payload_layout(template.weights)
        plain, graph = (attach_payload(each.model, template.weights, where) for each in (bare, template))
        dtype = next(spec.dtype for spec in bare.weights if spec.dtype.is_float)
        with _staged(folder, target, graph, read, template, where, force, guarded) as payload:
            check_structure(graph)
            found, agreed = None, None
            if verify:
                found, agreed = keeping.compare(architecture, (plain, graph), payload, dtype, checkpoint)
            payload_sha256 = _file_sha256(payload)
        unused = tuple(sorted(checkpoint.specs.keys() - {spec.name for spec in bare.weights}))
    kept = {spec.name for spec in template.weights} & {spec.name for spec in bare.weights}
    fates = [Fate.COPIED] * len(kept) + [Fate.CONVERTED] * (len(bare.weights) - len(kept))
    fates += [Fate.UNUSED] * len(unused) + keeping.fates
    return ExportReport(
        operation="export-onnx",
        output=str(target),
        seconds=watch.seconds,
        peak_rss_bytes=peak_rss(),
        ledger={fate.value: fates.count(fate) for fate in Fate},
        notes=(*checkpoint.notes, *([] if verify else ["not compared with torch"]), *keeping.notes),
        payload=str(target.parent / PAYLOAD),
        graph_sha256=hashlib.sha256(graph).hexdigest(),
        payload_sha256=payload_sha256,
        nodes=len(template.model.graph.node),
        nodes_run=agreed.nodes_run if agreed else found.nodes_run if found else None,
        max_abs_error=found.max_abs_error if found else None,
        max_rel_error=found.max_rel_error if found else None,
        tolerance=found.tolerance if found else None,
        shapes=found.shapes if found else (),
        model_class=architecture.model_class.__name__,
        dtype=dtype.label,
        inputs=architecture.inputs,
        outputs=tuple(output.name for output in template.model.graph.output),
        unused=unused,
        adapters=keeping.way,
        adapted=keeping.adapted,
        adapted_rel_error=agreed.max_rel_error if agreed else None,
        adapted_tolerance=agreed.tolerance if agreed else None,
    )


def _check_paths(folder: Path, target: Path, force: bool, adapters: Sequence[Path]) -> None:
    if not folder.exists():
        raise PathNotFound("no such folder", where=folder)
    if not folder.is_dir():
        raise NotACheckpoint(
            "the graph is built from a folder, not from a weight file alone",
            where=folder,
            expected="a Hugging Face folder: config.json and its weights",
            found="a file",
            then="pass the folder that holds it, with its config.json",
        )
    if target.suffix != ".onnx":
        raise Unsupported(
            "the output is one .onnx file",
            where=target,
            expected="a name that ends in .onnx",
            then=f"say -o {target / 'model.onnx'}",
        )
    Staging(target, folder=False, inputs=[*_files(folder), *adapters], force=force)


def _files(folder: Path) -> list[Path]:
    return [folder, *(path for path in folder.iterdir() if path.is_file())]


def _check_ties(template: Template, checkpoint: Checkpoint) -> None:
    """transformers unties what the file stores with different values; the graph cannot depend on values."""
    for first, *rest in template.ties:
        for name in rest:
            if checkpoint.read_bytes(first).tobytes() != checkpoint.read_bytes(name).tobytes():
                raise Unsupported(
                    "config.json ties two tensors which the checkpoint stores with different values",
                    where=checkpoint.ref.path,
                    found=f"{first} and {name}",
                    then='set "tie_word_embeddings": false in config.json',
                )


@contextmanager
def _staged(
    folder: Path,
    target: Path,
    graph: bytes,
    read: Read,
    template: Template,
    where: Layout,
    force: bool,
    adapters: Sequence[Path],
) -> Iterator[int]:
    """Both files, written and nameless; yields the payload's descriptor. On a normal exit they appear.

    A folder that does not exist yet appears whole. In one that does, the payload appears before the graph, and a
    graph that is to be replaced goes first: at no time does a graph stand beside weights it was not made for.
    """
    beside = target.parent / PAYLOAD
    if not target.parent.exists():
        with Staging(target.parent, folder=True, inputs=[folder, *adapters], force=force) as staging:
            _write(staging.create(target.name, len(graph)), graph, target)
            payload = staging.create(PAYLOAD, where.size)
            write_payload(payload, read, template.weights, where, beside)
            yield payload
    elif _keeps(folder, beside, read, template, where, force):
        guarded = [*_files(folder), *adapters]
        with Staging(target, folder=False, inputs=guarded, force=force) as staging, beside.open("rb") as kept:
            _write(staging.create("", len(graph)), graph, target)
            yield kept.fileno()
    else:
        guarded = [*_files(folder), *adapters]
        with (
            Staging(target, folder=False, inputs=guarded, force=force) as staging,
            Staging(beside, folder=False, inputs=guarded, force=force) as weights,
        ):  # left in reverse: weights first
            _write(staging.create("", len(graph)), graph, target)
            payload = weights.create("", where.size)
            write_payload(payload, read, template.weights, where, beside)
            yield payload
            with disk_errors(target):
                os.fsync(payload)  # what can fail has been tried before the old graph goes
                if force:
                    target.unlink(missing_ok=True)


def _keeps(folder: Path, beside: Path, read: Read, template: Template, where: Layout, force: bool) -> bool:
    """Whether the payload stands there already, to the byte. Raises OutputExists where it must not be replaced."""
    own = beside.parent.resolve() == folder.resolve()
    if not os.path.lexists(beside):
        if own:
            raise OutputExists(
                "the export would put a second set of weights into the model's own folder",
                where=beside.parent,
                found="the weights under other names or in shards",
                then=_OWN_FOLDER,
            )
        return False
    linked = beside.is_symlink() or beside.stat().st_nlink > 1
    if not linked and beside.is_file() and holds_payload(beside, read, template.weights, where):
        return True
    if own:
        raise OutputExists(
            "the weights in the model's own folder cannot serve the graph as they are, and are not ours to replace",
            where=beside,
            expected="a plain file, exactly the tensors the graph needs, in the canonical order and without metadata",
            found="a link" if linked else "another order, other tensors or metadata",
            then=_OWN_FOLDER,
        )
    if not force:
        raise OutputExists(
            "another model's weights stand where this one's would go; their name is part of the graph, so it is fixed",
            where=beside,
            found="a link" if linked else "a file with other bytes",
            then=f"{_OWN_FOLDER}; or replace it with --force",
        )
    return False


def _write(descriptor: int, data: bytes, target: Path) -> None:
    with disk_errors(target):
        write_at(descriptor, data, 0)


def _file_sha256(descriptor: int) -> str:
    with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped:
        return hashlib.sha256(mapped).hexdigest()
