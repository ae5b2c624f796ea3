"""Builds the config of a LoRA in peft's names that is computed from other adapters.

Settings on which the adapters agree are kept (the task, the base's name, what is saved in full). Ranks, alphas and the
choice of modules are rewritten. This module does no mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from formats.dialects.peft_factors import PREFIX
from formats.dialects.peft_parameters import unwrapped
from formats.dialects.peft_writing import exactly, rank_settings
from formats.spec import TensorRef

_CHOOSING = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")


def module_of(key: str) -> str:
    """The model's name of the module to which a key of lora_A or lora_embedding_A belongs."""
    path = key.removeprefix(PREFIX).removesuffix(".weight")
    return unwrapped(path.rpartition(".")[0])[0]


def adapted_module(factors: Mapping[str, TensorRef]) -> str:
    """The model's name of the module to which factors of any method belong, given their roles."""
    for role, ref in sorted(factors.items()):
        path = ref.name.removeprefix(PREFIX)
        if ref.name.startswith(PREFIX) and path.endswith(f".{role}"):
            return unwrapped(path.removesuffix(f".{role}"))[0]
    return module_of(next(ref.name for role, ref in factors.items() if role != "weight"))


def recast_config(
    configs: Sequence[Mapping[str, Any]],
    modules: Sequence[frozenset[str]],
    ranks: Mapping[str, int],
    parameters: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """The adapter_config.json of a LoRA that is computed from these adapters.

    Args:
        configs: the adapters' configs.
        modules: what each adapter adapts: modules, and parameters by their full names.
        ranks: rank of every adapted module and parameter. The scaling is 1, so alpha equals the rank.
        parameters: which of these are parameters.
    """
    first = configs[0]
    config = {name: value for name, value in first.items() if all(each.get(name) == value for each in configs)}
    said = {name for name in _CHOOSING if any(each.get(name) for each in configs)}
    if len(set(modules)) > 1 or not said <= config.keys():
        layers = [module for module in ranks if module not in parameters]
        config |= dict.fromkeys(_CHOOSING)
        config |= {
            "target_modules": exactly(layers) if layers or not parameters else [],
            "target_parameters": sorted(parameters) or None,
        }
    saved = sorted({name for each in configs for name in each.get("modules_to_save") or ()})
    biases = {each.get("bias", "none") for each in configs}
    indices = [each["trainable_token_indices"] for each in configs if each.get("trainable_token_indices")]
    config |= {
        "peft_type": "LORA",
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "task_type": config.get("task_type"),
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": saved or None,
        "bias": biases.pop() if len(biases) == 1 else "all",
        "fan_in_fan_out": any(each.get("fan_in_fan_out") for each in configs),
        "trainable_token_indices": indices[0] if indices else None,
    }
    return config | rank_settings(ranks, max(ranks.values()))
