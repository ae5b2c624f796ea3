"""A graph that export-onnx wrote, and whether another model's weights fit under it.

What a graph is over is in it: every weight's name, dtype, shape and place in the payload, config.json as far as it
matters, and the names that are tied. So weights of the same names, dtypes and shapes give the same program on other
numbers, and neither torch nor transformers nor a run is needed to know it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formats import Checkpoint, DType, TensorSpec
from formats.errors import CorruptFile, PathNotFound, ShapeMismatch, UnsupportedDType
from formats.model_config import parsed_config
from formats.names import nearest
from surgery.errors import MissingTensors, Unsupported
from surgery.model.base_model import BaseModel
from surgery.onnx.files.graph_file import PRODUCER
from surgery.onnx.files.settings import SETTINGS, TIES, differing, settings_of

if TYPE_CHECKING:
    import onnx

PREFIXES = ("encoder_", "decoder_")  # of the files of a model that is two graphs
_DTYPES = {1: DType.F32, 10: DType.F16, 11: DType.F64, 16: DType.BF16, 6: DType.I32, 7: DType.I64, 9: DType.BOOL,
           2: DType.U8, 3: DType.I8}  # fmt: skip
_TRACE = "leave out --graph, so that a graph of this model's own is made"


@dataclass(frozen=True)
class ExistingGraph:
    """One file.

    Attributes:
        prefix: of its name, where the model is several graphs.
        model: the graph; its weights are elsewhere.
        weights: what the payload must hold for it, by name.
        settings: config.json of the model it was made for; empty for an own module.
        ties: names of a model that ties them → the weight that stands for them.
        inputs, outputs: names.
        nodes: their number.
    """

    prefix: str
    model: onnx.ModelProto
    weights: Mapping[str, TensorSpec]
    settings: Mapping[str, Any]
    ties: Mapping[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: int


def read_graphs(path: Path) -> tuple[ExistingGraph, ...]:
    """The graph at a path, or the two of an encoder–decoder that were exported under that name.

    Raises:
        PathNotFound: neither is there.
        CorruptFile: no ONNX file.
        Unsupported: a graph that export-onnx did not write.
    """
    files = {"": path} if path.is_file() else {prefix: path.with_name(prefix + path.name) for prefix in PREFIXES}
    missing = next((file for file in files.values() if not file.is_file()), None)
    if missing is not None:
        raise PathNotFound("no such graph", where=path, then="export the base first: surgery export-onnx BASE -o …")
    return tuple(_read(prefix, file) for prefix, file in files.items())


def _read(prefix: str, path: Path) -> ExistingGraph:
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, whose package onnx may change
        raise CorruptFile("not an ONNX file", where=path, found=error) from error
    outside = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    notes = {entry.key: entry.value for entry in model.metadata_props}
    odd = SETTINGS not in notes or any(tensor.data_type not in _DTYPES for tensor in outside)
    if model.producer_name != PRODUCER or odd:
        raise Unsupported(
            "only a graph that this export-onnx wrote tells what each weight is, and which config.json it is for",
            where=path,
            expected=f"weights outside of it, under their names; {SETTINGS} in the metadata",
            found=f"written by {model.producer_name or 'an unnamed tool'}, metadata: {', '.join(notes) or 'none'}",
            then=_TRACE,
        )
    return ExistingGraph(
        prefix=prefix,
        model=model,
        weights={t.name: TensorSpec(t.name, _DTYPES[t.data_type], tuple(t.dims)) for t in outside},
        settings=parsed_config(notes[SETTINGS], path, f"graph's {SETTINGS}"),
        ties=parsed_config(notes.get(TIES, "{}"), path, f"graph's {TIES}"),
        inputs=tuple(value.name for value in model.graph.input),
        outputs=tuple(value.name for value in model.graph.output),
        nodes=len(model.graph.node),
    )


def weights_of(graphs: Iterable[ExistingGraph]) -> tuple[TensorSpec, ...]:
    """What the payload of these graphs holds, sorted by name."""
    every = {name: spec for graph in graphs for name, spec in graph.weights.items()}
    return tuple(every[name] for name in sorted(every))


def require_fit(graphs: Sequence[ExistingGraph], path: Path, checkpoint: Checkpoint, convert: bool) -> None:
    """Refuses a checkpoint whose tensors are not the graphs' by name, dtype and shape.

    Args:
        graphs: of one export.
        path: where they are, for messages.
        checkpoint: the weights that are to go under them.
        convert: whether weights of another floating-point dtype will be converted.

    Raises:
        MissingTensors, ShapeMismatch, UnsupportedDType: the first that does not fit, or all that are not there.
    """
    weights = weights_of(graphs)
    missing = [spec.name for spec in weights if spec.name not in checkpoint.specs]
    if missing:
        raise MissingTensors(
            "the graph needs tensors that the checkpoint does not have",
            where=checkpoint.ref.path,
            expected=", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else ""),
            found="nearest: " + ", ".join(near) if (near := nearest(missing[0], checkpoint.specs)) else None,
            then=f"is {path} this model's graph? If not, {_TRACE}",
        )
    for spec in weights:
        ours = checkpoint.specs[spec.name]
        if ours.shape != spec.shape:
            raise ShapeMismatch(
                f"the graph takes {spec.name} in another shape",
                where=checkpoint.ref.path,
                expected=spec.shape,
                found=ours.shape,
                then=_TRACE,
            )
        if ours.dtype is not spec.dtype and not (convert and ours.dtype.is_weight and spec.dtype.is_weight):
            raise UnsupportedDType(
                f"the graph takes {spec.name} in another dtype",
                where=checkpoint.ref.path,
                expected=spec.dtype,
                found=ours.dtype,
                then=f"convert with --dtype, or {_TRACE}",
            )


def require_same_settings(graphs: Sequence[ExistingGraph], path: Path, model: BaseModel) -> None:
    """Refuses a config.json that differs from the one that a graph was made for. Raises Unsupported, or CorruptFile."""
    differ = list(differing(graphs[0].settings, settings_of(model.config)))
    if differ:
        raise Unsupported(
            "config.json is not that of the model whose graph this is",
            where=f"{model.config_file} and {path}",
            found="; ".join(differ[:8]) + (f" and {len(differ) - 8} more" if len(differ) > 8 else ""),
            then=_TRACE,
        )


def require_ties(ties: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint that stores two names of one tensor with different values.

    transformers would untie them by value; a graph that must not depend on values has only one of them.

    Args:
        ties: a further name → the one that the graph has.
        checkpoint: may lack the further names.
    """
    for name, kept in ties.items():
        if name not in checkpoint.specs:
            continue
        first, second = (checkpoint.read_bytes(each) for each in (kept, name))
        if first.shape != second.shape or bool((first != second).any()):
            raise Unsupported(
                "config.json ties two tensors which the checkpoint stores with different values",
                where=checkpoint.ref.path,
                found=f"{kept} and {name}",
                then='set "tie_word_embeddings": false in config.json, and export without --graph',
            )
