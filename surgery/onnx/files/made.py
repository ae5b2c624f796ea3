"""Describes payload tensors that are not the model's own, and what they are made from. This module reads nothing."""

from __future__ import annotations

from dataclasses import dataclass

from formats.spec import TensorSpec


@dataclass(frozen=True)
class Part:
    """One source of a payload tensor.

    Attributes:
        name: name of the source: a graft's tensor, or one of the model's own.
        own: whether it is the model's own.
        turned: whether it is transposed first.
        added: name of a graft's tensor that is added to it, if any.
        heads: number of heads into which the columns are split, giving (heads, rows, size); 0 for no split.
        copies: how often each head is repeated, if the columns are split into heads.
    """

    name: str
    own: bool = False
    turned: bool = False
    added: str = ""
    heads: int = 0
    copies: int = 1


@dataclass(frozen=True)
class Made:
    """A payload tensor that is not one of the model's own.

    Attributes:
        spec: the tensor's spec.
        parts: its sources, which are concatenated.
        axis: the axis of the concatenation.
    """

    spec: TensorSpec
    parts: tuple[Part, ...]
    axis: int = 0


def taken(spec: TensorSpec, name: str, *, turned: bool = False) -> Made:
    """One tensor under another name, transposed if `turned`."""
    shape = spec.shape[::-1] if turned else spec.shape
    return Made(TensorSpec(name, spec.dtype, shape), (Part(spec.name, turned=turned),))
