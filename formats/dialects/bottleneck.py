"""Reads AdapterHub's bottlenecks: Houlsby, Pfeiffer, parallel, compacter. Tested against files that the library
adapters wrote for all models in `adapterhub_layers`.

The result is plain data, with the names of the base's weights around each bottleneck. Other modules decide what can go
into weights. This module does no mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from formats.dialects.adapterhub_layers import ATTENTION, LAYOUTS, LayerPlace, ModelLayout, layout_of
from formats.dialects.resolve import Rename, resolver
from formats.errors import AdapterFormatError, ShapeMismatch
from formats.layers import LayerKind, layer_kinds, owner
from formats.spec import CheckpointRef, TensorRef, TensorSpec, shape_text


@dataclass(frozen=True)
class Dense:
    """A projection y = W x + b: weight (out, in), bias (out)."""

    weight: TensorRef
    bias: TensorRef


@dataclass(frozen=True)
class Hypercomplex:
    """A compacter's projection yᵀ = xᵀ Σᵢ ruleᵢ ⊗ (leftᵢ rightᵢ) + bᵀ (Mahabadi et al., arXiv 2106.04647, equation 5).

    Attributes:
        rule: (n, n, n), shared by all projections or of this one.
        left, right: (n, in / n, rank) and (n, rank, out / n).
        bias: (out); None if there is no bias.
    """

    rule: TensorRef
    left: TensorRef
    right: TensorRef
    bias: TensorRef | None


@dataclass(frozen=True)
class Bottleneck:
    """One bottleneck, scaling · up(f(down(x))), in a layer.

    Attributes:
        layer: the layer's number.
        place: ATTENTION or MLP: the sublayer that the bottleneck follows.
        behind: the base's weight whose output h the bottleneck follows.
        first: the base's first weight of the MLP; if the MLP has a gate, the one that is not the gate. None after an
            attention.
        norm: the base's weight of the norm of h plus the residual; None in models with pre-norm.
        down, up: the projections.
        scaling: a number, or a learned tensor with one value, or with one value per output.
    """

    layer: int
    place: str
    behind: str
    first: str | None
    norm: str | None
    down: Dense | Hypercomplex
    up: Dense | Hypercomplex
    scaling: float | TensorRef


@dataclass(frozen=True)
class Bottlenecks:
    """An adapter made of bottlenecks.

    Attributes:
        ref: the adapter's file.
        non_linearity: the config's name of f, in lower case.
        parallel: whether the input x is the residual to which h will be added, rather than computed from h.
        original_ln_before: if not parallel, whether x is h plus the residual (normed, in models with post-norm) rather
            than h.
        residual_before_ln: what the bottleneck's output is added to: True for h, False for x, "post_add" for h plus the
            residual before the norm. A parallel bottleneck is added to h.
        original_ln_after: whether adding the residual, and the norm, follow.
        modules: the bottlenecks, sorted by layer and place.
    """

    ref: CheckpointRef
    non_linearity: str
    parallel: bool
    original_ln_before: bool
    residual_before_ln: bool | str
    original_ln_after: bool
    modules: tuple[Bottleneck, ...]


# Settings that are refused, each with the reason that the user is shown.
REFUSED = {
    "use_gating": "the gate depends on the input",
    "inv_adapter": "invertible adapters, which change the embeddings, are not supported",
    "ln_before": "a separate norm before the bottleneck is not supported",
    "ln_after": "a separate norm after the bottleneck is not supported",
    "shared_W_phm": "projections that all layers share are not supported",
    "factorized_phm_rule": "a rule that is a product of two factors is not supported",
}
Roles = Mapping[str, TensorRef]  # one module's tensors
Setting = TypeVar("Setting")


def read_bottlenecks(
    ref: CheckpointRef,
    modules: Mapping[str, Roles],
    shared: Roles,
    own: Mapping[str, Any],
    base: Mapping[str, TensorSpec],
    model_type: str | None = None,
) -> Bottlenecks:
    """Reads the adapter and resolves it against the base's tensors.

    Args:
        ref: the adapter's file.
        modules: the bottlenecks' tensors, by the module that holds them.
        shared: the tensors that all bottlenecks share.
        own: the method's config.
        base: the base's tensors.
        model_type: model type of the model that the adapter was trained in; None if unknown.

    Raises:
        AdapterFormatError: a setting or the model is not supported, or tensors are missing or unknown.
        ShapeMismatch: tensors do not fit the base or the config.
        UnmatchedKeys: the base does not have a layer that the adapter needs.
    """
    refuse_settings(REFUSED, own, ref)
    places = _found(modules, ref, model_type)
    rename = resolver([f"{path}{place.behind}.weight" for _, place, _, path in places.values()], base, ref.path)
    layouts = list(dict.fromkeys(layout for layout, *_ in places.values())) or [layout_of(base) or LAYOUTS[0]]
    for layout, place, _, path in places.values():
        _check_norm(rename(f"{path}{place.norm}.weight"), layout, ref, base)
    reading = _Reading(ref, own, base, rename, shared, layer_kinds(base))
    _check_places({(number, place.name) for _, place, number, _ in places.values()}, layouts[0], ref, own, base)
    found = [reading.module(*place, modules[holder]) for holder, place in places.items()]
    return Bottlenecks(
        ref=ref,
        non_linearity=setting(own, "non_linearity", str, ref).lower(),
        parallel=bool(own.get("is_parallel")),
        original_ln_before=bool(own.get("original_ln_before")),
        residual_before_ln=own.get("residual_before_ln", True),
        original_ln_after=bool(own.get("original_ln_after", True)),
        modules=tuple(sorted(found, key=lambda each: (each.layer, each.place))),
    )


# Where a bottleneck is; the layer's number and its path in the adapter's names.
Found = tuple[ModelLayout, LayerPlace, int, str]


def _found(holders: Iterable[str], ref: CheckpointRef, model_type: str | None) -> dict[str, Found]:
    """Where each module's bottleneck is. Raises AdapterFormatError if no known model has one there."""
    found = {}
    for holder in holders:
        for layout, place in ((each, place) for each in LAYOUTS for place in each.places):
            match = re.fullmatch(layout.path + re.escape(place.holder), holder)
            if match and model_type in (None, *layout.types):
                found[holder] = layout, place, int(match["number"]), match["path"]
        if holder not in found:
            raise AdapterFormatError(
                "a bottleneck at a place that is not supported",
                where=ref.path,
                expected=f"a layer of {', '.join(name for layout in LAYOUTS for name in layout.types)}",
                found=holder if model_type is None else f"{holder} of {model_type}",
                then="use the library adapters itself: surgery does not support bottlenecks there",
            )
    return found


def _check_norm(norm: str, layout: ModelLayout, ref: CheckpointRef, base: Mapping[str, TensorSpec]) -> None:
    """Refuses a base whose norms are elsewhere: its residual is a different value, even if its projections match."""
    if norm not in base:
        raise AdapterFormatError(
            "the base's norms are at other places than in the adapter's model",
            where=ref.path,
            expected=f"{norm}, as in {layout.types[0]}",
            then="check that the adapter was made for this base",
        )


def _check_places(
    found: set[tuple[int, str]],
    layout: ModelLayout,
    ref: CheckpointRef,
    own: Mapping[str, Any],
    base: Mapping[str, TensorSpec],
) -> None:
    """Refuses an adapter whose bottlenecks are not exactly those that its config puts into the base."""
    wanted = {
        (number, place.name)
        for place in layout.places
        if own.get(place.name)
        for number, _ in layout.layers(base, place)
        if number not in (own.get("leave_out") or ())
    }
    for number, place in sorted(found ^ wanted):
        raise AdapterFormatError(
            "config and file disagree about a bottleneck, or the base has another number of layers",
            where=f"{ref.path}: layer {number}, {place}",
            expected="one" if (number, place) in wanted else "none",
            found="none" if (number, place) in wanted else "one",
            then="check that the adapter was made for this base, and that its config was saved with it",
        )


def refuse_settings(refused: Mapping[str, str], own: Mapping[str, Any], ref: CheckpointRef) -> None:
    """Raises AdapterFormatError, with the reason, if the config has one of the refused settings."""
    for setting, reason in refused.items():
        if own.get(setting):
            raise AdapterFormatError(
                f"{setting}: {reason}",
                where=ref.path,
                found=f"{setting} = {own[setting]}",
                then=f"use the library adapters itself, or train the adapter without {setting}",
            )


def setting(own: Mapping[str, Any], name: str, kind: type[Setting], ref: CheckpointRef) -> Setting:
    """A setting that the config must have. Raises AdapterFormatError if it is missing or of another type."""
    value = own.get(name)
    if not isinstance(value, kind):
        raise AdapterFormatError(
            "the adapter's config lacks a setting",
            where=ref.path,
            expected=f"{name}, of type {kind.__name__}",
            found=repr(value),
            then="download or save the adapter again",
        )
    return value


def shaped(role: str, roles: Roles, shape: tuple[int, ...], where: str, then: str | None = None) -> TensorRef:
    """A module's tensor, which must have this shape.

    Raises:
        AdapterFormatError: the tensor is missing.
        ShapeMismatch: the tensor has another shape.
    """
    if role not in roles:
        raise AdapterFormatError(
            "a part of the adapter is missing",
            where=where,
            expected=role,
            found=", ".join(sorted(roles)) or "nothing",
            then=then or "download or save the adapter again",
        )
    if roles[role].spec.shape != shape:
        raise ShapeMismatch(
            "the adapter does not fit the base, or its own config",
            where=f"{where}: {role}",
            expected=shape_text(shape),
            found=shape_text(roles[role].spec.shape),
            then="check that the adapter was made for this base",
        )
    return roles[role]


def refuse_others(roles: Roles, used: set[TensorRef], where: str) -> None:
    """Raises AdapterFormatError for tensors that were not used."""
    others = [ref.name for ref in roles.values() if ref not in used]
    if others:
        raise AdapterFormatError(
            "tensors that belong to no part of the adapter",
            where=where,
            found=", ".join(others),
            then="save the adapter again, from the library that trained it",
        )


@dataclass(frozen=True)
class _Reading:
    """The context for reading a bottleneck."""

    ref: CheckpointRef
    own: Mapping[str, Any]
    base: Mapping[str, TensorSpec]
    rename: Rename
    shared: Roles
    kinds: Mapping[str, LayerKind]

    def module(self, layout: ModelLayout, place: LayerPlace, number: int, path: str, roles: Roles) -> Bottleneck:
        """One bottleneck."""
        where = f"{self.ref.path}: {path}{place.name}"
        behind = self.rename(f"{path}{place.behind}.weight")
        first = None if place.name == ATTENTION else self.rename(f"{path}{place.first}.weight")
        norm = self.rename(f"{path}{place.norm}.weight") if layout.norm_behind else None
        turned = self.kinds.get(owner(behind)) is LayerKind.TRANSPOSED
        width = self.base[behind].shape[-1 if turned else 0]
        inner = self._inner(number, width)
        down = self._projection("adapter_down.0", roles, (inner, width), where)
        up = self._projection("adapter_up", roles, (width, inner), where)
        scaling = self._scaling(roles, width, where)
        tensors = [*vars(down).values(), *vars(up).values(), scaling]
        refuse_others(roles, {each for each in tensors if isinstance(each, TensorRef)}, where)
        return Bottleneck(number, place.name, behind, first, norm, down, up, scaling)

    def _inner(self, layer: int, width: int) -> int:
        """The bottleneck's inner width. The config has one reduction factor for all layers, or one per layer."""
        factor = self.own.get("reduction_factor")
        if isinstance(factor, Mapping):
            factor = factor.get(str(layer), factor.get("default"))
        if not isinstance(factor, int | float) or factor <= 0:
            raise AdapterFormatError(
                "the config has no valid reduction factor for this layer",
                where=f"{self.ref.path}: layer {layer}",
                expected="reduction_factor > 0",
                found=self.own.get("reduction_factor"),
                then="download or save the adapter again",
            )
        return max(int(width // factor), 1)

    def _scaling(self, roles: Roles, width: int, where: str) -> float | TensorRef:
        scaling = self.own.get("scaling", 1.0)
        if not isinstance(scaling, str):
            return float(scaling)
        return shaped("scaling", roles, (1,) if scaling == "learned" else (width,), where)

    def _projection(self, role: str, roles: Roles, shape: tuple[int, int], where: str) -> Dense | Hypercomplex:
        """A projection (out, in)."""
        out, into = shape
        if not self.own.get("phm_layer"):
            return Dense(shaped(f"{role}.weight", roles, shape, where), shaped(f"{role}.bias", roles, (out,), where))
        n, rank = int(self.own.get("phm_dim", 4)), int(self.own.get("phm_rank", 1))
        if self.own.get("shared_phm_rule", True):
            then = "save it from a model with a head: the library leaves the shared rule out of a model without one"
            rule = shaped("phm_rule", self.shared, (n, n, n), self.ref.path, then)
        else:
            rule = shaped(f"{role}.phm_rule", roles, (n, n, n), where)
        return Hypercomplex(
            rule,
            shaped(f"{role}.W_left", roles, (n, into // n, rank), where),
            shaped(f"{role}.W_right", roles, (n, rank, out // n), where),
            shaped(f"{role}.b", roles, (out,), where) if self.own.get("phm_bias", True) else None,
        )
