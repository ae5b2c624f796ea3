"""Puts LoRA into a graph next to the weights that it adapts: y = xW + (xA)B.

This works on the canonical graph that `template` makes. Each product with an adapted weight gets two more products and
a sum. A and B are initialisers like the weights (a fixed branch), or inputs with a default of rank 0, which ONNX
Runtime's adapters fill: one graph, many adapters. Shapes are recorded for every new value, so that ONNX Runtime still
fuses what it fused before. This module knows names and shapes; no payload, no file, no dialect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from formats.spec import TensorSpec
from surgery.onnx.adapters.graph import Graph

if TYPE_CHECKING:
    import onnx

WAYS = ("branch", "inputs")
_MERGE = "merge the adapter, and export the merged model"


@dataclass(frozen=True)
class LoraBranch:
    """What stands beside one weight.

    Attributes:
        weight: the weight's initialiser.
        a: lora_A (in, rank), under the name of its initialiser or input.
        b: lora_B (rank, out), with the scaling multiplied in.
        turned: whether the weight is stored (in, out) rather than (out, in).
    """

    weight: str
    a: TensorSpec
    b: TensorSpec
    turned: bool

    @property
    def axis(self) -> str:
        """The name of the dynamic axis: the rank."""
        return f"{self.a.name.rpartition('.')[0]}.rank"


def graft(model: onnx.ModelProto, branches: Sequence[LoraBranch], *, inputs: bool) -> onnx.ModelProto:
    """The graph with the branches in it; the model is left as it is.

    Args:
        model: the graph of a template, or an exported graph.
        branches: one branch per weight. The result does not depend on their order.
        inputs: if true, A and B are inputs of any rank, with rank 0 as the default, so that the graph does not depend
            on the rank; else they are initialisers with external data, whose location is set later.

    Raises:
        Unsupported: the graph does not multiply by a weight, or uses it in other ways too.
    """
    graph = Graph(model)
    for branch in sorted(branches, key=lambda branch: branch.weight):
        for product in graph.products(branch.weight, branch.turned, _MERGE):
            _beside(graph, product, branch, branch.axis if inputs else branch.a.shape[1])
        _declare(graph, branch, inputs=inputs)
    return graph.finish()


def _beside(graph: Graph, product: onnx.NodeProto, branch: LoraBranch, rank: int | str) -> None:
    """The new nodes. The sum takes over the value's name, so that nothing behind it changes."""
    result, plain = product.output[0], f"{product.name}/base"
    product.output[0] = plain
    graph.makers[plain] = product
    graph.note(plain, result, graph.axes(result))
    first, second = f"{product.name}/lora_A", f"{product.name}/lora_B"
    graph.add("MatMul", [product.input[0], branch.a.name], first, like=result, last=rank)
    graph.add("MatMul", [first, branch.b.name], second, like=result)
    graph.add("Add", [plain, second], f"{product.name}/lora", [(result, result, graph.axes(result))])


def _declare(graph: Graph, branch: LoraBranch, *, inputs: bool) -> None:
    """A and B, as initialisers of the weight's type, or as inputs with defaults of rank 0."""
    import onnx

    kind, (into, _), (_, out) = graph.initialisers[branch.weight].data_type, branch.a.shape, branch.b.shape
    if not inputs:
        for spec in (branch.a, branch.b):
            graph.declare(spec, branch.weight)
        return
    for name, axes, empty in (
        (branch.a.name, (into, branch.axis), (into, 0)),
        (branch.b.name, (branch.axis, out), (0, out)),
    ):
        graph.proto.input.append(onnx.helper.make_tensor_value_info(name, kind, axes))
        graph.proto.initializer.add(name=name, dims=empty, data_type=kind, raw_data=b"")
