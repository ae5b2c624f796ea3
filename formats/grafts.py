"""The parts of an adapter that no weight can hold: nodes of the graph, described so that they can be inserted there.

A grafts file is a safetensors file whose metadata says where each of its tensors belongs in a model. It identifies the
model by its content digest. This module holds plain data, a reader and a writer; it knows no mathematics and no graph.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from formats.checkpoint import Checkpoint
from formats.errors import CorruptFile, NotACheckpoint
from formats.spec import TensorSpec, shape_text

GRAFTS_FILE = "grafts.safetensors"  # beside the model's weights
KEY = "surgery.grafts"
_VERSION = 1


class Value(StrEnum):
    """A value in the graph near a projection h = W x + b, to which the model adds a residual r."""

    INPUT = "input"  # x
    PRODUCT = "product"  # W x
    OUTPUT = "output"  # h
    RESIDUAL = "residual"  # r
    SUM = "sum"  # h + r
    NORMED = "normed"  # the model's own norm of h + r


@dataclass(frozen=True)
class BranchGraft:
    """A bottleneck branch: replaces h by adds_to + up f(down reads + down_bias) + up_bias.

    What the model does after h (adding r, its norm) does not change. All scalings are already multiplied into up and
    up_bias.

    Attributes:
        module: path of the projection's weight in the model's file.
        layer, place: the layer's number, and "mh_adapter" after its attention or "output_adapter" after its MLP.
        reads: the input of the down projection. If it is INPUT, down's rows may be appended to the projection's weight,
            so that one product gives both h and f's input. If it is PRODUCT, up_bias may be added to the projection's
            bias.
        adds_to: the value that the branch is added to: OUTPUT, SUM or NORMED.
        norm: path of the norm that NORMED refers to; None for other values.
        non_linearity: name of f among transformers' activations.
        down, down_bias, up, up_bias: names of tensors of shapes (rank, in), (rank), (out, rank), (out). Matrices are
            always (out, in), even where the model stores its own as (in, out).
    """

    module: str
    layer: int
    place: str
    reads: Value
    adds_to: Value
    norm: str | None
    non_linearity: str
    down: str
    down_bias: str
    up: str
    up_bias: str


@dataclass(frozen=True)
class PrefixGraft:
    """A prefix of keys and values in one layer's attention. Every token attends to all of them.

    Attributes:
        module: path of the weight of the attention's output projection in the model's file.
        layer: the layer's number.
        moves_positions: whether the input's positions begin after the prefix, rather than at 0.
        keys, values: names of tensors (length, width), with the heads concatenated along the width.
    """

    module: str
    layer: int
    moves_positions: bool
    keys: str
    values: str


@dataclass(frozen=True)
class PromptGraft:
    """A soft prompt: embeddings inserted before those of the input.

    Attributes:
        among_words: whether the prompt joins the word embeddings, so that it too gets position embeddings and the
            embedding norm. If not, it is inserted after the whole embedding block.
        after_first: whether the input's first token stays before the prompt.
        embedding: name of a tensor (length, width).
    """

    among_words: bool
    after_first: bool
    embedding: str


Graft = BranchGraft | PrefixGraft | PromptGraft
_KINDS: Mapping[str, type[Graft]] = {"branch": BranchGraft, "prefix": PrefixGraft, "prompt": PromptGraft}
_TENSORS: Mapping[type[Graft], Mapping[str, int]] = {  # the fields that name tensors, with their dimensions
    BranchGraft: {"down": 2, "down_bias": 1, "up": 2, "up_bias": 1},
    PrefixGraft: {"keys": 2, "values": 2},
    PromptGraft: {"embedding": 2},
}


@dataclass(frozen=True)
class Grafts:
    """The content of a grafts file.

    Attributes:
        model: content digest of the model's tensors. The grafts fit this model only.
        adapter: content digest of the adapter that the grafts come from.
        sites: the grafts, in the order of the layers.
    """

    model: str
    adapter: str
    sites: tuple[Graft, ...]

    def metadata(self) -> dict[str, str]:
        """The grafts file's metadata."""
        kinds = {kind: name for name, kind in _KINDS.items()}
        sites = [{"kind": kinds[type(site)], **asdict(site)} for site in self.sites]
        document = {"version": _VERSION, "model": self.model, "adapter": self.adapter, "sites": sites}
        return {"format": "pt", KEY: json.dumps(document, sort_keys=True, separators=(",", ":"))}


def tensor_names(site: Graft) -> dict[str, str]:
    """The names of a graft's tensors, by field name."""
    return {role: getattr(site, role) for role in _TENSORS[type(site)]}


def read_grafts(checkpoint: Checkpoint) -> Grafts:
    """Reads a grafts file.

    Raises:
        NotACheckpoint: the file holds something else.
        CorruptFile: the description was not written by surgery, or its tensors contradict it.
    """
    where = checkpoint.ref.path
    if KEY not in checkpoint.metadata:
        raise NotACheckpoint(
            "not a grafts file",
            where=where,
            expected=f"{KEY} in its metadata",
            then=f"give the {GRAFTS_FILE} that surgery fold wrote",
        )
    try:
        document: dict[str, Any] = json.loads(checkpoint.metadata[KEY])
        if document["version"] != _VERSION:
            raise ValueError(f"version {document['version']}")
        sites = tuple(_site(dict(each)) for each in document["sites"])
        grafts = Grafts(str(document["model"]), str(document["adapter"]), sites)
        named = [name for site in sites for name in tensor_names(site).values()]
        if sorted(named) != sorted(checkpoint.specs):
            raise ValueError(f"names {len(named)} tensors, and has {len(checkpoint.specs)}")
        for site in sites:
            for fault in _faults(site, checkpoint.specs):
                raise ValueError(fault)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(
            "the file's description of its grafts is invalid",
            where=where,
            found=f"{type(error).__name__}: {error}",
            then="fold the adapter again with this version of surgery",
        ) from error
    return grafts


def _site(document: dict[str, Any]) -> Graft:
    kind = _KINDS[document.pop("kind")]
    if kind is BranchGraft:
        document |= {role: Value(document[role]) for role in ("reads", "adds_to")}
    for each in fields(kind):
        wanted = {"int": int, "bool": bool}.get(str(each.type), str)
        value = document[each.name]
        if type(value) is not wanted and not isinstance(value, Value) and (each.name, value) != ("norm", None):
            raise TypeError(f"{each.name} = {value!r}")
    return kind(**document)


def _faults(site: Graft, specs: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Describes each fault in the shapes of a graft's tensors."""
    found = {role: specs[name] for role, name in tensor_names(site).items()}
    for role, dimensions in _TENSORS[type(site)].items():
        if len(found[role].shape) != dimensions:
            yield f"{found[role].name} is {shape_text(found[role].shape)}"
    if isinstance(site, BranchGraft):
        (rank, _), (out, inner) = found["down"].shape, found["up"].shape
        if not rank == inner == found["down_bias"].size or out != found["up_bias"].size:
            yield f"the projections of {site.module} do not fit each other"
    if isinstance(site, PrefixGraft) and found["keys"].shape != found["values"].shape:
        yield f"keys and values of layer {site.layer} differ in shape"
