"""Reads adapters in diffusers' and ComfyUI's names: a part's prefix, the layer's dotted name, and the factor.

This module does no mathematics.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from formats.adapter import Adapter, AdapterModule, Told
from formats.checkpoint import Checkpoint
from formats.dialects.dialect import NAME_BASE, Dialect
from formats.dialects.groups import FactorGroup, Scaling, group_modules, groups_of, scalar, suffix_of
from formats.dialects.parts import COMFYUI, DOTTED, chosen_part, same_part, split_part
from formats.dialects.peft_factors import Context
from formats.dialects.resolve import Rename, resolver
from formats.dialects.unet_names import other_names
from formats.errors import AdapterFormatError, CorruptFile, UnmatchedKeys
from formats.layers import owner
from formats.spec import TensorSpec

CONFIGS = "lora_adapter_metadata"  # the metadata key under which diffusers keeps each part's config
# Names of diffusers' attention processors, which held the factors in older versions.
_PROCESSOR = re.compile(r"\.processor\.(?P<layer>to_\w+?)_lora\.(?P<side>down|up)\.weight$")
_INSIDE = {"to_out": "to_out.0"}


class Diffusers(Dialect):
    """The dialect of Hugging Face's diffusers: peft's factors behind the name of a pipeline's part, and the names of
    older versions. Alpha is in the header's metadata, or a tensor; without either it is the rank."""

    name = "diffusers"
    asks = ("component",)
    lays_out_by_weight = True

    def recognises(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> bool:
        """Whether the file has diffusers' metadata, or keys that begin with a pipeline's part and end like factors."""
        return config is None and (CONFIGS in checkpoint.metadata or _all_split(checkpoint, DOTTED))

    def read(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any] | None,
        base: Mapping[str, TensorSpec],
        names: Mapping[str, str],
        told: Told,
    ) -> Adapter:
        """The adapter of one part of a pipeline, resolved against that part's tensors."""
        groups, part = part_groups(checkpoint, DOTTED, told)
        return _read(self.name, checkpoint, groups, part, _config(checkpoint, groups), base)

    def implied_base(
        self, checkpoint: Checkpoint, config: Mapping[str, Any] | None, told: Told
    ) -> dict[str, TensorSpec]:
        """The weights that LoRA adapts, within the part that is told."""
        return _implied_part(checkpoint, told, DOTTED)


class ComfyUi(Dialect):
    """The dialect of ComfyUI's own names: `diffusion_model.` or `text_encoders.`, and any factors. Alpha is a tensor;
    without one the product is not scaled, that is, alpha is the rank."""

    name = "comfyui"
    asks = ("component",)
    lays_out_by_weight = True

    def recognises(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> bool:
        """Whether all keys begin with ComfyUI's name of a part."""
        return config is None and _all_split(checkpoint, COMFYUI)

    def read(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any] | None,
        base: Mapping[str, TensorSpec],
        names: Mapping[str, str],
        told: Told,
    ) -> Adapter:
        """The adapter of one part of a pipeline, resolved against that part's tensors."""
        groups, part = part_groups(checkpoint, COMFYUI, told)
        return _read(self.name, checkpoint, groups, part, {}, base)

    def implied_base(
        self, checkpoint: Checkpoint, config: Mapping[str, Any] | None, told: Told
    ) -> dict[str, TensorSpec]:
        """The weights that LoRA adapts, within the part that is told."""
        return _implied_part(checkpoint, told, COMFYUI)


def part_groups(checkpoint: Checkpoint, prefixes: Mapping[str, str], told: Told) -> tuple[list[FactorGroup], str]:
    """The layers of the chosen part, and the part's name.

    Raises:
        AdapterFormatError: as `groups_of` and `chosen_part`.
    """
    groups = groups_of(checkpoint, lambda key: split_part(_modern(key), prefixes) or ("", _modern(key)))
    meant = {"": "", **prefixes}
    part = chosen_part((meant[group.prefix] for group in groups), told.component, checkpoint.ref.path)
    return [group for group in groups if same_part(meant[group.prefix] or part, part)], part


def _implied_part(checkpoint: Checkpoint, told: Told, prefixes: Mapping[str, str]) -> dict[str, TensorSpec]:
    """The weights that LoRA in these names adapts, within the part that is told.

    Raises:
        AdapterFormatError: another method, whose factors do not tell.
    """
    where = checkpoint.ref.path
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
                "these factors do not determine the shape of the weight that they adapt",
                where=f"{where}: {group.name}",
                found=", ".join(group.factors),
                then=NAME_BASE,
            )
        for role in ("diff_b", "b_norm", "lora_B.bias"):
            if role in group.factors:
                spec = group.factors[role].spec
                base[f"{group.name}.bias"] = TensorSpec(f"{group.name}.bias", spec.dtype, spec.shape)
    return base


def _read(
    dialect: str,
    checkpoint: Checkpoint,
    groups: list[FactorGroup],
    part: str,
    config: Mapping[str, Any],
    base: Mapping[str, TensorSpec],
) -> Adapter:
    where = checkpoint.ref.path
    rename = _resolved(groups, base, where)
    context = Context.of(config, rename, base, where)
    adapted: list[AdapterModule] = []
    for group in groups:
        scaling = Scaling(scalar(group, where))
        if scaling.alpha is None and "r" in config:
            scaling = Scaling(context.alpha(group.name), context.rslora, context.rank(group.name))
        adapted += group_modules(group, rename(group.name), base, scaling, where)
    ours = {ref.name for group in groups for ref in group.factors.values()}
    left = tuple(key for key in checkpoint.specs if key not in ours)
    return Adapter(checkpoint.ref, dialect, config, tuple(adapted), (), part, left)


def _config(checkpoint: Checkpoint, groups: list[FactorGroup]) -> dict[str, Any]:
    """The config of a part. diffusers keeps the settings of all parts in one object, each prefixed with its part."""
    if CONFIGS not in checkpoint.metadata:
        return {}
    try:
        settings = json.loads(checkpoint.metadata[CONFIGS])
        items = list(settings.items())
    except (ValueError, AttributeError) as error:
        raise CorruptFile(
            f"{CONFIGS} is not a JSON object: {error}",
            where=checkpoint.ref.path,
            then="download or save the adapter again",
        ) from error
    prefixes = {group.prefix for group in groups}
    return {key[len(prefix) :]: value for key, value in items for prefix in prefixes if key.startswith(prefix)}


def _resolved(groups: list[FactorGroup], base: Mapping[str, TensorSpec], where: str) -> Rename:
    """Maps a layer's name to the base's module. In a base that is a whole pipeline, the part's name comes first."""
    wanted = [f"{group.name}.weight" for group in groups]
    prefix = ""
    try:
        rename = resolver(wanted, base, where)
    except UnmatchedKeys:
        others = other_names({owner(name) for name in base})
        if all(group.name in others for group in groups):
            return others.__getitem__
        prefixes = (groups[0].prefix, *COMFYUI)
        found = [each for each in prefixes if each and any(name.endswith(each + wanted[0]) for name in base)]
        if not found:
            raise
        prefix = found[0]
        rename = resolver([prefix + name for name in wanted], base, where)
    return lambda name: rename(f"{prefix}{name}.weight").removesuffix(".weight")


def _all_split(checkpoint: Checkpoint, prefixes: Mapping[str, str]) -> bool:
    """Whether all keys begin with such a prefix and some end like factors; keys of old processors have no prefix."""
    keys = list(checkpoint.specs)
    if prefixes is DOTTED and keys and all(_PROCESSOR.search(key) for key in keys):
        return True
    return all(split_part(key, prefixes) for key in keys) and any(suffix_of(_modern(key)) for key in keys)


def _modern(key: str) -> str:
    """A key in the form of today's versions."""
    match = _PROCESSOR.search(key)
    if match is None:
        return key
    layer = _INSIDE.get(match["layer"], match["layer"])
    return f"{key[: match.start()]}.{layer}.lora.{match['side']}.weight"
