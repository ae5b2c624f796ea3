"""Decides what becomes of each part of an adapter, and why: folded, widened, half-folded, or kept as nodes.

Reads headers and config.json only. Below, x is a projection's input, h = W x + b its output, and r the residual that
the model adds to h.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from formats.dialects.adapterhub_beside import Part
from formats.dialects.adapterhub_layers import ATTENTION, MLP
from formats.dialects.bottleneck import Bottleneck, Bottlenecks, Hypercomplex
from formats.dialects.prompts import Network, Prefix, Prompt, Whole
from formats.layers import owner
from formats.spec import TensorSpec
from surgery.errors import NotMergeable
from surgery.methods.activations import LINEAR, Activation, activation

IN_FULL, REPLACED = "in full", "the tensor itself: replaced"
_WIDTHS = ("intermediate_size", "hidden_dim")  # the config's keys for the MLP's width
_FUNCTIONS = ("hidden_act", "activation_function", "hidden_activation", "activation")  # and for its activation
_NUMBERED = re.compile(r"^(?P<stack>(?:.*\.)?(?:layers?|h)\.)(?P<number>\d+)(?P<rest>\..*)$")


class Way(StrEnum):
    """What becomes of a part of an adapter."""

    FOLDED = "folded"  # into weights of the same shapes
    WIDENED = "widened"  # into more neurons of the MLP
    HALF = "half-folded"  # the first projection or the biases are merged into the base's; the rest stays as nodes
    GRAPH = "graph"  # stays as nodes
    LEFT = "left"  # a head for which the base has no layers; it is not in the output


@dataclass(frozen=True)
class Verdict:
    """The decision on one part of an adapter.

    Attributes:
        module: the base's module to which it belongs.
        what: the kind of part.
        way: what becomes of it.
        reason: the reason, in a line.
    """

    module: str
    what: str
    way: Way
    reason: str


@dataclass(frozen=True)
class Judged:
    """A bottleneck with its verdict.

    Attributes:
        one: the bottleneck.
        verdict: the decision on it.
        split: whether each of its neurons becomes two when it is widened.
    """

    one: Bottleneck
    verdict: Verdict
    split: bool = False


@dataclass(frozen=True)
class Room:
    """Biases that a model's config can enable, for all projections at a place in every layer.

    Attributes:
        setting: the config's key that enables them.
        projections: paths of the projections inside a layer.
    """

    setting: str
    projections: tuple[str, ...]


_ROOMS: Mapping[str | None, Mapping[str, Room]] = {
    "llama": {
        ATTENTION: Room("attention_bias", tuple(f".self_attn.{each}_proj" for each in "qkvo")),
        MLP: Room("mlp_bias", tuple(f".mlp.{each}_proj" for each in ("gate", "up", "down"))),
    }
}


@dataclass(frozen=True)
class Base:
    """The base's tensors and its config.json (empty if there is none), on which verdicts depend."""

    specs: Mapping[str, TensorSpec]
    config: Mapping[str, Any]

    @property
    def function(self) -> Activation | None:
        """The MLP's activation."""
        named = next((self.config[key] for key in _FUNCTIONS if isinstance(self.config.get(key), str)), None)
        return None if named is None else activation(named)

    @property
    def width(self) -> str:
        """The config's key for the MLP's width."""
        return next((key for key in _WIDTHS if key in self.config), _WIDTHS[0])

    def room(self, place: str) -> Room | None:
        """The biases that can be enabled at a place whose projections have none; None if there is no such setting."""
        room = _ROOMS.get(self.config.get("model_type"), {}).get(place)
        if room is None or self.config.get(room.setting):
            return None
        found = {name for name in self.specs if name.rpartition(".")[0].endswith(room.projections)}
        return None if any(name.endswith(".bias") for name in found) else room

    def alike(self, name: str) -> dict[int, str]:
        """The tensors at the same place in every layer, by layer number."""
        match = _NUMBERED.match(name)
        assert match is not None  # the reader finds no others
        pattern = re.compile(re.escape(match["stack"]) + r"(\d+)" + re.escape(match["rest"]))
        return {int(found[1]): other for other in self.specs if (found := pattern.fullmatch(other))}


def judge(adapter: Bottlenecks, base: Base) -> tuple[Judged, ...]:
    """Decides on every bottleneck.

    Raises:
        NotMergeable: the non-linearity is unknown, or the adapter changes the model's own nodes.
    """
    f = activation(adapter.non_linearity)
    if f is None:
        raise unknown_non_linearity(adapter.non_linearity, adapter.ref.path)
    if not adapter.original_ln_after:
        raise NotMergeable(
            "the adapter removes the model's own residual and norm after it, which no weight and no new node can do",
            where=adapter.ref.path,
            found="original_ln_after = false",
            then="run it with the library that trained it",
        )
    return tuple(_judged(adapter, one, f, base) for one in adapter.modules)


def unknown_non_linearity(name: str, where: str) -> NotMergeable:
    """The error for a non-linearity that is not known."""
    return NotMergeable(
        "the adapter has an unknown non-linearity",
        where=where,
        found=f"non_linearity = {name}",
        then="run the adapter with the library that trained it",
    )


def _judged(adapter: Bottlenecks, one: Bottleneck, f: Activation, base: Base) -> Judged:
    kind = "compacter" if isinstance(one.down, Hypercomplex) else "bottleneck"
    what = f"{'parallel ' if adapter.parallel else ''}{kind}, {f.name}"
    split = False
    if adapter.parallel:
        split = f is LINEAR is not base.function
        way, reason = _parallel(one, f, base)
    elif adapter.original_ln_before:
        way, reason = (
            Way.GRAPH,
            (
                "it reads the norm of h + r, which is not linear in what the projection reads"
                if one.norm is not None
                else "it reads h + r, and no weight into which it could be folded reads r"
            ),
        )
    elif f is not LINEAR:
        way, reason = Way.HALF, f"{f.name} is not linear; D h + b_D = (DW) x + (D b + b_D) reads what W reads"
        if not joins_rows(one, base):
            reason = f"{f.name} is not linear; DW is larger than D, so only D b + b_D and b + s b_U are combined"
    elif f"{owner(one.behind)}.bias" not in base.specs:
        room = base.room(one.place)
        way, reason = Way.HALF, "linear, but the projection has no bias for s(U b_D + b_U)"
        if room is not None:
            reason = f"f is linear: W' = (I + sUD)W; {room.setting} adds biases: b' = s(U b_D + b_U), zeros elsewhere"
            way = Way.FOLDED
    else:
        dense = "dense form, " if kind == "compacter" else ""
        way, reason = Way.FOLDED, f"{dense}f is linear: W' = (I + sUD)W, b' = (I + sUD)b + s(U b_D + b_U)"
    return Judged(one, Verdict(owner(one.behind), what, way, reason), split)


def joins_rows(one: Bottleneck, base: Base) -> bool:
    """Whether DW, which reads x, replaces D, which reads h. This does not pay if x has more columns, since it then
    costs more than one node less saves. It is always done if the projection has no bias: nothing else can be merged."""
    bias = base.specs.get(f"{owner(one.behind)}.bias")
    return bias is None or base.specs[one.behind].size <= bias.size**2


def _parallel(one: Bottleneck, f: Activation, base: Base) -> tuple[Way, str]:
    """Whether a parallel bottleneck can become neurons of the MLP."""
    if one.first is None:
        return Way.GRAPH, "it reads r, in parallel to an attention whose projection reads only the heads' sums"
    if one.norm is None:
        return Way.GRAPH, "it reads r, but the MLP reads the norm of r: no neuron of the MLP reads r"
    g = base.function
    if g is None:
        return Way.GRAPH, "no config.json names a known activation for the MLP"
    if f is not g and not (f is LINEAR and g.splits):
        return Way.GRAPH, f"f is {f.name}, the MLP's activation is {g.name}: none of its neurons computes f(D x)"
    parts = [one.first, f"{owner(one.first)}.bias", one.behind, f"{owner(one.behind)}.bias"]
    if any(part not in base.specs for part in parts):
        return Way.GRAPH, "the MLP has no biases for those of D and U"
    shapes = [{base.specs[name].shape for name in base.alike(part).values()} for part in parts]
    widths = {shape[0] for shape in shapes[0]}
    if not all(len(shape) == 1 for shape in shapes) or widths != {base.config.get(base.width)}:
        return (
            Way.GRAPH,
            f"the MLPs differ in width, or have another than config.json's {base.width}, which holds for all",
        )
    if f is g:
        return Way.WIDENED, f"the MLP also uses {f.name} and reads r: neurons [W1; D], [W2, sU]"
    return Way.WIDENED, f"{g.name}(z) − {g.name}(−z) = z: neurons [W1; D; −D], [W2, sU, −sU]"


def verdicts_beside(part: Part) -> Iterator[Verdict]:
    """Decides on a prefix, a prompt or a head. Raises NotMergeable for an unknown non-linearity."""
    if isinstance(part, Prefix):
        if isinstance(part.values, Network) and activation(part.values.non_linearity) is None:
            raise unknown_non_linearity(part.values.non_linearity, part.ref.path)
        reason = "its softmax sums over additional keys, which no weight of the model can add"
        for attention in part.attentions:
            yield Verdict(owner(attention), f"prefix of {part.length}", Way.GRAPH, reason)
    elif isinstance(part, Whole):
        if part.left:
            yield Verdict("head", part.kind, Way.LEFT, part.left)
        for name in part.tensors:
            yield Verdict(owner(name), IN_FULL, Way.FOLDED, REPLACED)
    elif isinstance(part, Prompt):
        where = "after the first token" if part.after_first else "before the input"
        reason = "it adds tokens to the input, and no weight can make the sequence longer"
        yield Verdict("embeddings", f"prompt of {part.embedding.spec.shape[0]} {where}", Way.GRAPH, reason)
