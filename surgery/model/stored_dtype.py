"""Chooses the dtypes in which a merge stores its result: the base's own, or one for all weights, also in config.json.

This module knows no method's mathematics and writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from formats.checkpoint import Checkpoint
from formats.errors import CorruptFile, Quantised, UnsupportedDType
from formats.layers import owner
from formats.quantized import (
    FLOAT8,
    Scaled,
    activations_of,
    foreign,
    is_scale,
    quantization_config,
    refuse_foreign,
    scaled,
)
from formats.spec import DType, TensorSpec

DTYPES = {"float32": DType.F32, "float16": DType.F16, "bfloat16": DType.BF16}
_QUANTISATION = ("quantization_config", "compression_config")


def dtype_named(name: str | None) -> DType | None:
    """The dtype with a name from the command line; None for None. Raises UnsupportedDType for other names."""
    if name is not None and name not in DTYPES:
        raise UnsupportedDType(
            "a result cannot be stored in this dtype",
            expected=", ".join(DTYPES),
            found=name,
            then="pass one of these with --dtype",
        )
    return DTYPES[name] if name else None


@dataclass(frozen=True)
class Storage:
    """How a base's tensors are stored, and how a merge's result will be.

    Attributes:
        stored: the dtype of every weight of the result; None if each keeps its own.
        scaled: the float8 weights that have scales, by name.
        foreign: quantisation format of the weights to which nothing can be added, by name.
        shed: tensors of the base, other than scales, that the result does not need.
        where: the base, for errors.
    """

    stored: DType | None = None
    scaled: Mapping[str, Scaled] = field(default_factory=dict)
    foreign: Mapping[str, str] = field(default_factory=dict)
    shed: frozenset[str] = frozenset()
    where: str = ""

    @classmethod
    def of(cls, base: Checkpoint, stored: DType | None) -> Storage:
        """Determines the storage from headers and config.json.

        Raises:
            Quantised: scales are missing, or a dtype was asked for that some weights cannot have.
            ShapeMismatch: scales do not fit their weights.
        """
        specs, where = base.specs, base.ref.path
        config = quantization_config(where)
        forms = foreign(specs, config)
        if stored is not None:
            refuse_foreign(forms, forms, where)
        found = {
            name: scaled(name, specs, config, where)
            for name, spec in specs.items()
            if spec.dtype in FLOAT8 and not is_scale(name)
        }
        scales = {name: how for name, how in found.items() if how is not None}
        shed = {each for name in scales for each in activations_of(name, specs)} if stored is not None else set()
        return cls(stored, scales, forms, frozenset(shed), where)

    @property
    def scales(self) -> dict[str, str]:
        """The weight to which each tensor of scales belongs."""
        return {how.scale.name: name for name, how in self.scaled.items()}

    def result(self, spec: TensorSpec) -> TensorSpec:
        """The spec of a tensor as the result stores it."""
        converts = self.stored is not None and (spec.dtype.is_weight or spec.dtype in FLOAT8)
        return replace(spec, dtype=self.stored) if self.stored is not None and converts else spec


def refuse_quantised(model: Checkpoint, chosen: Collection[str]) -> None:
    """Refuses to take the difference of weights that are not stored as plain floats.

    Args:
        model: the base or the tuned model.
        chosen: names of the tensors that are compared.

    Raises:
        Quantised: one of their modules holds a quantised weight.
    """
    storage, modules = Storage.of(model, None), {part for name in chosen for part in (owner(name), owner(owner(name)))}
    forms = dict(storage.foreign) | dict.fromkeys(storage.scaled, "float8 with scales")
    for name, form in forms.items():
        if owner(name) in modules:
            raise Quantised(
                f"a quantised model ({form}) has no difference that factors could express",
                where=f"{model.ref.path}: {name}",
                expected="F16, BF16, F32 or F64",
                found=f"{form}, {len(forms)} weights of the file",
                then="compare the unquantised models; or dequantise this one first, with transformers' "
                "model.dequantize() and save_pretrained",
            )


def as_numbers(spec: TensorSpec) -> TensorSpec:
    """The spec of a weight as a method sees it: float8 is dequantised."""
    return replace(spec, dtype=DType.F64) if spec.dtype in FLOAT8 else spec


def restated_config(content: bytes, stored: DType, where: Path) -> bytes:
    """A config.json that names another dtype and no quantisation. Raises CorruptFile if it is not a JSON object."""
    try:
        config: Any = json.loads(content)
    except ValueError as error:
        raise CorruptFile(
            f"the model's config is not JSON: {error}", where=where, then="download or correct the file"
        ) from error
    if not isinstance(config, dict):
        raise CorruptFile("the model's config is not a JSON object", where=where, then="download or correct the file")
    name = next(name for name, dtype in DTYPES.items() if dtype is stored)
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    for part in parts:
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str):
                part[key] = name
        for key in _QUANTISATION:
            part.pop(key, None)
    if not {"dtype", "torch_dtype"} & set(config):
        config["dtype"] = name
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"


def dtype_in(merged: Checkpoint, base: Checkpoint) -> DType | None:
    """The single dtype in which a file without a receipt stores all its weights, if it differs from the base's dtypes;
    else None."""
    found = {spec.dtype for spec in merged.specs.values() if spec.dtype.is_float}
    own = {spec.dtype for spec in base.specs.values() if spec.dtype.is_float}
    return found.pop() if len(found) == 1 and found != own and found <= set(DTYPES.values()) else None
