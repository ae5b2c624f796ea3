"""Writes peft's names and config. Tested against peft itself.

Chooses keys and a config for which peft rebuilds exactly the modules that were adapted; `peft` reads them. This module
does no mathematics.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from formats.dialects.peft_factors import PREFIX, first_match
from formats.dialects.peft_parameters import WRAPPED
from formats.layers import LayerKind


def factor_keys(module: str, kind: LayerKind) -> tuple[str, str]:
    """The keys of a layer's lora_A and lora_B. For a parameter see `parameter_keys`."""
    a, b = (
        ("lora_embedding_A", "lora_embedding_B") if kind is LayerKind.EMBEDDING else ("lora_A.weight", "lora_B.weight")
    )
    return f"{PREFIX}{module}.{a}", f"{PREFIX}{module}.{b}"


def parameter_keys(module: str, parameters: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The keys of the factors of a module's adapted parameters (`target_parameters`), by parameter.

    Args:
        module: the module's path.
        parameters: the adapted parameters in the order in which the module registers them: peft nests them in this
            order.
    """
    depths = range(len(parameters) - 1, -1, -1)
    return {
        name: factor_keys(module + depth * f".{WRAPPED}", LayerKind.PARAMETER)
        for name, depth in zip(parameters, depths, strict=True)
    }


def bias_key(module: str) -> str:
    """The key of the change of a layer's bias (`lora_bias`), which peft scales like BA."""
    return f"{PREFIX}{module}.lora_B.bias"


def magnitude_key(module: str) -> str:
    """The key of a layer's magnitudes (`use_dora`)."""
    return f"{PREFIX}{module}.lora_magnitude_vector"


def magnitude_shape(kind: LayerKind, weight: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which peft stores the magnitudes of a weight of this shape: one per output."""
    if kind is LayerKind.CONV:
        return (1, weight[0], *(1,) * (len(weight) - 2))
    return weight[:1] if kind is LayerKind.LINEAR else weight[1:]


def full_key(tensor: str, *, wrappers: int) -> str:
    """The key of a tensor carried in full.

    Args:
        tensor: the tensor's name in the model.
        wrappers: how many times peft wraps the module that holds it: once if it adapts the layer, and once for each
            parameter that it adapts.
    """
    module, _, last = tensor.rpartition(".")
    return f"{PREFIX}{module}{wrappers * f'.{WRAPPED}'}.{last}" if module else f"{PREFIX}{last}"


@dataclass(frozen=True)
class Extracted:
    """What a config must describe: every module's rank, what is carried in full, and how the base is built."""

    ranks: Mapping[str, int]  # rank by adapted module; the scaling is 1, so alpha equals the rank
    saved: tuple[str, ...]  # modules carried in full
    biases: bool  # whether biases are carried in full
    transposed: bool  # whether adapted layers store (in, out)
    modules: frozenset[str]  # every module of the model
    rank: int
    base: str
    parameters: Mapping[str, int] = field(default_factory=dict)  # adapted parameters by full name, with their ranks
    lora_bias: bool = False  # whether every adapted layer also changes its bias
    dora: bool = False  # whether every adapted layer has magnitudes
    alphas: Mapping[str, float] = field(default_factory=dict)  # alpha by adapted module, if scalings are not all 1


def lora_config(extracted: Extracted) -> dict[str, Any]:
    """The adapter_config.json from which peft rebuilds exactly these modules."""
    targets = sorted(extracted.ranks)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": extracted.base,
        "inference_mode": True,
        **rank_settings({**extracted.ranks, **extracted.parameters}, extracted.rank),
        "lora_dropout": 0.0,
        "use_dora": extracted.dora,
        "lora_bias": extracted.lora_bias,
        "fan_in_fan_out": extracted.transposed,
        "bias": "all" if extracted.biases else "none",
        "target_modules": [] if extracted.parameters and not targets else target_names(targets, extracted.modules),
        "target_parameters": sorted(extracted.parameters) or None,
        "modules_to_save": list(extracted.saved) or None,
        "init_lora_weights": True,
    }
    if extracted.alphas:
        config["lora_alpha"] = commonest(extracted.alphas.values())
        config["alpha_pattern"] = pattern_of(extracted.alphas, config["lora_alpha"])
    return config


def rank_settings(ranks: Mapping[str, int], common: int) -> dict[str, Any]:
    """The config's settings of ranks and alphas for a scaling of 1, where alpha equals the rank.

    Args:
        ranks: rank of every adapted module, and of every adapted parameter by its full name.
        common: the default rank, for which no pattern is needed.
    """
    pattern = pattern_of(ranks, common)
    settings = {"r": common, "lora_alpha": common, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    return {**settings, "use_rslora": False}


def exactly(modules: Iterable[str]) -> str:
    """The regular expression with which `target_modules` matches exactly these modules and no others."""
    return "|".join(re.escape(module) for module in sorted(modules))


def commonest(values: Iterable[float]) -> Any:
    """The most frequent value, the smallest if several are; a whole number is returned as an int."""
    counts = Counter(values)
    value = min(counts, key=lambda each: (-counts[each], each))
    return int(value) if value == int(value) else value


def target_names(targets: list[str], modules: frozenset[str]) -> list[str] | str:
    """The targets' full names, or a regular expression if a name is also the tail of a module that is not adapted."""
    stray = caught_by_tail(targets, modules)
    return exactly(targets) if stray or not targets else targets


def caught_by_tail(names: Iterable[str], modules: Iterable[str]) -> set[str]:
    """Modules not in `names` whose dotted tail is one of them: peft matches tails, so it would adapt them too."""
    chosen = set(names)
    caught = set()
    for module in set(modules) - chosen:
        tail = module
        while "." in tail:
            tail = tail.partition(".")[2]
            if tail in chosen:
                caught.add(module)
    return caught


def pattern_of(values: Mapping[str, float], common: float) -> dict[str, Any]:
    """Modules and parameters whose rank or alpha is not the common one, longest name first.

    peft takes the first pattern that matches a tail. So a module that another module's pattern would match gets a
    pattern of its own before it.
    """
    pattern = {module: value for module, value in values.items() if value != common}
    caught = {
        module: value
        for module, value in values.items()
        if module not in pattern and first_match(pattern, module, value) != value
    }
    ordered = sorted((pattern | caught).items(), key=lambda item: (-len(item[0]), item[0]))
    return {re.escape(module): int(value) if value == int(value) else value for module, value in ordered}
