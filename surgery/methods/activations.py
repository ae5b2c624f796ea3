"""Activation functions by the names that configs use: which names mean the same function, and how fold can use them.

This module is pure: names, and functions of a tensor. It knows no adapter and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Activation:
    """An activation function g.

    Attributes:
        name: transformers' name.
        also: other names of the same function.
        splits: whether g(z) − g(−z) = z, so that two neurons can pass z on unchanged.
    """

    name: str
    also: tuple[str, ...] = ()
    splits: bool = False


LINEAR = Activation("linear")
# gelu z Φ(z), silu z σ(z) and the like split because Φ(z) + Φ(−z) = 1; relu because z = max(z, 0) − max(−z, 0).
_ACTIVATIONS = (
    LINEAR,
    Activation("relu", splits=True),
    Activation("gelu", ("gelu_python",), splits=True),
    Activation("gelu_new", ("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "gelu_fast"), splits=True),
    Activation("quick_gelu", splits=True),
    Activation("silu", ("swish",), splits=True),
    Activation("leaky_relu", ("leakyrelu",)),
    Activation("mish"),
    Activation("relu2"),
    Activation("relu6"),
    Activation("sigmoid"),
    Activation("tanh"),
)
_NAMED: Mapping[str, Activation] = {name: each for each in _ACTIVATIONS for name in (each.name, *each.also)}


def activation(name: str) -> Activation | None:
    """The activation with this name, in upper or lower case; None if it is unknown."""
    return _NAMED.get(name.lower())


def function(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The elementwise function with a known name, for any floating dtype."""
    import torch
    from torch.nn import functional

    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        LINEAR.name: lambda z: z,
        "relu": torch.relu,
        "gelu": functional.gelu,
        "gelu_new": lambda z: functional.gelu(z, approximate="tanh"),
        "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
        "silu": functional.silu,
        "leaky_relu": functional.leaky_relu,
        "mish": functional.mish,
        "relu2": lambda z: torch.relu(z).square(),
        "relu6": functional.relu6,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }
    return functions[_NAMED[name.lower()].name]
