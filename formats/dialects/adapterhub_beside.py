"""Reads adapters that add something to a model rather than change its weights: AdapterHub's bottlenecks, prefixes and
prompts, and peft's prompts and prefixes.

This module does no mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from formats.checkpoint import Checkpoint
from formats.dialects.bottleneck import REFUSED, Bottlenecks, Roles, read_bottlenecks, refuse_settings
from formats.dialects.prompts import Prefix, Prompt, Whole, read_peft_prompt, read_prefix, read_prompt
from formats.errors import AdapterFormatError
from formats.spec import CheckpointRef, TensorRef, TensorSpec

_KINDS = {None: "adapters", "prefix_tuning": "prefix_tunings", "prompt_tuning": "prompt_tunings"}
_SHARED, _UNION = "shared_parameters", "union"
_KEY = re.compile(
    rf"^(?:(?P<holder>.+?)\.)?(?P<kind>{'|'.join((*_KINDS.values(), _SHARED))})\.(?P<name>[^.]+)\.(?P<role>.+)$"
)


Part = Bottlenecks | Prefix | Prompt | Whole
_EARLY = {
    "gelu": "gelu_new",
    "gelu_orig": "gelu",
}  # old files: other names (adapters.utils, 1.3)
_PEFT = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")


def lies_beside(config: Mapping[str, Any] | None) -> bool:
    """Whether a config belongs to an adapter that adds something to the model rather than change its weights."""
    if config is None:
        return False
    own = config.get("config")
    if isinstance(own, Mapping) and "peft_type" not in config:
        return own.get("architecture") in (*_KINDS, _UNION)
    return config.get("peft_type") in _PEFT


def read_beside(checkpoint: Checkpoint, config: Mapping[str, Any], base: Mapping[str, TensorSpec]) -> tuple[Part, ...]:
    """Reads the parts of an adapter that adds something to the model, resolved against the base's tensors.

    Only a union (MAM) and an adapter with trained heads have more than one part.

    Args:
        checkpoint: the adapter's tensors.
        config: the adapter's adapter_config.json.
        base: the base's tensors.

    Raises:
        AdapterFormatError: the method, a setting or the model is not supported, or tensors are missing or unknown.
        ShapeMismatch: tensors do not fit the base or the config.
        UnmatchedKeys: the base does not have a layer that the adapter needs.
    """
    if config.get("peft_type") in _PEFT:
        return read_peft_prompt(checkpoint, config, base)
    own = config["config"]
    if "version" not in config and own.get("non_linearity") in _EARLY:
        own = {**own, "non_linearity": _EARLY[own["non_linearity"]]}
    parts = own["configs"] if own.get("architecture") == _UNION else [own]
    for part in parts:  # first, because such settings add tensors that would look like another method's
        refuse_settings(REFUSED, part, checkpoint.ref)
    architectures = [part.get("architecture") for part in parts]
    if not set(architectures) <= set(_KINDS) or len(set(architectures)) < len(architectures):
        raise AdapterFormatError(
            "not an adapter of bottlenecks, a prefix or a prompt, or a union with at most one of each",
            where=checkpoint.ref.path,
            expected=f"architecture = {', '.join(map(str, _KINDS))}",
            found=f"architecture = {', '.join(map(str, architectures))}",
            then="use the library adapters itself: surgery does not support this method",
        )
    held = _held(checkpoint, [_KINDS[each] for each in architectures])
    model_type = config.get("model_type")
    return tuple(_part(checkpoint.ref, part, held, base, model_type) for part in parts)


def _part(
    ref: CheckpointRef,
    own: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Roles]],
    base: Mapping[str, TensorSpec],
    model_type: str | None,
) -> Part:
    """One part of an adapter, by its own config."""
    architecture = own.get("architecture")
    held = tensors[_KINDS[architecture]]
    if architecture is None:
        return read_bottlenecks(ref, held, tensors[_SHARED].get("", {}), own, base, model_type)
    # The model holds a prefix or a prompt. Each layer holds the same prefix again, under a name of its own in the file.
    own_roles = [roles for holder, roles in held.items() if not holder.endswith(".pool")]
    if len(own_roles) != 1:
        raise AdapterFormatError(
            "the file must have exactly one prefix or prompt", where=ref.path, found=", ".join(held)
        )
    return (read_prefix if architecture == "prefix_tuning" else read_prompt)(ref, own_roles[0], own, base, model_type)


def _held(checkpoint: Checkpoint, kinds: Sequence[str]) -> dict[str, dict[str, Roles]]:
    """The tensors of each kind by the module that holds them and by role. Shared tensors have an empty module."""
    held: dict[str, dict[str, dict[str, TensorRef]]] = {kind: {} for kind in (*kinds, _SHARED)}
    for key in checkpoint.specs:
        match = _KEY.match(key)
        if match is None or match["kind"] not in held:
            raise AdapterFormatError(
                "a tensor belongs to another method than the config",
                where=checkpoint.ref.path,
                expected=" or ".join(f"….{kind}.NAME.…" for kind in kinds),
                found=key,
                then="use the adapter_config.json that was saved with these weights",
            )
        holder = "" if match["kind"] == _SHARED else match["holder"] or ""
        held[match["kind"]].setdefault(holder, {})[match["role"]] = checkpoint.tensor(key)
    return {kind: dict(by_holder) for kind, by_holder in held.items()}
