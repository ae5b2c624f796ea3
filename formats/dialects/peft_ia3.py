"""Writes (IA)³ in peft's names, with its config. Tested against peft itself. This module does no mathematics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from formats.adapter import Adapter, AdapterModule
from formats.dialects.ia3_forms import multiple, scales_bias
from formats.dialects.peft_factors import PREFIX
from formats.dialects.peft_writing import exactly
from formats.dialects.writing import Piece, Wanted, cannot, taken
from formats.layers import LayerKind, owner


def ia3_form(adapter: Adapter, wanted: Wanted) -> tuple[tuple[Piece, ...], dict[str, Any]]:
    """The tensors and adapter_config.json of an adapter whose layers all have (IA)³. peft scales biases with them."""
    modules = [module for module in adapter.modules if module.target.endswith(".weight")]
    for module in modules:
        if module.method == "lycoris_ia3" and scales_bias(module, wanted.base):
            raise cannot("peft", "(IA)³ that scales outputs but not the bias: peft's (IA)³ scales both", module)
    layers = {owner(module.target): bool(_of_inputs(module)) for module in modules}
    config: dict[str, Any] = {
        "peft_type": "IA3",
        "task_type": None,
        "base_model_name_or_path": wanted.base_name,
        "inference_mode": True,
        "target_modules": exactly(layers),
        "feedforward_modules": exactly(layer for layer, scales_inputs in layers.items() if scales_inputs) or [],
        "fan_in_fan_out": any(module.kind is LayerKind.TRANSPOSED for module in modules),
        "init_ia3_weights": True,
    }
    return tuple(_vector(module, wanted) for module in modules), config


def _of_inputs(module: AdapterModule) -> Any:
    return module.settings["on_input" if module.method == "lycoris_ia3" else "feedforward"]


def _vector(module: AdapterModule, wanted: Wanted) -> Piece:
    """The factors of all outputs or inputs. If a fused layer has them for some slices only, the other slices are scaled
    by alpha alone."""
    key = f"{PREFIX}{owner(module.target)}.ia3_l"
    if module.method == "lycoris_ia3":
        return multiple(key, module, wanted.base[module.target])
    ref, enabled = module.factors["ia3_l"], module.settings.get("enabled", (True,))
    if all(enabled):
        return taken(key, ref, factor=module.scaling)
    left = iter(range(sum(enabled)))
    laid = tuple(next(left) if on else None for on in enabled)
    size = ref.spec.size // sum(enabled) * len(enabled)
    return replace(taken(key, ref, (size, 1), module.scaling), laid=laid, fill=module.scaling)
