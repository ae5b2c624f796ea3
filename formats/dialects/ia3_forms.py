"""Converts (IA)³ between two forms: peft and AdapterHub store the factor l, LyCORIS stores l − 1.

Both scale a layer's inputs or its outputs. When scaling outputs, peft scales the bias too and LyCORIS does not. So the
forms agree for inputs, and for layers without a bias. Results are at least float32, in which a small difference from 1
is not lost. This module knows no names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from formats.adapter import AdapterModule
from formats.dialects.lycoris import SCALE
from formats.dialects.writing import Piece, taken
from formats.layers import owner
from formats.spec import DType, TensorSpec


def scales_bias(module: AdapterModule, base: Mapping[str, TensorSpec]) -> bool:
    """Whether peft's form of this (IA)³ would also scale a bias."""
    inputs = module.settings.get("feedforward", module.settings.get("on_input"))
    return not inputs and f"{owner(module.target)}.bias" in base


def difference(name: str, module: AdapterModule, weight: TensorSpec) -> Piece:
    """LyCORIS's vector s · l − 1 from peft's l. Shape (channels,); for a convolution (1, channels, 1, …)."""
    ref = module.factors["ia3_l"]
    size = ref.spec.size
    shape = (1, size, *(1 for _ in weight.shape[2:])) if len(weight.shape) > 2 else (size,)
    return _exact(replace(taken(name, ref, shape, module.scaling), offset=-1.0))


def multiple(name: str, module: AdapterModule, weight: TensorSpec) -> Piece:
    """peft's vector 1 + w from LyCORIS's w. Shape (out, 1) or (1, in); for a convolution (1, channels, 1, …)."""
    ref = module.factors[SCALE]
    size = ref.spec.size
    shape: tuple[int, ...] = (1, size) if module.settings["on_input"] else (size, 1)
    if len(weight.shape) > 2:
        shape = (1, size, *(1 for _ in weight.shape[2:]))
    return _exact(replace(taken(name, ref, shape), offset=1.0))


def _exact(piece: Piece) -> Piece:
    if piece.output.dtype is DType.F64:
        return piece
    return replace(piece, output=replace(piece.output, dtype=DType.F32))
