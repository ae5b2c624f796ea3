"""Recognises LyCORIS's own forms of OFT, BOFT, GLoRA and (IA)³ among the factors of a layer.

OFT and BOFT have `oft_blocks`, sometimes `rescale`, and a constraint stored as `alpha`; GLoRA has `a1`, `a2`, `b1`,
`b2`; (IA)³ has `weight` and `on_input`. This module does no mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping

from formats.adapter import AdapterModule
from formats.dialects.peft_factors import Factors
from formats.errors import AdapterFormatError, ShapeMismatch
from formats.layers import LayerKind
from formats.spec import TensorSpec, shape_text

# Endings of keys, and the roles of their tensors. `weight` counts only together with `on_input`.
SUFFIXES = {
    "oft_blocks": "oft_blocks",
    "rescale": "rescale",
    "on_input": "on_input",
    **{f"{name}.weight": name for name in ("a1", "a2", "b1", "b2")},
}
SCALE = "scale"  # the role of (IA)³'s `weight`
KEYS = {role: suffix for suffix, role in SUFFIXES.items()} | {SCALE: "weight"}
_METHODS = {"oft_blocks": "lycoris_oft", "a1": "lycoris_glora", "on_input": "lycoris_ia3"}
_NEEDED = {
    "lycoris_oft": ("oft_blocks",),
    "lycoris_boft": ("oft_blocks",),  # of four dimensions
    "lycoris_glora": ("a1", "a2", "b1", "b2"),
    "lycoris_ia3": (SCALE, "on_input"),
}
OWN = tuple(_NEEDED)  # the methods


def own_module(
    role: str, factors: Factors, numbers: Mapping[str, float], weight: TensorSpec, kind: LayerKind, where: str
) -> AdapterModule:
    """The adapted weight of a layer.

    Args:
        role: the factor that identifies the method.
        factors: the layer's factors.
        numbers: the values of its scalar factors.
        weight: the base's weight.
        kind: the layer's kind.
        where: the file and the layer, for errors.

    Raises:
        AdapterFormatError: a factor is missing, or a scalar is not a number.
        ShapeMismatch: the weight has fewer than two dimensions.
    """
    method = _METHODS[role]
    if method == "lycoris_oft" and len(factors[role].spec.shape) == 4:
        method = "lycoris_boft"
    needed = _NEEDED[method]
    missing = [name for name in needed if name not in factors]
    if missing:
        raise AdapterFormatError(
            "a layer lacks some of its factors",
            where=where,
            expected=", ".join(needed),
            found=", ".join(factors),
            then="save the adapter again, from the library that trained it",
        )
    if len(weight.shape) < 2:
        raise ShapeMismatch(
            "not a layer's weight",
            where=f"{where} → {weight.name}",
            expected="at least two dimensions",
            found=shape_text(weight.shape),
            then="check that the adapter was made for this base",
        )
    if method == "lycoris_glora":
        shape = factors["a2"].spec.shape
        rank = shape[0] if shape else 0
        alpha = numbers.get("alpha", float(rank))
        if not rank or not alpha or alpha != alpha:
            raise AdapterFormatError(
                "the scaling needs a rank and an alpha other than 0", where=where, found=f"rank {rank}, alpha {alpha}"
            )
        return AdapterModule(weight.name, method, kind, {name: factors[name] for name in needed}, rank, alpha)
    setting, number = ("constraint", "alpha") if role == "oft_blocks" else ("on_input", "on_input")
    value = numbers.get(number, 0.0)
    if value != value:
        raise AdapterFormatError(
            f"{number} is not a number",
            where=where,
            expected="a finite number",
            found=factors[number].spec.dtype,
            then="download or save the adapter again",
        )
    ours = {name: ref for name, ref in factors.items() if name in (*needed, "rescale", number)}
    settings = {setting: bool(value) if setting == "on_input" else value}
    return AdapterModule(weight.name, method, kind, ours, 1, 1.0, settings=settings)
