"""The tensors of a base that a LoRA's own shapes imply, in peft's names, for work that needs no base.

A module's factors tell its weight's shape. Knows no mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from formats.checkpoint import Checkpoint
from formats.dialects.dialect import NAME_BASE
from formats.dialects.peft_factors import PREFIX
from formats.errors import AdapterFormatError
from formats.spec import TensorSpec

_FACTOR = re.compile(r"^(?P<module>.+)\.(?P<role>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?$")
_WRAPPED = ".base_layer"


def implied_base(checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> dict[str, TensorSpec]:
    """The weights that a LoRA in peft's names adapts, and the tensors that it carries in full, by the base's names.

    Raises:
        AdapterFormatError: the method or dialect is another, whose factors do not determine the weights.
    """
    where, config = checkpoint.ref.path, config or {}
    untold = ("target_parameters", "layer_replication", "trainable_token_indices")
    if config.get("peft_type") != "LORA" or any(config.get(setting) for setting in untold):
        raise AdapterFormatError(
            "this adapter's factors do not determine the weights that they adapt",
            where=where,
            expected="LoRA in peft's names, without target_parameters, layer_replication or trainable tokens",
            found=str(config.get("peft_type", "no config")),
            then=NAME_BASE,
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


def _weight(name: str, factors: Mapping[str, TensorSpec], transposed: bool) -> TensorSpec:
    embedding = "lora_embedding_A" in factors
    a, b = (factors.get(f"lora_{'embedding_' if embedding else ''}{role}") for role in "AB")
    if a is None or b is None or len(a.shape) < 2 or len(b.shape) < 2:
        raise AdapterFormatError(
            "a factor has no partner",
            where=name,
            found=", ".join(sorted(factors)),
            then="save the adapter again, from the library that trained it",
        )
    out, into = b.shape[0], a.shape[1]
    if embedding or transposed:
        return TensorSpec(name, a.dtype, (into, out))
    return TensorSpec(name, a.dtype, (out, into, *a.shape[2:]))
