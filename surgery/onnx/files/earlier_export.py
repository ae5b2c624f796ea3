"""Reads a graph that export-onnx wrote, and checks whether another model's weights fit it.

A graph describes its weights: every name, dtype, shape and place in the payload, the relevant part of config.json, and
the tied names. So weights with the same names, dtypes and shapes give the same program with other values, and this can
be decided without torch, transformers or a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formats import Checkpoint, DType, TensorSpec
from formats.errors import CorruptFile, PathNotFound, ShapeMismatch, UnsupportedDType
from formats.names import nearest
from surgery.errors import MissingTensors, Unsupported
from surgery.onnx.files.graph_file import PRODUCER
from surgery.onnx.files.settings import SETTINGS, TIES, differing, settings_of

if TYPE_CHECKING:
    import onnx

PREFIXES = ("encoder_", "decoder_")  # prefixes of the files of a model that is two graphs
_DTYPES = {1: DType.F32, 10: DType.F16, 11: DType.F64, 16: DType.BF16, 6: DType.I32, 7: DType.I64, 9: DType.BOOL,
           2: DType.U8, 3: DType.I8}  # fmt: skip
_TRACE = "leave out --graph, so that a new graph is made for this model"


@dataclass(frozen=True)
class ExistingGraph:
    """One graph's file.

    Attributes:
        prefix: prefix of the file's name, if the model is several graphs.
        model: the graph; its weights are in the payload.
        weights: the weights that the payload must hold, by name.
        settings: config.json of the model for which the graph was made; empty for the user's own module.
        ties: for each tied name, the weight that stands for it.
        inputs, outputs: names of the inputs and outputs.
        nodes: number of nodes.
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
    """Reads the graph at a path, or the two graphs of an encoder–decoder that were exported under this name.

    Raises:
        PathNotFound: there is no such graph.
        CorruptFile: a file is not an ONNX file.
        Unsupported: export-onnx did not write the graph.
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
        raise CorruptFile("not an ONNX file", where=path, found=error, then="export or copy the graph again") from error
    outside = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    notes = {entry.key: entry.value for entry in model.metadata_props}
    odd = SETTINGS not in notes or any(tensor.data_type not in _DTYPES for tensor in outside)
    if model.producer_name != PRODUCER or odd:
        raise Unsupported(
            "this graph does not say what each weight is: only graphs that surgery export-onnx wrote do",
            where=path,
            expected=f"weights in a separate file, under their names; {SETTINGS} in the metadata",
            found=f"written by {model.producer_name or 'an unnamed tool'}, metadata: {', '.join(notes) or 'none'}",
            then=_TRACE,
        )
    return ExistingGraph(
        prefix=prefix,
        model=model,
        weights={t.name: TensorSpec(t.name, _DTYPES[t.data_type], tuple(t.dims)) for t in outside},
        settings=json.loads(notes[SETTINGS]),
        ties=json.loads(notes.get(TIES, "{}")),
        inputs=tuple(value.name for value in model.graph.input),
        outputs=tuple(value.name for value in model.graph.output),
        nodes=len(model.graph.node),
    )


def weights_of(graphs: Iterable[ExistingGraph]) -> tuple[TensorSpec, ...]:
    """The weights in the payload of these graphs, sorted by name."""
    every = {name: spec for graph in graphs for name, spec in graph.weights.items()}
    return tuple(every[name] for name in sorted(every))


def require_fit(graphs: Sequence[ExistingGraph], path: Path, checkpoint: Checkpoint, convert: bool) -> None:
    """Refuses a checkpoint whose tensors do not fit the graphs by name, dtype and shape.

    Args:
        graphs: the graphs of one export.
        path: the graphs' path, for messages.
        checkpoint: the new weights for the graphs.
        convert: whether weights of another floating-point dtype will be converted.

    Raises:
        MissingTensors: tensors are missing.
        ShapeMismatch, UnsupportedDType: a tensor has another shape or dtype.
    """
    weights = weights_of(graphs)
    missing = [spec.name for spec in weights if spec.name not in checkpoint.specs]
    if missing:
        raise MissingTensors(
            "the graph needs tensors that the checkpoint does not have",
            where=checkpoint.ref.path,
            expected=", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else ""),
            found="nearest: " + ", ".join(near) if (near := nearest(missing[0], checkpoint.specs)) else None,
            then=f"check that {path} is this model's graph; if not, {_TRACE}",
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


def require_same_settings(graphs: Sequence[ExistingGraph], path: Path, config: Path) -> None:
    """Refuses a config.json that differs from the one for which a graph was made.

    Raises:
        Unsupported: settings that matter to the graph differ.
        CorruptFile: config.json is not a JSON object.
    """
    try:
        settings = settings_of(json.loads(config.read_bytes()))
    except (ValueError, AttributeError) as error:
        raise CorruptFile(
            "config.json is not a JSON object", where=config, found=error, then="download or correct the file"
        ) from error
    differ = list(differing(graphs[0].settings, settings))
    if differ:
        raise Unsupported(
            "config.json differs from the config of the model for which the graph was made",
            where=f"{config} and {path}",
            found="; ".join(differ[:8]) + (f" and {len(differ) - 8} more" if len(differ) > 8 else ""),
            then=_TRACE,
        )


def require_ties(ties: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint that stores two names of one tensor with different values.

    transformers would untie them because the values differ; a graph, which must not depend on values, has only one.

    Args:
        ties: for each tied name, the name that the graph has.
        checkpoint: the checkpoint, which may lack the tied names.
    """
    for name, kept in ties.items():
        if name not in checkpoint.specs:
            continue
        first, second = (checkpoint.read_bytes(each) for each in (kept, name))
        if first.shape != second.shape or bool((first != second).any()):
            raise Unsupported(
                "config.json ties two tensors that the checkpoint stores with different values",
                where=checkpoint.ref.path,
                found=f"{kept} and {name}",
                then='set "tie_word_embeddings": false in config.json, and export without --graph',
            )
