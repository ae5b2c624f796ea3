"""Reading AdapterHub's adapters that are no change of a weight, whichever they are. Knows no mathematics."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from formats.checkpoint import Checkpoint
from formats.dialects.bottleneck import Bottlenecks, Roles, read_bottlenecks
from formats.dialects.prompts import Prefix, Prompt, read_prefix, read_prompt
from formats.errors import AdapterFormatError
from formats.spec import TensorRef, TensorSpec

_KINDS = {None: "adapters", "prefix_tuning": "prefix_tunings", "prompt_tuning": "prompt_tunings"}
_SHARED = "shared_parameters"
_KEY = re.compile(
    rf"^(?:(?P<holder>.+?)\.)?(?P<kind>{'|'.join((*_KINDS.values(), _SHARED))})\.(?P<name>[^.]+)\.(?P<role>.+)$"
)


def read_beside(
    checkpoint: Checkpoint, config: Mapping[str, Any], base: Mapping[str, TensorSpec]
) -> Bottlenecks | Prefix | Prompt:
    """An adapter that adds something beside the base's weights, resolved against the base's tensors.

    Args:
        checkpoint: the adapter's.
        config: its adapter_config.json.
        base: the base's tensors.

    Raises:
        AdapterFormatError: another method, settings or models that are not read, tensors that are missing or belong to
            nothing.
        ShapeMismatch: tensors that do not fit the base or the config.
        UnmatchedKeys: layers that the base does not have.
    """
    ref, own = checkpoint.ref, config["config"]
    architecture = own.get("architecture")
    if architecture not in _KINDS:
        raise AdapterFormatError(
            "not an adapter of bottlenecks, a prefix or a prompt",
            where=ref.path,
            expected=f"architecture = {', '.join(map(str, _KINDS))}",
            found=f"architecture = {architecture}",
        )
    kind = _KINDS[architecture]
    held, shared = _held(checkpoint, kind)
    if architecture is None:
        return read_bottlenecks(ref, held, shared, own, base)
    # The model holds a prefix or a prompt, and each layer the same prefix again, which has a name in the file too.
    own_roles = [roles for holder, roles in held.items() if not holder.endswith(".pool")]
    if len(own_roles) != 1:
        raise AdapterFormatError(
            "the file has another number of prefixes or prompts than one", where=ref.path, found=", ".join(held)
        )
    return (read_prefix if architecture == "prefix_tuning" else read_prompt)(ref, own_roles[0], own, base)


def _held(checkpoint: Checkpoint, kind: str) -> tuple[dict[str, Roles], Roles]:
    """The tensors of a kind by the module that holds them and by role, and those that all modules share."""
    held: dict[str, dict[str, TensorRef]] = {}
    shared: dict[str, TensorRef] = {}
    for key in checkpoint.specs:
        match = _KEY.match(key)
        if match is None or match["kind"] not in (kind, _SHARED):
            raise AdapterFormatError(
                "a tensor of another method than the config's", where=checkpoint.ref.path, expected=f"….{kind}.NAME.…",
                found=key,
            )  # fmt: skip
        roles = shared if match["kind"] == _SHARED else held.setdefault(match["holder"] or "", {})
        roles[match["role"]] = checkpoint.tensor(key)
    return dict(held), shared
