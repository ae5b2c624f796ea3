"""Finds the kind of layer that owns a weight, from names and shapes alone.

A linear layer stores (out, in), GPT-2's Conv1D stores (in, out), an embedding stores (vocabulary, width), a convolution
stores (out, in / groups, *kernel), and their adapters differ in layout. No list of architectures is needed: the
evidence is the number of dimensions, then the length of the bias, then neighbouring layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum

from formats.spec import TensorSpec

_EMBEDDING = re.compile(r"emb|^(wte|wpe|shared|relative_attention_bias)$", re.IGNORECASE)


class LayerKind(StrEnum):
    """How a layer stores its weight."""

    LINEAR = "linear"  # (out, in)
    TRANSPOSED = "transposed"  # (in, out)
    EMBEDDING = "embedding"  # (vocabulary, width)
    CONV = "conv"  # (out, in / groups, *kernel)
    PARAMETER = "parameter"  # not a layer's weight: (rows, columns), or (experts, rows, columns)


def owner(tensor: str) -> str:
    """The module that holds a tensor: the tensor's name without its last part. Empty at the root."""
    return tensor.rpartition(".")[0]


def ancestors(module: str) -> list[str]:
    """The modules that contain a module, outermost first."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def layer_kinds(specs: Mapping[str, TensorSpec]) -> dict[str, LayerKind]:
    """The kind of every module with a `.weight` of two to five dimensions, by module name.

    A weight with more than two dimensions counts as a convolution's: names alone cannot identify a stack of experts
    called `weight`. The length of the bias shows which side is the output. A square weight with a bias leaves that
    open; such a layer is assumed to be stored like its nearest neighbours whose bias did show it. Without any evidence,
    a layer is linear.
    """
    told, square = _evidence(specs)
    votes = _votes(told, specs)
    return told | {module: _nearest_vote(module, votes) or LayerKind.LINEAR for module in square}


def untold(specs: Mapping[str, TensorSpec]) -> frozenset[str]:
    """Modules with a square weight whose layout, (out, in) or (in, out), no neighbouring layer reveals either."""
    told, square = _evidence(specs)
    votes = _votes(told, specs)
    return frozenset(module for module in square if _nearest_vote(module, votes) is None)


def _evidence(specs: Mapping[str, TensorSpec]) -> tuple[dict[str, LayerKind], list[str]]:
    """The modules whose own tensors show their kind, and those with a square weight and a bias, which do not."""
    told: dict[str, LayerKind] = {}
    square: list[str] = []
    for name, spec in specs.items():
        module, _, last = name.rpartition(".")
        if last != "weight" or not 2 <= len(spec.shape) <= 5:
            continue
        if len(spec.shape) > 2:
            told[module] = LayerKind.CONV
            continue
        bias = specs.get(f"{module}.bias")
        if bias is None and _EMBEDDING.search(module.rpartition(".")[2]):
            told[module] = LayerKind.EMBEDDING
        elif bias is not None and spec.shape[0] == spec.shape[1]:
            square.append(module)
        elif bias is not None and bias.shape == spec.shape[1:]:
            told[module] = LayerKind.TRANSPOSED
        else:
            told[module] = LayerKind.LINEAR
    return told, square


def _votes(told: Mapping[str, LayerKind], specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """For every scope, the number of transposed minus linear layers in it, counting layers that have a bias."""
    votes: dict[str, int] = {}
    for module, kind in told.items():
        if kind not in (LayerKind.LINEAR, LayerKind.TRANSPOSED) or f"{module}.bias" not in specs:
            continue
        scope = module
        while scope:
            scope = owner(scope)
            votes[scope] = votes.get(scope, 0) + (1 if kind is LayerKind.TRANSPOSED else -1)
    return votes


def _nearest_vote(module: str, votes: Mapping[str, int]) -> LayerKind | None:
    scope = module
    while scope:
        scope = owner(scope)
        if votes.get(scope):
            return LayerKind.TRANSPOSED if votes[scope] > 0 else LayerKind.LINEAR
    return None
