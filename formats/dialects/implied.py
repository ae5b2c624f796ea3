"""Infers the base's tensors from an adapter's own shapes, for operations that need no base.

This works for LoRA in dotted names (peft, diffusers, ComfyUI), where a module's factors give its weight's shape. This
module does no mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from formats.adapter import Told
from formats.checkpoint import Checkpoint
from formats.dialects.dotted import part_groups
from formats.dialects.parts import COMFYUI, DOTTED
from formats.dialects.peft import PREFIX
from formats.errors import AdapterFormatError
from formats.spec import TensorSpec

_FACTOR = re.compile(r"^(?P<module>.+)\.(?P<role>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?$")
_WRAPPED = ".base_layer"
_NAME_BASE = "name the base: --base"


def implied_base(checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> dict[str, TensorSpec]:
    """The weights that a LoRA in peft's names adapts, and the tensors that it carries in full, by the base's names.

    Raises:
        AdapterFormatError: the method or dialect is another, whose factors do not determine the weights.
    """
    where, config = checkpoint.ref.path, config or {}
    untold = ("target_parameters", "layer_replication", "trainable_token_indices")
    if config.get("peft_type") != "LORA" or any(config.get(setting) for setting in untold):
        raise AdapterFormatError(
            "this adapter's factors do not tell what it adapts",
            where=where,
            expected="LoRA in peft's names, without target_parameters, layer_replication or trainable tokens",
            found=str(config.get("peft_type", "no config")),
            then=_NAME_BASE,
        )
    factors: dict[str, dict[str, TensorSpec]] = {}
    base: dict[str, TensorSpec] = {}
    for key, spec in checkpoint.specs.items():
        name = key.removeprefix(PREFIX)
        match = _FACTOR.match(name)
        if match is not None:
            factors.setdefault(match["module"].replace(_WRAPPED, ""), {})[match["role"]] = spec
        elif not re.search(r"\.lora_(magnitude_vector|B\.bias)", name):
            plain = name.replace(_WRAPPED, "").replace(".modules_to_save", "")
            base[plain] = TensorSpec(plain, spec.dtype, spec.shape)
    for module, found in factors.items():
        base[f"{module}.weight"] = _weight(f"{module}.weight", found, bool(config.get("fan_in_fan_out")))
        bias = checkpoint.specs.get(f"{PREFIX}{module}.lora_B.bias")
        if bias is not None:
            base[f"{module}.bias"] = TensorSpec(f"{module}.bias", bias.dtype, bias.shape)
    return base


def implied_part(checkpoint: Checkpoint, told: Told, dialect: str) -> dict[str, TensorSpec]:
    """The weights that a LoRA in diffusers' or ComfyUI's names adapts, within the chosen part.

    Raises:
        AdapterFormatError: the method or dialect is another, whose factors do not determine the weights.
    """
    prefixes = {"diffusers": DOTTED, "comfyui": COMFYUI}.get(dialect)
    where = checkpoint.ref.path
    if prefixes is None:
        raise AdapterFormatError(
            f"{dialect}'s files do not tell the names and shapes of what they adapt", where=where, then=_NAME_BASE
        )
    base: dict[str, TensorSpec] = {}
    for group in part_groups(checkpoint, prefixes, told)[0]:
        a, b, mid = (group.factors.get(role) for role in ("lora_A", "lora_B", "lora_mid"))
        diff = group.factors.get("diff") or group.factors.get("w_norm")
        if a is not None and b is not None and len(a.spec.shape) >= 2 and b.spec.shape:
            kernel = (a if mid is None else mid).spec.shape[2:]
            weight = TensorSpec(f"{group.name}.weight", a.spec.dtype, (b.spec.shape[0], a.spec.shape[1], *kernel))
            base[weight.name] = weight
        elif diff is not None:
            base[f"{group.name}.weight"] = TensorSpec(f"{group.name}.weight", diff.spec.dtype, diff.spec.shape)
        else:
            raise AdapterFormatError(
                "these factors do not tell the shape of what they adapt",
                where=f"{where}: {group.name}",
                found=", ".join(group.factors),
                then=_NAME_BASE,
            )
        for role in ("diff_b", "b_norm", "lora_B.bias"):
            if role in group.factors:
                spec = group.factors[role].spec
                base[f"{group.name}.bias"] = TensorSpec(f"{group.name}.bias", spec.dtype, spec.shape)
    return base


def _weight(name: str, factors: Mapping[str, TensorSpec], transposed: bool) -> TensorSpec:
    embedding = "lora_embedding_A" in factors
    a, b = (factors.get(f"lora_{'embedding_' if embedding else ''}{role}") for role in "AB")
    if a is None or b is None or len(a.shape) < 2 or len(b.shape) < 2:
        raise AdapterFormatError(
            "a factor has no partner",
            where=name,
            expected="both A and B",
            found=", ".join(sorted(factors)),
            then="download or save the adapter again",
        )
    out, into = b.shape[0], a.shape[1]
    if embedding or transposed:
        return TensorSpec(name, a.dtype, (into, out))
    return TensorSpec(name, a.dtype, (out, into, *a.shape[2:]))
