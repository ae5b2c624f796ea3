"""Reads kohya's files (sd-scripts' networks.lora), and LyCORIS's, which name layers as kohya does.

Keys are a part's prefix, the layer with underscores for dots, and the factor: `lora_unet_mid_block_….lora_down.weight`.
Alpha is a tensor; without one it equals the rank. `lycoris_writing` writes these files. This module does no
mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from formats.adapter import Adapter, Told
from formats.checkpoint import Checkpoint
from formats.dialects.dialect import Dialect
from formats.dialects.groups import LORA_ROLES, SUFFIXES, Scaling, group_modules, groups_of, scalar, suffix_of
from formats.dialects.parts import UNDERSCORED, chosen_part, same_part, split_part
from formats.dialects.underscored import restored
from formats.spec import TensorSpec


class Kohya(Dialect):
    """The dialect of kohya-ss/sd-scripts: LoRA on linear layers and convolutions."""

    name = "kohya"
    asks = ("component",)
    lays_out_by_weight = True

    def recognises(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> bool:
        """Whether all keys have kohya's prefixes and are LoRA's factors."""
        roles = _roles(checkpoint)
        return bool(roles) and roles <= LORA_ROLES and not any(key.startswith("lycoris_") for key in checkpoint.specs)

    def read(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any] | None,
        base: Mapping[str, TensorSpec],
        names: Mapping[str, str],
        told: Told,
    ) -> Adapter:
        """The adapter of one part of a pipeline, resolved against that part's tensors."""
        return _read(self.name, checkpoint, base, told)


class Lycoris(Dialect):
    """The dialect of LyCORIS, in kohya's names: LoCon, LoHa, LoKr, (B)OFT, GLoRA, (IA)³, whole differences, norms."""

    name = "lycoris"
    asks = ("component",)
    lays_out_by_weight = True

    def recognises(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> bool:
        """Whether all keys have kohya's or LyCORIS's prefixes, whatever the factors."""
        return bool(_roles(checkpoint))

    def read(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any] | None,
        base: Mapping[str, TensorSpec],
        names: Mapping[str, str],
        told: Told,
    ) -> Adapter:
        """The adapter of one part of a pipeline, resolved against that part's tensors."""
        return _read(self.name, checkpoint, base, told)


def _read(dialect: str, checkpoint: Checkpoint, base: Mapping[str, TensorSpec], told: Told) -> Adapter:
    """The adapter of one part, whichever of the two wrote it."""
    where = checkpoint.ref.path
    groups = groups_of(checkpoint, lambda key: split_part(key, UNDERSCORED))
    part = chosen_part((UNDERSCORED[group.prefix] for group in groups), told.component, where)
    ours = [group for group in groups if same_part(UNDERSCORED[group.prefix] or part, part)]
    modules = restored((group.name for group in ours), base, where)
    adapted = []
    for group in ours:
        adapted += group_modules(group, modules[group.name], base, Scaling(scalar(group, where)), where)
    left = tuple(ref.name for group in groups if group not in ours for ref in group.factors.values())
    return Adapter(checkpoint.ref, dialect, {}, tuple(adapted), (), part, left)


def _roles(checkpoint: Checkpoint) -> set[str]:
    """The roles of all tensors; empty if any key lacks kohya's and LyCORIS's prefixes."""
    roles = set()
    for key in checkpoint.specs:
        parts = split_part(key, UNDERSCORED)
        if parts is None:
            return set()
        suffix = suffix_of(key)
        roles.add(SUFFIXES[suffix] if suffix else key.rpartition(".")[2])
    return roles
