"""Reading AdapterHub's LoRA (the library adapters). Tested against files that it made.

Keys are `<module>.loras.<name>.lora_A` and `lora_B`, laid out as loralib's, fused query, key and value included; the
config says alpha and which slices are adapted. Knows no mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from formats.adapter import Adapter, Told
from formats.checkpoint import Checkpoint
from formats.dialects.loralib import Reading, adapted_layer
from formats.dialects.peft_factors import Context, Factors
from formats.dialects.resolve import resolver
from formats.errors import AdapterFormatError
from formats.spec import TensorSpec

_FACTOR = re.compile(r"^(?P<module>.+)\.loras\.(?P<name>[^.]+)\.(?P<role>lora_[AB])$")
_VERSION = re.compile(r"^adapters\.(?P<major>\d+)\.(?P<minor>\d+)")
# Other settings than LoRA's plain ones, each with the reason that a user needs.
_REFUSED = {
    "use_gating": "its gate depends on the input, which no weight can express",
    "use_dora": "DoRA in its layout is not supported yet",
    "vera_d": "VeRA in its layout is not supported yet",
}


class AdapterHub:
    """The dialect of AdapterHub's adapters: LoRA."""

    name = "adapterhub"

    def recognises(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> bool:
        """A config that holds another, as its library writes it."""
        return config is not None and "peft_type" not in config and isinstance(config.get("config"), Mapping)

    def read(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any] | None,
        base: Mapping[str, TensorSpec],
        names: Mapping[str, str],
        told: Told,
    ) -> Adapter:
        """The adapter, resolved against the base's tensors; its config says everything."""
        where, config = checkpoint.ref.path, config or {}
        own = _checked(config["config"], where)
        modules: dict[str, Factors] = {}
        for key in checkpoint.specs:
            match = _FACTOR.match(key)
            if match is None:
                raise AdapterFormatError(
                    "a tensor that is no factor of LoRA", where=where, expected="….loras.NAME.lora_A", found=key
                )
            modules.setdefault(match["module"], {})[match["role"]] = checkpoint.tensor(key)
        rename = resolver([f"{module}.weight" for module in modules], base, where)
        context = Context.of({}, rename, base, where)
        matrices = own.get("attn_matrices") or ()
        fused = tuple(each in matrices for each in ("q", "k", "v"))
        said = Told(alpha=_alpha(config, own), enable_lora=fused)
        reading = Reading(_alpha(config, own), said, context)
        adapted = [
            adapted_layer(module, factors, rename(f"{module}.weight"), reading)
            for module, factors in sorted(modules.items())
        ]
        for module in adapted:
            if module.rank != own["r"]:
                raise AdapterFormatError(
                    "the factors' rank contradicts the config",
                    where=f"{where}: {module.target}",
                    expected=f"r = {own['r']}",
                    found=module.rank,
                )
        return Adapter(checkpoint.ref, self.name, config, tuple(adapted), ())


def _checked(own: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    if own.get("architecture") != "lora" or own.get("composition_mode", "add") != "add" or not own.get("r"):
        raise AdapterFormatError(
            "of AdapterHub's methods only LoRA is read",
            where=where,
            expected="architecture = lora, composition_mode = add",
            found=f"architecture = {own.get('architecture')}, composition_mode = {own.get('composition_mode')}",
        )
    for setting, reason in _REFUSED.items():
        if own.get(setting):
            raise AdapterFormatError(f"{setting}: {reason}", where=where, found=f"{setting} = {own[setting]}")
    return own


def _alpha(config: Mapping[str, Any], own: Mapping[str, Any]) -> float:
    """Alpha as trained: before 1.1.0 the library scaled by 1 whatever the config said, and reads such files so too
    (adapters.loading, _fix_backward_compat)."""
    version = _VERSION.match(str(config.get("version", "")))
    faulty = version is not None and (int(version["major"]), int(version["minor"])) < (1, 1)
    return float(own["r"] if faulty else own["alpha"])
