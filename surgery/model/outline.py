"""The outline of a merged model: its tensors, and the base tensor from which each one is made.

Usually these are simply the base's tensors. A head that the base ties to its embedding becomes a tensor of its own when
it is untied, and peft's layer_replication repeats layers. This module reads headers and configs only, and knows no
method.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from formats.dialects import open_adapter_file
from formats.spec import TensorSpec
from surgery.errors import NotMergeable, Unsupported
from surgery.model.config import CONFIG, parsed_config
from surgery.model.meta_model import known_names, meta_model

TIED = "tie_word_embeddings"
_DEPTHS = ("num_hidden_layers", "n_layer")  # the config's keys for the number of layers
_BY_LAYER = ("layer_types",)  # the config's keys for lists with one entry per layer
_LAYER = re.compile(r"^(?P<stack>(?:.+?\.)?(?:layers|encoder\.layer|h))\.(?P<number>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class Outline:
    """The tensors of a merged model, before adapters are merged into them.

    Attributes:
        specs: the model's tensors.
        sources: the base tensor from which each tensor is made; several may be made from one.
        config: settings of config.json that must change.
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
        """For each base tensor, the merged tensor from which unmerge restores it: the one of the same name if it was
        made from it, else the first that was."""
        found: dict[str, str] = {}
        for name, source in self.sources.items():
            if name == source or source not in found:
                found[source] = name
        return found

    @property
    def surplus(self) -> frozenset[str]:
        """Tensors that unmerge leaves out."""
        return frozenset(self.sources) - frozenset(self.origins.values())

    @property
    def renamed(self) -> dict[str, str]:
        """Tensors that unmerge renames, with the base's name of each."""
        return {name: source for source, name in self.origins.items() if name != source}


def outline_of(model: str | Path, adapters: Sequence[Path], base: Mapping[str, TensorSpec], *, untie: bool) -> Outline:
    """The outline of a base merged with these adapters.

    Args:
        model: the base's path; the config.json in its folder says which tensors are tied.
        adapters: the adapters' paths.
        base: the base's tensors.
        untie: whether a head that is tied to the embedding becomes a tensor of its own.

    Raises:
        NotMergeable: the adapters were made for different depths, replication would drop layers, or there is no tied
            head to untie.
        Unsupported: the base does not have exactly one stack of layers to replicate.
    """
    outline = _replicated(model, adapters, base)
    if not untie:
        return outline
    heads = tied_head(model, outline.specs)
    if not heads:
        raise NotMergeable(
            "the base ties no head to its embedding, according to its config.json and transformers",
            where=model,
            then="merge without --untie",
        )
    sources = {**outline.sources, **{head: outline.sources[embedding] for head, embedding in heads.items()}}
    return Outline(_specs(sources, base), sources, {**outline.config, TIED: False})


def tied_head(model: str | Path, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The head's tensor that the file lacks, and the embedding's tensor to which it is tied, by the file's names. Empty
    if there is no tied head, or transformers does not know the model."""
    path = Path(model)
    built = meta_model(path if path.is_dir() else path.parent)
    tied = getattr(built, "all_tied_weights_keys", None)
    if built is None or not isinstance(tied, Mapping):
        return {}
    output = built.get_output_embeddings()
    heads = {f"{name}.weight" for name, module in built.named_modules() if module is output}
    stored = {known: name for name, known in known_names(built, specs)[0].items()}
    return {
        head: stored[source]
        for head, source in tied.items()
        if head in heads and head not in specs and source in stored
    }


def head_is_tied(head: str, embedding: str, model: str | Path) -> NotMergeable:
    """The error for an adapter that changes a tied head if --untie was not given."""
    return NotMergeable(
        "the adapter changes only the head, which the base ties to its embedding: one tensor cannot hold both",
        where=model,
        found=f"{head}, stored as {embedding}",
        then="merge with --untie: the head becomes a tensor of its own, and config.json says so",
    )


def _replicated(model: str | Path, adapters: Sequence[Path], base: Mapping[str, TensorSpec]) -> Outline:
    """The base with its layers repeated as the adapters' configs say (LoraConfig.layer_replication)."""
    maps = {path: _layer_map(path) for path in adapters}
    chosen = {text for text in maps.values() if text}
    if not chosen:
        return Outline.plain(base)
    if len(chosen) > 1 or "" in maps.values():
        raise NotMergeable(
            "the adapters were made for models of different depth",
            where=", ".join(map(str, maps)),
            found="; ".join(f"layer_replication {text or 'none'}" for text in maps.values()),
            then="merge them one after the other, or each into a base of its own",
        )
    ranges = json.loads(chosen.pop())
    stack, depth = _layers(model, base)
    order = _order(ranges, depth)
    if set(order) != set(range(depth)):
        raise NotMergeable(
            "layer_replication leaves out layers of the base, which unmerge could not restore, or names some it lacks",
            where=adapters[0],
            expected=f"every layer from 0 to {depth - 1}, in ranges [first, last + 1]",
            found=ranges,
            then="check that the adapter was made for this base, or merge it with peft",
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
    path = Path(model)
    file = (path if path.is_dir() else path.parent) / CONFIG
    config = parsed_config(file.read_bytes(), file) if file.exists() else {}
    return Outline(_specs(sources, base), sources, _deeper(config, order, depth))


def _specs(sources: Mapping[str, str], base: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    return {name: replace(base[source], name=name) for name, source in sources.items()}


def _order(ranges: Any, depth: int) -> list[int]:
    """The base's layer at each place; empty if `ranges` is not a list of ranges within the depth."""
    sound = isinstance(ranges, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(end) is int and 0 <= end <= depth for end in pair)
        for pair in ranges
    )
    return [number for first, last in ranges for number in range(first, last)] if sound else []


def _layer_map(path: Path) -> str:
    checkpoint, config = open_adapter_file(path)
    checkpoint.close()
    ranges = (config or {}).get("layer_replication")
    return json.dumps(ranges) if ranges else ""


def _layers(model: str | Path, base: Mapping[str, TensorSpec]) -> tuple[str, int]:
    """The model's stack of layers, and its depth. Raises Unsupported if there is not exactly one stack."""
    numbers: dict[str, set[int]] = {}
    for name in base:
        if match := _LAYER.match(name):
            numbers.setdefault(match["stack"], set()).add(int(match["number"]))
    if len(numbers) != 1:
        raise Unsupported(
            "the base does not have exactly one stack of layers, so it is unclear which ones layer_replication repeats",
            where=model,
            expected="one stack of layers, as in Llama, BERT and Falcon",
            found=", ".join(sorted(numbers)) or "none",
            then="merge this adapter with peft",
        )
    ((stack, found),) = numbers.items()
    return stack, max(found) + 1


def _deeper(config: Mapping[str, Any], order: Sequence[int], depth: int) -> dict[str, Any]:
    """The settings of a config that change: the number of layers, and lists with one entry per layer."""
    keys = [key for key in _DEPTHS if config.get(key) == depth] or _DEPTHS[:1]
    changed: dict[str, Any] = dict.fromkeys(keys, len(order))
    for key in _BY_LAYER:
        if isinstance(config.get(key), list) and len(config[key]) == depth:
            changed[key] = [config[key][number] for number in order]
    return changed
