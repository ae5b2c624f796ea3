"""The layers into which the library adapters puts bottlenecks and prefixes, by their names in the model's file.

Taken from the models' mixins and layers (adapters 1.3), and tested on each model. This module holds plain data; it
knows no adapter and no mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from formats.spec import TensorSpec

ATTENTION, MLP = "mh_adapter", "output_adapter"  # the config's names for where bottlenecks go


@dataclass(frozen=True)
class LayerPlace:
    """Where a layer may have a bottleneck. All paths are relative to the layer.

    Attributes:
        name: ATTENTION or MLP.
        holder: the module that holds the bottleneck in the library.
        behind: the projection whose output h the bottleneck follows.
        norm: the norm of h + r, with the residual r, in models whose norms follow; in other models the norm of r.
        first: the first projection of the MLP; empty for an attention.
    """

    name: str
    holder: str
    behind: str
    norm: str
    first: str = ""


@dataclass(frozen=True)
class ModelLayout:
    """A family of models whose layers have the same names.

    Attributes:
        types: the model types in the family.
        numbered: the path before a layer's number.
        places: where each layer may have bottlenecks.
        norm_behind: whether the norms apply to h plus the residual (post-norm) rather than to the residual before the
            sublayer (pre-norm).
        keys: the projection that computes the attention's keys; empty if the keys are as wide as the model.
    """

    types: tuple[str, ...]
    numbered: str
    places: tuple[LayerPlace, ...]
    norm_behind: bool
    keys: str = ""

    @property
    def path(self) -> str:
        """A regular expression for a layer's path."""
        return rf"(?P<path>(?:\w+\.)?{re.escape(self.numbered)}\.(?P<number>\d+)\.)"

    def layers(self, base: Mapping[str, TensorSpec], place: LayerPlace) -> Iterator[tuple[int, str]]:
        """The number and path of each layer of a base that has this place."""
        pattern = re.compile(self.path + re.escape(f"{place.behind}.weight"))
        for name in base:
            match = pattern.fullmatch(name)
            if match and f"{match['path']}{place.norm}.weight" in base and not self._others(match["path"], base):
                yield int(match["number"]), match["path"]

    def _others(self, path: str, base: Mapping[str, TensorSpec]) -> bool:
        """Whether a layer computes its sums differently, which Gemma's post-norms and BEiT's factors show."""
        return any(f"{path}{name}" in base for name in _OTHERS)


_OTHERS = ("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight", "lambda_1")
LAYOUTS = (
    ModelLayout(
        ("bert", "roberta", "xlm-roberta", "electra", "bert-generation"),
        "encoder.layer",
        (
            LayerPlace(ATTENTION, "attention.output", "attention.output.dense", "attention.output.LayerNorm"),
            LayerPlace(MLP, "output", "output.dense", "output.LayerNorm", "intermediate.dense"),
        ),
        True,
    ),
    ModelLayout(
        ("distilbert",),
        "transformer.layer",
        (
            LayerPlace(ATTENTION, "attention_adapters", "attention.out_lin", "sa_layer_norm"),
            LayerPlace(MLP, "output_adapters", "ffn.lin2", "output_layer_norm", "ffn.lin1"),
        ),
        True,
    ),
    ModelLayout(
        ("vit",),
        "encoder.layer",
        (
            LayerPlace(ATTENTION, "attention_adapters", "attention.output.dense", "layernorm_before"),
            LayerPlace(MLP, "output.output_adapters", "output.dense", "layernorm_after", "intermediate.dense"),
        ),
        False,
    ),
    ModelLayout(
        ("gpt2",),
        "h",
        (
            LayerPlace(ATTENTION, "attention_adapters", "attn.c_proj", "ln_1"),
            LayerPlace(MLP, "output_adapters", "mlp.c_proj", "ln_2", "mlp.c_fc"),
        ),
        False,
    ),
    ModelLayout(
        ("llama", "mistral"),
        "layers",
        (
            LayerPlace(ATTENTION, "attention_adapters", "self_attn.o_proj", "input_layernorm"),
            LayerPlace(MLP, "output_adapters", "mlp.down_proj", "post_attention_layernorm", "mlp.up_proj"),
        ),
        False,
        "self_attn.k_proj",
    ),
)


def layout_of(base: Mapping[str, TensorSpec]) -> ModelLayout | None:
    """The layout of a base's layers; None if no known model has these names and norms."""
    return next(
        (each for each in LAYOUTS if any(next(each.layers(base, place), None) for place in each.places)),
        None,
    )
