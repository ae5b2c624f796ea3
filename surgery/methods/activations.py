"""Non-linearities by the names that configs use: which are the same function, and what fold can make of them.

Pure: names and functions of a tensor. Knows no adapter and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Activation:
    """A non-linearity g.

    Attributes:
        name: as transformers calls it.
        also: other names of the same function.
        splits: whether g(z) − g(−z) = z, so that two neurons pass z on as it is.
    """

    name: str
    also: tuple[str, ...] = ()
    splits: bool = False


LINEAR = Activation("linear")
# gelu z Φ(z), silu z σ(z) and the like split since Φ(z) + Φ(−z) = 1; relu since z = max(z, 0) − max(−z, 0).
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
    """The activation of a name in any case; None for one that nobody here knows."""
    return _NAMED.get(name.lower())


def function(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function of a known name, elementwise on any floating dtype."""
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
