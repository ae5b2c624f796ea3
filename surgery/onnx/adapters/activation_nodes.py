"""Activation functions as nodes, in the form that ONNX Runtime recognises and runs as one kernel where it has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from surgery.errors import Unsupported
from surgery.methods.activations import activation
from surgery.onnx.adapters.graph import Graph

Nodes = Callable[[Graph, str, str], str]  # graph, z, the path of new nodes → f(z)


def activate(graph: Graph, name: str, z: str, path: str) -> str:
    """Adds f(z) to a graph and returns the name of its value.

    Args:
        graph: the graph, changed in place.
        name: name of f in configs.
        z: name of a value.
        path: prefix of the new nodes' names.

    Raises:
        Unsupported: the activation function is unknown.
    """
    known = activation(name)
    if known is None:
        raise Unsupported(
            "an unknown non-linearity",
            where=path,
            expected=", ".join(sorted(_NODES)),
            found=name,
            then="correct the name in the adapter's config if it means one of these",
        )
    return _NODES[known.name](graph, z, path)


def _one(kind: str, **attributes: Any) -> Nodes:
    return lambda graph, z, path: graph.add(kind, [z], f"{path}/{kind}", like=z, **attributes)


def _silu(factor: float) -> Nodes:
    def nodes(graph: Graph, z: str, path: str) -> str:
        times = z if factor == 1 else graph.add("Mul", [z, _number(graph, z, factor)], f"{path}/times", like=z)
        sigmoid = graph.add("Sigmoid", [times], f"{path}/Sigmoid", like=z)
        return graph.add("Mul", [z, sigmoid], f"{path}/Mul", like=z)

    return nodes


def _relu2(graph: Graph, z: str, path: str) -> str:
    relu = graph.add("Relu", [z], f"{path}/Relu", like=z)
    return graph.add("Mul", [relu, relu], f"{path}/Mul", like=z)


def _relu6(graph: Graph, z: str, path: str) -> str:
    bounds = [_number(graph, z, bound) for bound in (0, 6)]
    return graph.add("Clip", [z, *bounds], f"{path}/Clip", like=z)


def _number(graph: Graph, like: str, number: float) -> str:
    import numpy as np
    import onnx

    dtype = onnx.helper.tensor_dtype_to_np_dtype(graph.values[like].type.tensor_type.elem_type)
    return graph.constant(f"number/{number}", np.array(number, dtype))


_NODES: Mapping[str, Nodes] = {
    "linear": lambda graph, z, path: z,
    "relu": _one("Relu"),
    "gelu": _one("Gelu", approximate="none"),
    "gelu_new": _one("Gelu", approximate="tanh"),
    "quick_gelu": _silu(1.702),
    "silu": _silu(1),
    "leaky_relu": _one("LeakyRelu", alpha=0.01),
    "mish": _one("Mish"),
    "relu2": _relu2,
    "relu6": _relu6,
    "sigmoid": _one("Sigmoid"),
    "tanh": _one("Tanh"),
}
