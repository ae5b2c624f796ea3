"""The layers that the library adapters adapts with LoRA and (IA)³: query, key, value, and the two layers of the MLP.

An adapter's config chooses among them for all layers at once. Taken from the models' mixins (adapters 1.3), and tested
on BERT, DistilBERT, ViT, GPT-2 and Llama. This module knows no adapter and no mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from formats.layers import owner
from formats.spec import TensorSpec

SELFATTN, INTERMEDIATE, OUTPUT = "selfattn_lora", "intermediate_lora", "output_lora"  # settings of the config
SLICES = ("q", "k", "v")  # the attention's matrices, in the order of a fused layer
FUSED = "qkv"


@dataclass(frozen=True)
class Site:
    """A linear layer that the library can adapt.

    Attributes:
        layer: the number of the transformer layer that contains it.
        settings: the config's settings that switch it on.
        matrix: q, k or v in an attention, or qkv if they are fused; empty elsewhere.
    """

    layer: int
    settings: tuple[str, ...]
    matrix: str = ""


Inner = dict[str, tuple[tuple[str, ...], str]]  # settings and matrix by the path inside a numbered layer


def _attention(path: str, *names: str) -> Inner:
    return {f"{path}.{name}": ((SELFATTN,), matrix) for name, matrix in zip(names, SLICES, strict=True)}


def _mlp(first: str, second: str) -> Inner:
    return {first: ((INTERMEDIATE,), ""), second: ((OUTPUT,), "")}


_WORDS = ("query", "key", "value")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# The library takes Llama's up_proj for the output and its down_proj for the intermediate layer. Models that it adapts
# by a list of names have them the other way round. A config with both settings means the same to all.
_BOTH = (INTERMEDIATE, OUTPUT)
_LAYOUTS: tuple[tuple[re.Pattern[str], Inner], ...] = (
    (  # BERT, RoBERTa, ELECTRA; ViT, BEiT
        re.compile(r"(?:\w+\.)?encoder\.layer\.(\d+)\.(.+)"),
        _attention("attention.self", *_WORDS)
        | _attention("attention.attention", *_WORDS)
        | _mlp("intermediate.dense", "output.dense"),
    ),
    (  # DistilBERT
        re.compile(r"(?:distilbert\.)?transformer\.layer\.(\d+)\.(.+)"),
        _attention("attention", "q_lin", "k_lin", "v_lin") | _mlp("ffn.lin1", "ffn.lin2"),
    ),
    (  # GPT-2; GPT-J
        re.compile(r"(?:transformer\.)?h\.(\d+)\.(.+)"),
        {"attn.c_attn": ((SELFATTN,), FUSED)}
        | _attention("attn", *_PROJECTIONS)
        | _mlp("mlp.c_fc", "mlp.c_proj")
        | _mlp("mlp.fc_in", "mlp.fc_out"),
    ),
    (  # Llama, Mistral
        re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)"),
        _attention("self_attn", *_PROJECTIONS) | {f"mlp.{name}": (_BOTH, "") for name in ("up_proj", "down_proj")},
    ),
)


def sites_of(base: Mapping[str, TensorSpec]) -> dict[str, Site]:
    """The layers of a model that the library can adapt, by their names in the base's file. Empty for a model whose
    names do not fit a known layout."""
    found: dict[str, Site] = {}
    for name, spec in base.items():
        if not name.endswith(".weight") or len(spec.shape) != 2:
            continue
        for pattern, inner in _LAYOUTS:
            match = pattern.fullmatch(owner(name))
            settings, matrix = inner.get(match[2], ((), "")) if match else ((), "")
            three = 3 * min(spec.shape) == max(spec.shape)  # other fused layers have fewer keys and values than queries
            if match and settings and (matrix != FUSED or three):
                found[owner(name)] = Site(int(match[1]), settings, matrix)
    return found
