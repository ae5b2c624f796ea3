"""Describes payload tensors that the model does not have, and the tensors they are made of. Names and shapes only."""

from __future__ import annotations

from dataclasses import dataclass

from formats.spec import TensorSpec


@dataclass(frozen=True)
class Part:
    """A tensor that is part of a payload's tensor.

    Attributes:
        name: name of the tensor: a graft's, or the model's own.
        own: whether it is the model's own.
        turned: whether it is transposed first.
        added: a graft's tensor that is added to it, if any.
        heads: number of heads whose columns are interleaved; they become (heads, rows, size); 0 if none.
        copies: number of consecutive copies of each head, if there are heads.
    """

    name: str
    own: bool = False
    turned: bool = False
    added: str = ""
    heads: int = 0
    copies: int = 1


@dataclass(frozen=True)
class Made:
    """A tensor of the payload that the model does not have.

    Attributes:
        spec: spec of the tensor.
        parts: the parts that are concatenated.
        axis: axis of the concatenation.
    """

    spec: TensorSpec
    parts: tuple[Part, ...]
    axis: int = 0


def taken(spec: TensorSpec, name: str, *, turned: bool = False) -> Made:
    """One tensor under another name, unchanged or transposed."""
    shape = spec.shape[::-1] if turned else spec.shape
    return Made(TensorSpec(name, spec.dtype, shape), (Part(spec.name, turned=turned),))
