"""A merged model's outline: its tensors, and the base tensor from which each is computed.

Usually these are the base's tensors. Untying gives a tied head its own tensor, and peft's layer_replication repeats
layers. Reads headers and configs only; knows no method.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from formats.dialects import AdapterFile
from formats.spec import TensorSpec
from surgery.errors import NotMergeable, Unsupported
from surgery.model.base_model import BaseModel

TIED = "tie_word_embeddings"
_DEPTHS = ("num_hidden_layers", "n_layer")  # config keys that hold the number of layers
_BY_LAYER = ("layer_types",)  # config keys of lists with one entry per layer
_LAYER = re.compile(r"^(?P<stack>(?:.+?\.)?(?:layers|encoder\.layer|h))\.(?P<number>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class Outline:
    """The tensors of a merged model, without the adapters.

    Attributes:
        specs: its tensors, before merging.
        sources: output tensor → base tensor from which it is computed; several may share one.
        config: settings of config.json that change.
    """

    specs: Mapping[str, TensorSpec]
    sources: Mapping[str, str]
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def plain(cls, base: Mapping[str, TensorSpec]) -> Outline:
        """The outline of the base itself."""
        return cls(base, {name: name for name in base})

    @property
    def origins(self) -> dict[str, str]:
        """Base tensor → output tensor from which unmerge restores it: the one with the same name if it is computed from
        that base tensor, else the first that is."""
        found: dict[str, str] = {}
        for name, source in self.sources.items():
            if name == source or source not in found:
                found[source] = name
        return found

    @property
    def surplus(self) -> frozenset[str]:
        """Output tensors that unmerge drops."""
        return frozenset(self.sources) - frozenset(self.origins.values())

    @property
    def renamed(self) -> dict[str, str]:
        """Output tensor → base name, for tensors that unmerge renames."""
        return {name: source for source, name in self.origins.items() if name != source}


def outline_of(model: BaseModel, adapters: Sequence[AdapterFile], *, untie: bool) -> Outline:
    """The outline of a base merged with these adapters.

    Args:
        model: the base; its config.json says which tensors are tied.
        adapters: the opened adapters.
        untie: whether a tied head gets its own tensor.

    Raises:
        NotMergeable: adapters made for different depths, layers that replication drops, or a base without a tied head.
    """
    outline = _replicated(model, adapters)
    if not untie:
        return outline
    heads = model.tied_head(outline.specs)
    if not heads:
        raise NotMergeable(
            "the base ties no head to its embedding, as far as its config.json and transformers tell",
            where=model.path,
            then="leave --untie out",
        )
    sources = {**outline.sources, **{head: outline.sources[embedding] for head, embedding in heads.items()}}
    return Outline(_specs(sources, model.specs), sources, {**outline.config, TIED: False})


def head_is_tied(head: str, embedding: str, model: Path) -> NotMergeable:
    """The error for an adapter that changes a tied head without --untie."""
    return NotMergeable(
        "the adapter changes the head, which the base ties to its embedding: one tensor cannot be both",
        where=model,
        found=f"{head}, stored as {embedding}",
        then="merge with --untie: the head gets its own tensor, and config.json is updated",
    )


def _replicated(model: BaseModel, adapters: Sequence[AdapterFile]) -> Outline:
    """The base with its layers repeated as the adapters' configs say (LoraConfig.layer_replication)."""
    base = model.specs
    maps = {adapter.path: _layer_map(adapter) for adapter in adapters}
    chosen = {text for text in maps.values() if text}
    if not chosen:
        return Outline.plain(base)
    if len(chosen) > 1 or "" in maps.values():
        raise NotMergeable(
            "the adapters were made for models of different depth",
            where=", ".join(map(str, maps)),
            found="; ".join(f"layer_replication {text or 'none'}" for text in maps.values()),
            then="merge them one after the other, or each into its own copy of the base",
        )
    ranges = json.loads(chosen.pop())
    stack, depth = _layers(model.path, base)
    order = _order(ranges, depth)
    if set(order) != set(range(depth)):
        raise NotMergeable(
            "layer_replication leaves out layers of the base, which nothing could bring back, or names some it lacks",
            where=adapters[0].path,
            expected=f"every layer from 0 to {depth - 1}, in ranges [first, last + 1]",
            found=ranges,
            then="merge this adapter with peft",
        )
    sources: dict[str, str] = {}
    for name in base:
        match = _LAYER.match(name)
        if match is None or match["stack"] != stack:
            sources[name] = name
            continue
        for place, number in enumerate(order):
            if number == int(match["number"]):
                sources[f"{stack}.{place}.{match['rest']}"] = name
    return Outline(_specs(sources, base), sources, _deeper(model.config, order, depth))


def _specs(sources: Mapping[str, str], base: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    return {name: replace(base[source], name=name) for name, source in sources.items()}


def _order(ranges: Any, depth: int) -> list[int]:
    """The base's layer at each place; empty if this is not a list of ranges within the depth."""
    sound = isinstance(ranges, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(end) is int and 0 <= end <= depth for end in pair)
        for pair in ranges
    )
    return [number for first, last in ranges for number in range(first, last)] if sound else []


def _layer_map(adapter: AdapterFile) -> str:
    ranges = (adapter.config or {}).get("layer_replication")
    return json.dumps(ranges) if ranges else ""


def _layers(model: Path, base: Mapping[str, TensorSpec]) -> tuple[str, int]:
    """The model's only stack of layers, and the number of layers. Raises Unsupported if there is not exactly one."""
    numbers: dict[str, set[int]] = {}
    for name in base:
        if match := _LAYER.match(name):
            numbers.setdefault(match["stack"], set()).add(int(match["number"]))
    if len(numbers) != 1:
        raise Unsupported(
            "cannot tell which layers layer_replication repeats",
            where=model,
            expected="exactly one stack of layers, as in Llama, BERT and Falcon",
            found=", ".join(sorted(numbers)) or "none",
            then="merge this adapter with peft",
        )
    ((stack, found),) = numbers.items()
    return stack, max(found) + 1


def _deeper(config: Mapping[str, Any], order: Sequence[int], depth: int) -> dict[str, Any]:
    """What changes in a config: the number of layers, and lists with one entry per layer."""
    keys = [key for key in _DEPTHS if config.get(key) == depth] or _DEPTHS[:1]
    changed: dict[str, Any] = dict.fromkeys(keys, len(order))
    for key in _BY_LAYER:
        if isinstance(config.get(key), list) and len(config[key]) == depth:
            changed[key] = [config[key][number] for number in order]
    return changed
