"""Reads LoRA, (IA)³, VeRA and DoRA of AdapterHub (the library adapters). Tested against files that the library wrote.

Keys are `<module>.loras.<name>.lora_A` and `lora_B`, laid out as in loralib, also for fused query, key and value.
(IA)³ has only lora_B, one factor per output. VeRA has the square matrices vera_B and vera_D per layer, and one lora_A
and lora_B that all layers share. DoRA also has m.weight. The config gives alpha and says which slices are adapted. This
module does no mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from formats.adapter import Adapter, AdapterModule, Told
from formats.checkpoint import Checkpoint
from formats.dialects.adapterhub_heads import has_head, read_head
from formats.dialects.adapterhub_sites import SLICES
from formats.dialects.dialect import Dialect
from formats.dialects.loralib import Reading, adapted_layer
from formats.dialects.peft_factors import Context, Factors
from formats.dialects.prompts import Whole
from formats.dialects.resolve import resolver
from formats.errors import AdapterFormatError, ShapeMismatch
from formats.layers import LayerKind, owner
from formats.open_files import OpenFiles
from formats.spec import TensorSpec, shape_text

_FACTOR = re.compile(r"^(?P<module>.+)\.loras\.(?P<name>[^.]+)\.(?P<role>lora_[AB]|vera_[BD]|m\.weight)$")
_SHARED = re.compile(r"^(?:.+\.)?shared_parameters\.[^.]+\.(?P<role>lora_[AB])$")
_VERSION = re.compile(r"^adapters\.(?P<major>\d+)\.(?P<minor>\d+)")
# The factors of each layer by the config's composition_mode, and the factors of VeRA and DoRA.
_ROLES = {"add": ("lora_A", "lora_B"), "scale": ("lora_B",)}
_VERA, _MAGNITUDE = ("vera_B", "vera_D"), "m.weight"
# Settings that are refused, each with the reason that the user is shown.
_REFUSED = {"use_gating": "its gate depends on the input, which no weight can express"}
# Methods that are refused, each with the reason that the user is shown.
_BESIDE = "the method does not change a weight: surgery fold reports which parts of it can go into weights"
_OTHERS = {
    **dict.fromkeys((None, "prefix_tuning", "prompt_tuning", "union"), _BESIDE),
    "mtl_lora": "MTL-LoRA mixes its up-projections by the task, which no weight can express",
    "reft": "ReFT changes hidden states at chosen positions of the input, which no weight can express",
}


class AdapterHub(Dialect):
    """The dialect of AdapterHub's adapters: LoRA, (IA)³, VeRA and DoRA."""

    name = "adapterhub"
    weights_files = ("adapter.safetensors", "pytorch_adapter.bin")

    def recognises(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> bool:
        """Whether the config contains a nested config, as the library writes it."""
        return config is not None and "peft_type" not in config and isinstance(config.get("config"), Mapping)

    def read(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any] | None,
        base: Mapping[str, TensorSpec],
        names: Mapping[str, str],
        told: Told,
    ) -> Adapter:
        """Reads the adapter and resolves it against the base's tensors."""
        where, config = checkpoint.ref.path, config or {}
        own = _checked(config["config"], where)
        mode = own.get("composition_mode", "add")
        roles, shared = _roles(own)
        modules: dict[str, Factors] = {}
        once: Factors = {}
        for key in checkpoint.specs:
            match = _FACTOR.match(key)
            of_all = _SHARED.match(key) if shared else None
            if of_all is not None:
                once[of_all["role"]] = checkpoint.tensor(key)
            elif match is not None and match["role"] in roles:
                modules.setdefault(match["module"], {})[match["role"]] = checkpoint.tensor(key)
            else:
                raise AdapterFormatError(
                    f"a tensor that is not a factor of {'LoRA' if mode == 'add' else '(IA)³'}",
                    where=where,
                    expected=" or ".join(f"….loras.NAME.{role}" for role in roles),
                    found=key,
                )
        if missing := [role for role in shared if role not in once]:
            raise AdapterFormatError(
                "the file lacks the matrices that all layers share",
                where=where,
                expected=", ".join(missing),
                then="save it from a model with a head: the library leaves them out of a model without one",
            )
        rename = resolver([f"{module}.weight" for module in modules], base, where)
        context = Context.of({}, rename, base, where)
        matrices = own.get("attn_matrices") or ()
        fused = tuple(each in matrices for each in SLICES)
        reading = Reading(_alpha(config, own), Told(enable_lora=fused), context)
        adapted: list[AdapterModule] = []
        for module, factors in sorted(modules.items()):
            if shared or own.get("use_dora"):
                adapted += _other_product(module, {**once, **factors}, roles, own, reading)
            elif mode == "add":
                adapted.append(_low_rank(module, factors, own["r"], reading))
            else:
                adapted += _scaled(module, factors, reading)
        return Adapter(checkpoint.ref, self.name, config, tuple(adapted), ())

    def has_head(self, adapter: Path) -> bool:
        """Whether head_config.json or a head's weights lie beside it."""
        return has_head(adapter)

    def head(
        self, adapter: Path, base: Mapping[str, TensorSpec], model: Mapping[str, Any], files: OpenFiles
    ) -> Whole | None:
        """The head that the library saved beside the adapter."""
        return read_head(adapter, base, model, files)

    def described(self, config: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """The nested config's method, rank and alpha, and the base."""
        config = config or {}
        own = config.get("config") or {}
        said = {name: own.get(key) for name, key in (("method", "architecture"), ("rank", "r"), ("alpha", "alpha"))}
        return {**said, "base": config.get("model_name")}


def _checked(own: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    mode = own.get("composition_mode", "add")
    if own.get("architecture") != "lora" or mode not in _ROLES or not own.get("r"):
        raise AdapterFormatError(
            _OTHERS.get(own.get("architecture"), "of AdapterHub's methods only LoRA and (IA)³ are merged into weights"),
            where=where,
            expected=f"architecture = lora, composition_mode = {' or '.join(_ROLES)}",
            found=f"architecture = {own.get('architecture')}, composition_mode = {mode}",
        )
    for setting, reason in _REFUSED.items():
        if own.get(setting):
            raise AdapterFormatError(f"{setting}: {reason}", where=where, found=f"{setting} = {own[setting]}")
    return own


def _roles(own: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The factors of each layer, and the factors that all layers share."""
    roles: tuple[str, ...] = _ROLES[own.get("composition_mode", "add")]
    shared: tuple[str, ...] = ()
    if own.get("vera_d") is not None or own.get("vera_b") is not None:
        roles, shared = _VERA, roles
    return ((*roles, _MAGNITUDE) if own.get("use_dora") else roles), shared


def _alpha(config: Mapping[str, Any], own: Mapping[str, Any]) -> float:
    """Alpha as used in training. Before version 1.1.0 the library always scaled by 1, whatever the config said, and it
    still reads such files that way (adapters.loading, _fix_backward_compat)."""
    version = _VERSION.match(str(config.get("version", "")))
    faulty = version is not None and (int(version["major"]), int(version["minor"])) < (1, 1)
    return float(own["r"] if faulty else own["alpha"])


def _low_rank(module: str, factors: Factors, rank: int, reading: Reading) -> AdapterModule:
    """The adapted weight of one layer with LoRA."""
    adapted = adapted_layer(module, factors, reading.context.rename(f"{module}.weight"), reading)
    if adapted.rank != rank:
        raise AdapterFormatError(
            "the factors' rank contradicts the config",
            where=f"{reading.context.where}: {adapted.target}",
            expected=f"r = {rank}",
            found=adapted.rank,
            then="save the adapter again, from the library that trained it",
        )
    return adapted


def _other_product(
    module: str, factors: Factors, roles: tuple[str, ...], own: Mapping[str, Any], reading: Reading
) -> list[AdapterModule]:
    """The adapted weight of one layer with VeRA or DoRA; for DoRA also the bias, which it scales too."""
    context = reading.context
    if missing := [role for role in roles if role not in factors]:
        raise AdapterFormatError(
            "a part of the adapter is missing",
            where=f"{context.where}: {module}",
            expected=", ".join(missing),
            then="save the adapter again, from the library that trained it",
        )
    rank = factors["lora_B"].spec.shape[-1]
    if rank != own["r"]:
        raise AdapterFormatError(
            "the factors' rank contradicts the config",
            where=f"{context.where}: {module}",
            expected=f"r = {own['r']}",
            found=rank,
            then="save the adapter again, from the library that trained it",
        )
    target, bias = (context.rename(f"{module}.{last}") for last in ("weight", "bias"))
    kind = context.kinds.get(owner(target), LayerKind.LINEAR)
    if _MAGNITUDE not in factors:
        return [AdapterModule(target, "vera_square", kind, factors, rank, reading.alpha)]
    named = {role.removesuffix(".weight"): ref for role, ref in factors.items()}
    adapted = [AdapterModule(target, "dora_outputs", kind, named, rank, reading.alpha)]
    if bias in context.base:
        adapted.append(AdapterModule(bias, "dora_outputs", LayerKind.LINEAR, named, rank, reading.alpha, reads=target))
    return adapted


def _scaled(module: str, factors: Factors, reading: Reading) -> list[AdapterModule]:
    """The adapted weight of one layer with (IA)³, and its bias: the library scales the layer's outputs and so the bias,
    although its own merge does not change the bias (adapters.methods.lora, LoRALinear.merge_adapter, 1.3)."""
    context = reading.context
    target, bias = (context.rename(f"{module}.{last}") for last in ("weight", "bias"))
    weight, vector = context.base[target], factors["lora_B"]
    kind = context.kinds.get(owner(target), LayerKind.LINEAR)
    kind = kind if kind is LayerKind.TRANSPOSED else LayerKind.LINEAR
    enabled = reading.told.enable_lora
    out = weight.shape[-1] if kind is LayerKind.TRANSPOSED else weight.shape[0]
    settings: dict[str, Any] = {"feedforward": False}
    if vector.spec.shape == (out // len(enabled) * sum(enabled), 1) != (out, 1):
        settings["enabled"] = list(enabled)
    elif vector.spec.shape != (out, 1):
        raise ShapeMismatch(
            "the adapter does not fit the base's weight",
            where=f"{context.where}: {target}",
            expected=f"one factor for each of {out} outputs, or for the outputs of the attn_matrices",
            found=f"lora_B {shape_text(vector.spec.shape)}",
            then="check that the adapter was made for this base",
        )
    adapted = [AdapterModule(target, "ia3", kind, {"ia3_l": vector}, 1, reading.alpha, settings=settings)]
    if bias in context.base:
        linear = LayerKind.LINEAR
        adapted.append(AdapterModule(bias, "ia3", linear, {"ia3_l": vector}, 1, reading.alpha, settings=settings))
    return adapted
