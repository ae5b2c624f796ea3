"""The adapter as the mathematics sees it, free of any dialect's names.

Data alone. Knows no file layout and no linear algebra.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from formats.layers import LayerKind
from formats.spec import CheckpointRef, TensorRef


@dataclass(frozen=True)
class ExpertPart:
    """Which piece of a `stack` of experts a tensor of the base is: of one expert's outputs, `first` up to `last`."""

    expert: int
    first: int
    last: int
    stack: str = ""


@dataclass(frozen=True)
class AdapterModule:
    """One adapted weight.

    Attributes:
        target: the base tensor it changes.
        method: whose mathematics, e.g. "lora".
        kind: how the base stores the weight.
        factors: the method's tensors by their role. For LoRA lora_A (rank, in) and lora_B (out, rank), with the
            kernel behind for a convolution; for experts lora_A (experts · rank, in), the rows expert by expert, and
            lora_B (out, rank · experts), the columns rank by rank. DoRA adds lora_magnitude_vector.
        rank, alpha: as configured for this very module.
        rslora: whether the scaling is alpha/√rank instead of alpha/rank (arXiv 2312.03732).
        transposed: for experts, whether the base stores (experts, in, out) instead of (experts, out, in).
        part: for a stack of experts that the base stores in pieces, (out, in) each, which of them the target is.
        settings: what else the method must know, as its own file says; empty for LoRA.
        reads: another tensor of the base that the method reads beside the target, and gets as the factor `weight`.
    """

    target: str
    method: str
    kind: LayerKind
    factors: Mapping[str, TensorRef]
    rank: int
    alpha: float
    rslora: bool = False
    transposed: bool = False
    part: ExpertPart | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    reads: str | None = None

    @property
    def scaling(self) -> float:
        """The factor of BA in ΔW."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Replacement:
    """A tensor that the adapter carries in full: it replaces the base's `target`, or is added to the base.

    With `rows` it replaces only these rows of the target, in this order. A replacement may have more rows than the
    target: a vocabulary that has grown.
    """

    target: str
    source: TensorRef
    added: bool
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """A whole adapter, resolved against its base's names.

    Attributes:
        ref: its file.
        dialect: in which it is written.
        config: the dialect's own, as read.
        modules, replacements: what it does to the base.
        component: the part of a pipeline that the base is, as diffusers calls it; empty where nobody says.
        left: tensors of the file that are of other parts.
        notes: what the file's reader has to say.
    """

    ref: CheckpointRef
    dialect: str
    config: Mapping[str, Any]
    modules: tuple[AdapterModule, ...]
    replacements: tuple[Replacement, ...]
    component: str = ""
    left: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        """Every tensor of the adapter that takes part, in a fixed order."""
        factors = [ref for module in self.modules for _, ref in sorted(module.factors.items())]
        return tuple(sorted([*factors, *(full.source for full in self.replacements)], key=lambda ref: ref.name))


@dataclass(frozen=True)
class Told:
    """What a caller says of adapters whose files do not: loralib's have no config, a pipeline's have several parts.

    Attributes:
        alpha: of every module; None where nobody said.
        enable_lora: which slices of a fused layer are adapted, as loralib's MergedLinear was given it.
        fan_in_fan_out: whether square weights of which nothing else tells are stored (in, out).
        component: which part of a pipeline the base is, where the adapter has several.
        model: the base's config.json, for dialects that know layers by the model's class; empty without one.
    """

    alpha: float | None = None
    enable_lora: tuple[bool, ...] = ()
    fan_in_fan_out: bool = False
    component: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict, repr=False)


NOTHING_TOLD = Told()
