"""The parts of an adapter that no weight can hold: nodes of the graph, described so that they can be inserted there.

A grafts file is a safetensors file whose metadata says where each of its tensors belongs in the model that it names by
its content digest. Plain data, a reader and a writer; knows no mathematics and no graph.
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
    """A value of the graph around a projection W x + b = h, to which the model adds a residual r."""

    INPUT = "input"  # x
    PRODUCT = "product"  # W x
    OUTPUT = "output"  # h
    RESIDUAL = "residual"  # r
    SUM = "sum"  # h + r
    NORMED = "normed"  # the model's own norm of h + r


@dataclass(frozen=True)
class BranchGraft:
    """In place of h the model goes on with adds_to + up f(down reads + down_bias) + up_bias.

    What the model does after h (adding r, its norm) stays as it is. All scalings are multiplied into up and up_bias.

    Attributes:
        module: the projection, by the path of its weight in the model's file.
        layer, place: the layer's number, and "mh_adapter" behind its attention or "output_adapter" behind its MLP.
        reads: what f's projection reads. Where that is INPUT, down's rows may be appended to the projection's own: one
            product gives both h and what f takes. Where it is PRODUCT, up_bias may join the projection's.
        adds_to: OUTPUT, SUM or NORMED.
        norm: the norm that NORMED means, by its path; None elsewhere.
        non_linearity: f, as transformers' activations are called.
        down, down_bias, up, up_bias: names of tensors: (rank, in), (rank), (out, rank), (out), all as (out, in)
            whichever way the model stores its own.
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
    """Keys and values before those of one layer's attention; every token attends to all of them.

    Attributes:
        module: the projection of the attention's outputs, by the path of its weight in the model's file.
        layer: the layer's number.
        moves_positions: whether the input's positions begin behind the prefix, rather than at 0.
        keys, values: names of tensors (length, width), heads one after the other.
    """

    module: str
    layer: int
    moves_positions: bool
    keys: str
    values: str


@dataclass(frozen=True)
class PromptGraft:
    """Embeddings before those of the input.

    Attributes:
        among_words: whether they are put among the embeddings of words, so that positions and the norm of embeddings
            are theirs too; else they come behind everything that embeds.
        after_first: whether the input's first token stays before them.
        embedding: the name of a tensor (length, width).
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
    """What belongs into a model.

    Attributes:
        model: content digest of the tensors of the model that it belongs into, and no other.
        adapter: content digest of the adapter that it comes from.
        sites: in the order of layers.
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
    """The names of a site's tensors, by what they are to it."""
    return {role: getattr(site, role) for role in _TENSORS[type(site)]}


def read_grafts(checkpoint: Checkpoint) -> Grafts:
    """What a grafts file says.

    Raises:
        NotACheckpoint: a file of something else.
        CorruptFile: a description that is not ours, or that its tensors contradict.
    """
    where = checkpoint.ref.path
    if KEY not in checkpoint.metadata:
        raise NotACheckpoint("not a grafts file", where=where, expected=f"{KEY} in its metadata")
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
    """What is wrong with the shapes of a site's tensors."""
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
