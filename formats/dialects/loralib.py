"""Reads loralib's state dicts (microsoft/LoRA, `loralib.lora_state_dict`). Tested against loralib itself.

Keys are `<module>.lora_A`, `<module>.lora_B` and biases carried in full. There is no config: the rank follows from the
shapes, and the caller gives alpha. Where the shapes leave open which slices of a fused layer are adapted, the caller
says that too. This module does no mathematics.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from formats.adapter import Adapter, AdapterModule, Told
from formats.checkpoint import Checkpoint
from formats.dialects.dialect import Dialect
from formats.dialects.peft_factors import Context, Factors, pair
from formats.dialects.peft_full import replacements
from formats.dialects.resolve import resolver
from formats.dialects.stored import held, in_the_file, whole_in_the_file
from formats.errors import AdapterFormatError, ShapeMismatch
from formats.layers import LayerKind, owner
from formats.spec import TensorRef, TensorSpec, shape_text

_FACTOR = re.compile(r"^(?:(?P<module>.+)\.)?(?P<role>lora_[AB])$")
_INNER = "conv"  # the submodule that holds the weight and bias of loralib's convolutions


class Loralib(Dialect):
    """The dialect of microsoft/LoRA."""

    name = "loralib"
    asks = ("alpha", "enable_lora", "fan_in_fan_out")

    def recognises(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> bool:
        """Whether there is no config, and some keys end in lora_A or lora_B without `.weight`."""
        return config is None and any(_FACTOR.match(key) for key in checkpoint.specs)

    def read(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any] | None,
        base: Mapping[str, TensorSpec],
        names: Mapping[str, str],
        told: Told,
    ) -> Adapter:
        """Reads the adapter and resolves it against the base's tensors."""
        where = checkpoint.ref.path
        modules, full = _split(checkpoint)
        alpha = _alpha(told, where)
        stored = held(base, names)
        base = {**base, **{name: tensor.spec for name, tensor in stored.items()}}
        targets = {module: _weight_of(module, base) for module in modules}
        full = {_bias_of(name, targets): ref for name, ref in full.items()}
        context = Context.of({}, resolver(targets.values(), base, where), base, where)
        adapted = [
            adapted_layer(module, factors, context.rename(targets[module]), Reading(alpha, told, context))
            for module, factors in sorted(modules.items())
        ]
        replaced = replacements(full, context)
        modules_in_file, replaced_in_file = in_the_file(adapted, stored), whole_in_the_file(replaced, stored)
        return Adapter(checkpoint.ref, self.name, {}, tuple(modules_in_file), tuple(replaced_in_file))


@dataclass(frozen=True)
class Reading:
    """The context for reading a module."""

    alpha: float
    told: Told
    context: Context


def _split(checkpoint: Checkpoint) -> tuple[dict[str, Factors], dict[str, TensorRef]]:
    """Factors by module and role, and biases by name. Raises AdapterFormatError for a whole model's state dict."""
    modules: dict[str, Factors] = {}
    full: dict[str, TensorRef] = {}
    for key in checkpoint.specs:
        match = _FACTOR.match(key)
        if match is not None:
            modules.setdefault(match["module"] or "", {})[match["role"]] = checkpoint.tensor(key)
        else:
            full[key] = checkpoint.tensor(key)
    beside = [key for key in full if "bias" not in key]
    if beside:
        raise AdapterFormatError(
            "the file is a whole model with factors, and does not say whether they are merged into it already",
            where=checkpoint.ref.path,
            expected="only lora_A, lora_B and biases",
            found=", ".join(beside[:3]) + (" …" if len(beside) > 3 else ""),
            then="save the adapter alone: loralib.lora_state_dict(model)",
        )
    return modules, full


def _alpha(told: Told, where: str) -> float:
    if told.alpha is None or not math.isfinite(told.alpha):
        raise AdapterFormatError(
            "loralib's files do not store alpha, and ΔW = alpha / rank · BA",
            where=where,
            expected="the lora_alpha that the adapter was trained with",
            found=told.alpha,
            then="pass it, e.g. --alpha 16",
        )
    return told.alpha


def _weight_of(module: str, base: Mapping[str, TensorSpec]) -> str:
    """The name of the weight. A base saved from loralib's own model has it inside the convolution's submodule."""
    plain, inner = (f"{module}.{last}".removeprefix(".") for last in ("weight", f"{_INNER}.weight"))
    if plain in base or inner in base:
        return plain if plain in base else inner
    tails = [any(known.endswith(f".{name}") or name.endswith(f".{known}") for known in base) for name in (plain, inner)]
    return inner if tails == [False, True] else plain


def _bias_of(name: str, targets: Mapping[str, str]) -> str:
    """The base's name of a bias. A convolution's bias is in the module itself if its weight is."""
    holder, _, last = owner(name).rpartition(".")
    inside = last == _INNER and targets.get(holder) == f"{holder}.weight".removeprefix(".")
    return f"{holder}.bias".removeprefix(".") if inside else name


def adapted_layer(module: str, factors: Factors, target: str, reading: Reading) -> AdapterModule:
    """The adapted weight of one layer."""
    where = f"{reading.context.where}: {module}"
    a, b = pair(factors, ("lora_A", "lora_B"), where)
    weight = reading.context.base[target]
    found = f"lora_A {shape_text(a.spec.shape)}, lora_B {shape_text(b.spec.shape)}"
    if len(a.spec.shape) == len(b.spec.shape) == 2 and a.spec.size and b.spec.size:
        make = _convolution if len(weight.shape) > 2 else _matrix
        adapted = make(a.spec.shape, b.spec.shape, {"lora_A": a, "lora_B": b}, weight, reading)
        if adapted is not None:
            return adapted
    raise ShapeMismatch(
        "the adapter does not fit the base's weight",
        where=f"{reading.context.where}: {target}",
        expected=f"the base's {shape_text(weight.shape)}",
        found=found,
        then="check that the adapter was made for this base",
    )


def _convolution(
    a: tuple[int, ...], b: tuple[int, ...], factors: Factors, weight: TensorSpec, reading: Reading
) -> AdapterModule | None:
    """A (rank · k, in · k) and B (out / groups · k, rank · k); their product is reshaped to the weight's shape."""
    kernel = weight.shape[2]
    whole = a[0] == b[1] and b[0] * a[1] == weight.size and not any(side % kernel for side in (*a, *b))
    if not whole or set(weight.shape[2:]) != {kernel}:
        return None
    settings = {"row": math.prod(weight.shape[1:])}
    return AdapterModule(
        weight.name, "lora_kernel", LayerKind.CONV, factors, a[0] // kernel, reading.alpha, settings=settings
    )


def _matrix(
    a: tuple[int, ...], b: tuple[int, ...], factors: Factors, weight: TensorSpec, reading: Reading
) -> AdapterModule | None:
    """A (rank · n, in) and B (height · n, rank) for n adapted slices of `height` outputs; a plain layer has n = 1."""
    rank, count = b[1], a[0] // b[1]
    if len(weight.shape) != 2 or a[0] % rank or not count or b[0] % count:
        return None
    height = b[0] // count
    sides = {LayerKind.LINEAR: weight.shape, LayerKind.TRANSPOSED: weight.shape[::-1]}  # (out, in)
    fitting = [kind for kind, (out, into) in sides.items() if into == a[1] and not out % height and out >= b[0]]
    if not fitting:
        return None
    kind = fitting[0] if len(fitting) == 1 else _square_kind(weight, reading)
    slices = sides[kind][0] // height
    if slices == count == 1:
        embedding = reading.context.kinds.get(owner(weight.name)) is LayerKind.EMBEDDING
        kind = LayerKind.EMBEDDING if embedding and kind is LayerKind.TRANSPOSED else kind
        return AdapterModule(weight.name, "lora", kind, factors, rank, reading.alpha)
    enabled = (True,) * slices if slices == count else _enabled(weight, slices, count, reading)
    return AdapterModule(
        weight.name, "lora_fused", kind, factors, rank, reading.alpha, settings={"enabled": list(enabled)}
    )


def _square_kind(weight: TensorSpec, reading: Reading) -> LayerKind:
    """How a square weight is stored. An embedding is known by its name; a layer is stored like its neighbours, or as
    the caller says."""
    kinds = reading.context.kinds
    kind = kinds.get(owner(weight.name), LayerKind.LINEAR)
    if kind is LayerKind.EMBEDDING:
        return LayerKind.TRANSPOSED
    turned = kind is LayerKind.TRANSPOSED if LayerKind.TRANSPOSED in kinds.values() else reading.told.fan_in_fan_out
    return LayerKind.TRANSPOSED if turned else LayerKind.LINEAR


def _enabled(weight: TensorSpec, slices: int, count: int, reading: Reading) -> tuple[bool, ...]:
    """Which slices are adapted, as the caller says. Raises AdapterFormatError if that is missing or does not fit."""
    enabled = reading.told.enable_lora
    if len(enabled) != slices or sum(enabled) != count:
        raise AdapterFormatError(
            "the factors adapt some slices of a fused layer, and the file does not say which",
            where=f"{reading.context.where}: {weight.name}",
            expected=f"{count} of {slices} slices of {shape_text(weight.shape)}",
            found=",".join(str(int(each)) for each in enabled) or None,
            then="pass the enable_lora that it was trained with, e.g. --enable-lora 1,0,1",
        )
    return enabled
