"""Writing peft's names and config. Tested against peft itself.

Gives the keys and the config for which peft rebuilds exactly the modules that were adapted; `peft` is the way back.
Knows no mathematics.
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
        module: its path.
        parameters: the adapted ones in the order in which the module registers them, which peft nests them by.
    """
    depths = range(len(parameters) - 1, -1, -1)
    return {
        name: factor_keys(module + depth * f".{WRAPPED}", LayerKind.PARAMETER)
        for name, depth in zip(parameters, depths, strict=True)
    }


def bias_key(module: str) -> str:
    """The key of the change of a layer's bias, with which peft's `lora_bias` adds to it as B does to the weight."""
    return f"{PREFIX}{module}.lora_B.bias"


def magnitude_key(module: str) -> str:
    """The key of a layer's magnitudes (`use_dora`)."""
    return f"{PREFIX}{module}.lora_magnitude_vector"


def magnitude_shape(kind: LayerKind, weight: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which peft stores the magnitudes of a weight of this shape: one for each output."""
    if kind is LayerKind.CONV:
        return (1, weight[0], *(1,) * (len(weight) - 2))
    return weight[:1] if kind is LayerKind.LINEAR else weight[1:]


def full_key(tensor: str, *, wrappers: int) -> str:
    """The key of a tensor carried in full.

    Args:
        tensor: its name in the model.
        wrappers: how many times peft wraps the module that holds it: once where it adapts the layer, once for each
            parameter that it adapts.
    """
    module, _, last = tensor.rpartition(".")
    return f"{PREFIX}{module}{wrappers * f'.{WRAPPED}'}.{last}" if module else f"{PREFIX}{last}"


@dataclass(frozen=True)
class Extracted:
    """What a config must describe: every module's rank, what goes along in full, and how the base is built."""

    ranks: Mapping[str, int]  # adapted modules; the scaling is 1, so alpha is the rank
    saved: tuple[str, ...]  # modules carried in full
    biases: bool  # whether biases are carried in full
    transposed: bool  # whether adapted layers store (in, out)
    modules: frozenset[str]  # every module of the model
    rank: int
    base: str
    parameters: Mapping[str, int] = field(default_factory=dict)  # adapted parameters by full name, with their ranks
    lora_bias: bool = False  # whether every adapted layer comes with the change of its bias
    dora: bool = False  # whether every adapted layer comes with a magnitude
    alphas: Mapping[str, float] = field(default_factory=dict)  # of adapted modules, where the scaling is not 1


def lora_config(extracted: Extracted) -> dict[str, Any]:
    """The adapter_config.json for which peft rebuilds exactly these modules."""
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
    """What a config says of ranks and alphas where the scaling is 1, so that alpha is the rank.

    Args:
        ranks: of every adapted module, and of every adapted parameter by its full name.
        common: the rank that the others are exceptions from.
    """
    pattern = pattern_of(ranks, common)
    settings = {"r": common, "lora_alpha": common, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    return {**settings, "use_rslora": False}


def exactly(modules: Iterable[str]) -> str:
    """The regular expression by which `target_modules` names just these modules, whatever others a model has."""
    return "|".join(re.escape(module) for module in sorted(modules))


def commonest(values: Iterable[float]) -> Any:
    """The value that occurs most often, the smallest of several; a whole number as an int."""
    counts = Counter(values)
    value = min(counts, key=lambda each: (-counts[each], each))
    return int(value) if value == int(value) else value


def target_names(targets: list[str], modules: frozenset[str]) -> list[str] | str:
    """Full names; a regular expression where a name is also the tail of a module that was not adapted."""
    stray = caught_by_tail(targets, modules)
    return exactly(targets) if stray or not targets else targets


def caught_by_tail(names: Iterable[str], modules: Iterable[str]) -> set[str]:
    """Modules outside `names` whose dotted tail is one of them: peft, which matches tails, would take them too."""
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
    """Modules and parameters whose rank or alpha is not the common one, longest name first: peft takes the first
    pattern that matches a tail, so whoever would be caught by another's pattern gets one of its own before it."""
    pattern = {module: value for module, value in values.items() if value != common}
    caught = {
        module: value
        for module, value in values.items()
        if module not in pattern and first_match(pattern, module, value) != value
    }
    ordered = sorted((pattern | caught).items(), key=lambda item: (-len(item[0]), item[0]))
    return {re.escape(module): int(value) if value == int(value) else value for module, value in ordered}
