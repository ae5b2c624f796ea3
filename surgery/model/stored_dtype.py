"""The dtypes in which a merge stores its result (the base's, or one for all weights), and the matching config.json.

This module knows no method's mathematics and writes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from formats.checkpoint import Checkpoint
from formats.errors import Quantised, UnsupportedDType
from formats.layers import owner
from formats.quantized import (
    FLOAT8,
    Scaled,
    activations_of,
    foreign,
    is_scale,
    refuse_foreign,
    scaled,
)
from formats.spec import DType, TensorSpec
from surgery.model.base_model import BaseModel
from surgery.model.config import parts

DTYPES = {"float32": DType.F32, "float16": DType.F16, "bfloat16": DType.BF16}
_QUANTISATION = ("quantization_config", "compression_config")


def dtype_named(name: str | None, what: str = "a result") -> DType | None:
    """The dtype that the command line names; None if it names none. Raises UnsupportedDType, which names `what`."""
    if name is not None and name not in DTYPES:
        raise UnsupportedDType(
            f"{what} cannot be stored in this dtype",
            expected=", ".join(DTYPES),
            found=name,
            then="choose one of these with --dtype",
        )
    return DTYPES[name] if name else None


@dataclass(frozen=True)
class Storage:
    """How a base stores its tensors, and how the merge will store the result.

    Attributes:
        stored: the dtype of every weight of the result; None if each weight keeps its own.
        scaled: the float8 weights that have scales, by name.
        foreign: weight → quantised form, for weights that cannot be merged into.
        shed: base tensors, other than scales, that the result drops.
        where: the path of the base.
    """

    stored: DType | None = None
    scaled: Mapping[str, Scaled] = field(default_factory=dict)
    foreign: Mapping[str, str] = field(default_factory=dict)
    shed: frozenset[str] = frozenset()
    where: str = ""

    @classmethod
    def of(cls, base: Checkpoint, config: Mapping[str, Any], stored: DType | None) -> Storage:
        """Reads it from headers and from the quantisation settings in config.json.

        Raises:
            Quantised: scales are missing, or some weights cannot be stored in the chosen dtype.
            ShapeMismatch: scales that do not fit their weights.
        """
        specs, where = base.specs, base.ref.path
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
        """Scale tensor → its weight."""
        return {how.scale.name: name for name, how in self.scaled.items()}

    def result(self, spec: TensorSpec) -> TensorSpec:
        """The spec of a tensor as the result stores it."""
        converts = self.stored is not None and (spec.dtype.is_weight or spec.dtype in FLOAT8)
        return replace(spec, dtype=self.stored) if self.stored is not None and converts else spec


def refuse_quantised(model: BaseModel, chosen: Collection[str]) -> None:
    """Refuses to take the difference of weights that are not stored as plain floats.

    Args:
        model: base or tuned.
        chosen: the tensors to compare.

    Raises:
        Quantised: one of their modules holds a quantised weight.
    """
    storage, modules = (
        Storage.of(model.checkpoint, model.quantization, None),
        {part for name in chosen for part in (owner(name), owner(owner(name)))},
    )
    forms = dict(storage.foreign) | dict.fromkeys(storage.scaled, "float8 with scales")
    for name, form in forms.items():
        if owner(name) in modules:
            raise Quantised(
                f"a quantised model ({form}) has no difference that factors could carry",
                where=f"{model.checkpoint.ref.path}: {name}",
                expected="F16, BF16, F32 or F64",
                found=f"{form}, {len(forms)} weights of the file",
                then="compare the unquantised models; or dequantise this one first, with transformers' "
                "model.dequantize() and save_pretrained",
            )


def as_numbers(spec: TensorSpec) -> TensorSpec:
    """The spec of a weight as a method sees it: float8 is dequantised."""
    return replace(spec, dtype=DType.F64) if spec.dtype in FLOAT8 else spec


def restated(config: Mapping[str, Any], stored: DType) -> dict[str, Any]:
    """A config.json with another dtype and without quantisation settings, since the output is not quantised."""
    result = copy.deepcopy(dict(config))
    name = next(name for name, dtype in DTYPES.items() if dtype is stored)
    for part in parts(result):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str):
                part[key] = name
        for key in _QUANTISATION:
            part.pop(key, None)
    if not {"dtype", "torch_dtype"} & set(result):
        result["dtype"] = name
    return result


def dtype_in(merged: Checkpoint, base: Checkpoint) -> DType | None:
    """The one dtype of all weights in a merged file without a receipt, if it differs from the base's; else None."""
    found = {spec.dtype for spec in merged.specs.values() if spec.dtype.is_float}
    own = {spec.dtype for spec in base.specs.values() if spec.dtype.is_float}
    return found.pop() if len(found) == 1 and found != own and found <= set(DTYPES.values()) else None
