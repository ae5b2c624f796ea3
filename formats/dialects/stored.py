"""Maps between a model's tensors in memory and in its file, where transformers stores them differently.

In files, transformers stores experts one by one instead of stacked, and some layers under older names. An adapter made
with transformers 5 uses the names in memory; the base's file has the names that transformers writes
(transformers.conversion_mapping, 5.23). This module covers what mixtures of experts need. It is used only for names
that the base's file does not have. It knows no dialect and does no mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from formats.adapter import AdapterModule, ExpertPart, Replacement
from formats.errors import AdapterFormatError
from formats.spec import TensorSpec

# A stack in memory, and the layers of one expert that it concatenates by rows, under each of the names in use.
_STACKS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
}
_EXPERT = re.compile(r"^(?P<experts>.*\bexperts)\.(?P<number>\d+)\.(?P<layer>\w+)\.weight$")
# Names in a file, and the names in memory: Granite's, then Mixtral's.
_RENAMED = (
    (re.compile(r"\bblock_sparse_moe\.input_linear\.weight$"), "block_sparse_moe.experts.gate_up_proj"),
    (re.compile(r"\bblock_sparse_moe\.output_linear\.weight$"), "block_sparse_moe.experts.down_proj"),
    (re.compile(r"\bblock_sparse_moe\.router\.layer\.weight$"), "block_sparse_moe.router.weight"),
    (re.compile(r"\bblock_sparse_moe\."), "mlp."),
)


@dataclass(frozen=True)
class Stored:
    """A tensor as the model holds it in memory.

    Attributes:
        spec: the tensor in memory.
        pieces: the file's tensors that it consists of, and which part of it each one is (None for the whole).
    """

    spec: TensorSpec
    pieces: tuple[tuple[str, ExpertPart | None], ...]


def held(base: Mapping[str, TensorSpec], names: Mapping[str, str]) -> dict[str, Stored]:
    """The tensors that a model of this base may hold under names that the base's file does not have.

    Args:
        base: the base's tensors.
        names: the model's names of renamed tensors, by their names in the base's file.
    """
    experts: dict[str, dict[str, list[TensorSpec]]] = {}
    found: dict[str, Stored] = {}
    for name in sorted(base, key=_naturally):
        match = _EXPERT.match(name)
        if match:
            layers = experts.setdefault(match["experts"], {}).setdefault(match["layer"], [])
            if int(match["number"]) == len(layers):
                layers.append(base[name])
        for memory in [*_memory_names(name), *({names[name]} if name in names else ())]:
            found[memory] = Stored(replace(base[name], name=memory), ((name, None),))
    for holder, by_layer in experts.items():
        for stack, choices in _STACKS.items():
            for choice in choices:
                if all(layer in by_layer for layer in choice):
                    for name in (f"{holder}.{stack}", *_memory_names(f"{holder}.{stack}")):
                        found |= _stacked(name, [by_layer[layer] for layer in choice])
    return {name: stored for name, stored in found.items() if name not in base}


def in_the_file(adapted: Iterable[AdapterModule], stored: Mapping[str, Stored]) -> list[AdapterModule]:
    """The adapted weights under the names, and in the pieces, of the base's file."""
    named = {name: tensor.pieces[0][0] for name, tensor in stored.items() if len(tensor.pieces) == 1}
    return [
        replace(module, target=tensor, part=part, reads=named.get(module.reads or "", module.reads))
        for module in adapted
        for tensor, part in (stored[module.target].pieces if module.target in stored else ((module.target, None),))
    ]


def whole_in_the_file(replaced: Iterable[Replacement], stored: Mapping[str, Stored]) -> list[Replacement]:
    """The replaced tensors under the file's names. Raises AdapterFormatError for a stack that the file has in
    pieces."""
    found = []
    for full in replaced:
        pieces = stored[full.target].pieces if full.target in stored else ((full.target, None),)
        if len(pieces) > 1:
            raise AdapterFormatError(
                "the adapter replaces a stack of experts that the base's file stores as separate tensors",
                where=full.target,
                expected="factors",
                found=f"{len(pieces)} tensors, {pieces[0][0]} the first",
                then="train the experts with LoRA (target_parameters), without modules_to_save",
            )
        found.append(replace(full, target=pieces[0][0]))
    return found


def _naturally(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _memory_names(name: str) -> list[str]:
    return [re.sub(pattern, memory, name) for pattern, memory in _RENAMED if pattern.search(name)]


def _stacked(name: str, layers: list[list[TensorSpec]]) -> dict[str, Stored]:
    """The stack of these layers, each given for every expert; empty if their shapes do not agree."""
    count = len(layers[0])
    shapes = [{spec.shape for spec in experts} for experts in layers]
    if not all(len(experts) == count for experts in layers) or not all(len(shape) == 1 for shape in shapes):
        return {}
    pieces: list[tuple[str, ExpertPart | None]] = []
    first = 0
    for experts in layers:
        last = first + experts[0].shape[0]
        pieces += [(spec.name, ExpertPart(number, first, last, name)) for number, spec in enumerate(experts)]
        first = last
    if any(len(experts[0].shape) != 2 or experts[0].shape[1] != layers[0][0].shape[1] for experts in layers):
        return {}
    spec = TensorSpec(name, layers[0][0].dtype, (count, first, layers[0][0].shape[1]))
    return {name: Stored(spec, tuple(pieces))}
