"""Turns the factors of one module in a peft file into adapted weights, with the config's rank and alpha.

This covers layers whose weight peft finds by the layer's class. `peft_parameters` covers parameters that a config
names. This module does no mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from formats.adapter import AdapterModule
from formats.dialects.resolve import Rename, unmatched_keys
from formats.errors import AdapterFormatError, ShapeMismatch
from formats.layers import LayerKind, layer_kinds, owner
from formats.spec import TensorRef, TensorSpec, shape_text

PREFIX = "base_model.model."
Factors = dict[str, TensorRef]  # of one module, by role
_FUSED = "in_proj_weight"  # of torch's MultiheadAttention, whose own factors these are
_INSIDE = "out_proj"  # its layer, which peft adapts along with it


@dataclass(frozen=True)
class Context:
    """The context for reading a module: the config, the base, and the mapping from the adapter's to the base's names.

    Attributes:
        config: the adapter's config.
        rename: maps a name in the adapter to the base's.
        base: the base's tensors.
        kinds: the kind of every layer of the base.
        where: the adapter's file, for errors.
    """

    config: Mapping[str, Any]
    rename: Rename
    base: Mapping[str, TensorSpec]
    kinds: Mapping[str, LayerKind]
    where: str

    @classmethod
    def of(cls, config: Mapping[str, Any], rename: Rename, base: Mapping[str, TensorSpec], where: str) -> Context:
        """The context of one adapter and one base."""
        return cls(config, rename, base, layer_kinds(base), where)

    def rank(self, name: str) -> int:
        """The rank of a module or parameter."""
        return int(first_match(self.config.get("rank_pattern"), name, self.config.get("r", 8)))

    def alpha(self, name: str) -> float:
        """The alpha of a module or parameter."""
        return float(first_match(self.config.get("alpha_pattern"), name, self.config.get("lora_alpha", 8)))

    @property
    def rslora(self) -> bool:
        """Whether the scaling is alpha/√rank."""
        return bool(self.config.get("use_rslora"))


def first_match(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module's name or a tail of it, as peft resolves patterns."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def weight_names(modules: Iterable[str], base: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The weight that each module's factors adapt. torch's MultiheadAttention has query, key and value in one."""
    fused = [name for name in base if name.endswith(f".{_FUSED}")]
    found = {}
    for module in modules:
        name = f"{module}.{_FUSED}"
        there = any(name == other or other.endswith(f".{name}") or name.endswith(f".{other}") for other in fused)
        found[module] = name if there else f"{module}.weight"
    return found


def layer_modules(module: str, factors: Factors, context: Context, weights: Mapping[str, str]) -> list[AdapterModule]:
    """The adapted weight of a layer and, with `lora_bias`, its bias. `weights` gives each adapted module's weight.

    The out_proj inside an adapted attention has the attention's rank and alpha. peft adds its product twice, both in
    training and in merging (lora.MultiheadAttention.merge, peft 0.21), so its factors were trained for that.
    """
    holder, _, last = module.rpartition(".")
    inside = last == _INSIDE and weights.get(holder, "").endswith(_FUSED)
    name, times = (holder, 2) if inside else (module, 1)
    embedding = "lora_embedding_A" in factors or "lora_embedding_B" in factors
    roles = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    a, b = pair(factors, roles, f"{context.where}: {module}")
    rank, alpha, rslora = context.rank(name), times * context.alpha(name), context.rslora
    target = context.rename(weights[module])
    if not (len(a.spec.shape) == len(b.spec.shape) >= 2 and a.spec.shape[0] == b.spec.shape[1] == rank):
        _check_groups(a.spec, b.spec, context.base[target], rank)
        raise AdapterFormatError(
            "the factors' rank contradicts the config",
            where=f"{context.where}: {module}",
            expected=f"r = {rank}",
            found=_shapes(a, b),
            then="save the adapter again, from the library that trained it",
        )
    kind = _kind(embedding, a.spec.shape, b.spec.shape, context.base[target], context)
    if kind is None:
        raise ShapeMismatch(
            "the adapter does not fit the base's weight",
            where=f"{context.where}: {target}",
            expected=f"the base's {shape_text(context.base[target].shape)}",
            found=_shapes(a, b),
            then="check that the adapter was made for this base",
        )
    named = {"lora_A": a, "lora_B": b}
    magnitude = factors.get("lora_magnitude_vector")
    if (magnitude is not None) != bool(context.config.get("use_dora")):
        raise AdapterFormatError(
            "use_dora in the config and the magnitudes in the file contradict each other",
            where=f"{context.where}: {module}",
            expected="lora_magnitude_vector in every module with use_dora, and in none without",
            found=f"use_dora = {context.config.get('use_dora')}, {', '.join(sorted(factors))}",
            then="use the adapter_config.json that was saved with these weights",
        )
    if magnitude is not None:
        named["lora_magnitude_vector"] = magnitude
    method = "dora" if magnitude is not None else "lora"
    found = [AdapterModule(target, method, kind, named, rank, alpha, rslora)]
    if "lora_B.bias" in factors:
        target = context.rename(f"{module}.bias")
        if target not in context.base:
            raise unmatched_keys([target], 1, context.base, context.where)
        bias = {"lora_B.bias": factors["lora_B.bias"]}
        found.append(AdapterModule(target, "lora_bias", kind, bias, rank, alpha, rslora))
    return found


def pair(factors: Factors, roles: tuple[str, str], where: str) -> tuple[TensorRef, TensorRef]:
    """Both factors. Raises AdapterFormatError if one is missing."""
    for role in roles:
        if role not in factors:
            raise AdapterFormatError(
                "one factor of a pair is missing",
                where=where,
                expected=" and ".join(roles),
                found=list(factors),
                then="save the adapter again, from the library that trained it",
            )
    return factors[roles[0]], factors[roles[1]]


def _shapes(a: TensorRef, b: TensorRef) -> str:
    return f"lora_A {shape_text(a.spec.shape)}, lora_B {shape_text(b.spec.shape)}"


def _check_groups(a: TensorSpec, b: TensorSpec, weight: TensorSpec, rank: int) -> None:
    """Refuses LoRA on a grouped convolution. peft's A (rank, in, *kernel) reads every channel and its B
    (out, rank / groups, 1, …) is grouped, so BA connects channels that the weight (out, in / groups, …) does not."""
    dims = len(weight.shape)
    if dims < 3 or not len(a.shape) == len(b.shape) == dims or a.shape[0] != rank:
        return
    groups = a.shape[1] // weight.shape[1]
    if groups > 1 and b.shape[1] * groups == rank and a.shape[1] == weight.shape[1] * groups:
        raise AdapterFormatError(
            "LoRA on a grouped convolution connects channels of different groups, which the convolution's weight "
            "cannot express; peft does not merge it either",
            where=weight.name,
            expected="1 group",
            found=f"{groups} groups",
            then="load base and adapter with peft instead, or train without this layer",
        )


def _kind(
    embedding: bool, a: tuple[int, ...], b: tuple[int, ...], weight: TensorSpec, context: Context
) -> LayerKind | None:
    """How the base stores the weight that factors of these shapes belong to; None if they do not fit it."""
    if len(a) > 2:
        return LayerKind.CONV if weight.shape == (b[0], *a[1:]) and set(b[2:]) == {1} else None
    shape = (b[0], a[1])  # (out, in)
    if embedding:
        return LayerKind.EMBEDDING if weight.shape == shape[::-1] else None
    fits, fits_transposed = weight.shape == shape, weight.shape == shape[::-1]
    if fits and fits_transposed:  # square: neighbours say it for this layer, the config only for all layers at once
        neighbours = context.kinds.get(owner(weight.name), LayerKind.LINEAR)
        told = any(kind is LayerKind.TRANSPOSED for kind in context.kinds.values())
        fits_transposed = neighbours is LayerKind.TRANSPOSED if told else bool(context.config.get("fan_in_fan_out"))
        return LayerKind.TRANSPOSED if fits_transposed else LayerKind.LINEAR
    return LayerKind.LINEAR if fits else LayerKind.TRANSPOSED if fits_transposed else None
