"""Tensors of a payload that are none of the model's own, and what they are made of. Names and shapes; reads nothing."""

from __future__ import annotations

from dataclasses import dataclass

from formats.spec import TensorSpec


@dataclass(frozen=True)
class Part:
    """A tensor that a payload's tensor is made of.

    Attributes:
        name: of the tensor: a graft's, or the model's own.
        own: whether it is the model's own.
        turned: whether its axes are exchanged first.
        added: a graft's tensor that is added to it, if any.
        heads: of columns of several heads' how many: they are laid out (heads, rows, size) then; 0 for others.
        copies: how many of each head one behind the other, where heads are laid out.
    """

    name: str
    own: bool = False
    turned: bool = False
    added: str = ""
    heads: int = 0
    copies: int = 1


@dataclass(frozen=True)
class Made:
    """A tensor of the payload that is none of the model's own.

    Attributes:
        spec: of the tensor.
        parts: what lies one behind the other in it.
        axis: along which.
    """

    spec: TensorSpec
    parts: tuple[Part, ...]
    axis: int = 0


def taken(spec: TensorSpec, name: str, *, turned: bool = False) -> Made:
    """One tensor as it is, or with its axes exchanged, under another name."""
    shape = spec.shape[::-1] if turned else spec.shape
    return Made(TensorSpec(name, spec.dtype, shape), (Part(spec.name, turned=turned),))
