"""(IA)³ as peft and AdapterHub have it, l, and as LyCORIS has it, the difference to 1.

Both scale a layer's inputs, or its outputs; then peft's scales the bias too and LyCORIS's does not. So they are the
same of inputs, and of a layer without a bias. What is computed is float32 at least, in which a small difference to 1
lasts. Knows no names.
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
    """Whether peft's form of a weight's scaling would scale a bias with it."""
    inputs = module.settings.get("feedforward", module.settings.get("on_input"))
    return not inputs and f"{owner(module.target)}.bias" in base


def difference(name: str, module: AdapterModule, weight: TensorSpec) -> Piece:
    """LyCORIS's vector, s · l − 1, of peft's; (channels,), of a convolution (1, channels, 1, …)."""
    ref = module.factors["ia3_l"]
    size = ref.spec.size
    shape = (1, size, *(1 for _ in weight.shape[2:])) if len(weight.shape) > 2 else (size,)
    return _exact(replace(taken(name, ref, shape, module.scaling), offset=-1.0))


def multiple(name: str, module: AdapterModule, weight: TensorSpec) -> Piece:
    """peft's vector, 1 + w, of LyCORIS's; (out, 1) or (1, in), of a convolution (1, channels, 1, …)."""
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
