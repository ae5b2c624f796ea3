"""LoRA left in a graph, beside the weights it adapts: y = xW + (xA)B.

Works on the canonical graph that `template` made: each product with an adapted weight gets two more and a sum. A and B
are initialisers like the weights (a fixed branch), or inputs with a default of rank 0, which ONNX Runtime's adapters
fill: one graph, many adapters. Shapes are noted for every new value, so that ONNX Runtime fuses what it fused before.
Knows names and shapes; no payload, no file, no dialect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from formats.spec import TensorSpec
from surgery.errors import Unsupported

if TYPE_CHECKING:
    import onnx

WAYS = ("branch", "inputs")
_MERGE = "merge the adapter, and export the merged model"


@dataclass(frozen=True)
class Branch:
    """What stands beside one weight.

    Attributes:
        weight: the weight's initialiser.
        a: lora_A (in, rank), as the initialiser or input will be called.
        b: lora_B (rank, out), the scaling in it.
        turned: whether the weight is stored (in, out) and not (out, in).
    """

    weight: str
    a: TensorSpec
    b: TensorSpec
    turned: bool

    @property
    def axis(self) -> str:
        """The name of the axis that varies from adapter to adapter."""
        return f"{self.a.name.rpartition('.')[0]}.rank"


def graft(model: onnx.ModelProto, branches: Sequence[Branch], *, inputs: bool) -> onnx.ModelProto:
    """The graph with the branches in it; the model is left as it is.

    Args:
        model: a template's, or an exported graph.
        branches: one for each weight, in any order: the result does not depend on it.
        inputs: A and B are inputs of any rank, by default 0, so that their rank does not show in the graph; else
            they are initialisers with external data and no location yet.

    Raises:
        Unsupported: a weight that the graph does not multiply by, or by which it does more than that.
    """
    import onnx

    grafted = onnx.ModelProto()
    grafted.CopyFrom(model)
    graph = _Graph(grafted.graph)
    behind: dict[int, list[onnx.NodeProto]] = {}  # place of a node → what is put after it
    for branch in sorted(branches, key=lambda branch: branch.weight):
        for place in graph.products(branch):
            behind[place] = graph.beside(place, branch, branch.axis if inputs else branch.a.shape[1])
        graph.declare(branch, inputs=inputs)
    nodes = [each for place, node in enumerate(graph.nodes) for each in (node, *behind.get(place, ()))]
    del grafted.graph.node[:]
    grafted.graph.node.extend(nodes)
    return grafted


class _Graph:
    """A GraphProto with the indexes that grafting needs. Nodes keep their places until all are found."""

    def __init__(self, proto: onnx.GraphProto) -> None:
        self.proto = proto
        self.nodes = list(proto.node)
        self.readers: dict[str, list[tuple[int, int]]] = {}  # value → (place of the node, which of its inputs)
        for place, node in enumerate(self.nodes):
            for slot, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((place, slot))
        self.values = {value.name: value for value in (*proto.input, *proto.value_info, *proto.output)}
        self.initialisers = {tensor.name: tensor for tensor in proto.initializer}

    def products(self, branch: Branch) -> list[int]:
        """The places of the nodes that multiply by a weight, (in, out) or transposed by a node or by Gemm."""
        found = []
        for place, slot in self.readers.get(branch.weight, []):
            node, transposed = self.nodes[place], False
            users = [(place, slot)]
            if node.op_type == "Transpose" and _attribute(node, "perm") == [1, 0]:
                users, transposed = self.readers.get(node.output[0], []), True
            for user, where in users:
                product = self.nodes[user]
                plain = where == 1 and _is_product(product)
                if not plain or (transposed != (_attribute(product, "transB") == 1)) is branch.turned:
                    raise Unsupported(
                        "the graph uses an adapted weight otherwise than to multiply by it, as its layer is stored",
                        where=branch.weight,
                        expected="x · W, in a MatMul or Gemm",
                        found=product.name,
                        then=_MERGE,
                    )
                found.append(user)
        if not found:
            raise Unsupported("the graph does not multiply by this adapted weight", where=branch.weight, then=_MERGE)
        return found

    def beside(self, place: int, branch: Branch, rank: int | str) -> list[onnx.NodeProto]:
        """The new nodes, which come right after a product: ONNX Runtime makes its bias one with what follows.

        The sum takes over the value's name, so that nothing behind it changes.
        """
        import onnx

        product = self.nodes[place]
        result, plain = product.output[0], f"{product.name}/base"
        product.output[0] = plain
        names = {role: f"{product.name}/{role}" for role in ("lora_A", "lora_B", "lora")}
        self._note(plain, result)
        self._note(names["lora_A"], result, rank)
        self._note(names["lora_B"], result)
        return [
            onnx.helper.make_node("MatMul", [product.input[0], branch.a.name], [names["lora_A"]], names["lora_A"]),
            onnx.helper.make_node("MatMul", [names["lora_A"], branch.b.name], [names["lora_B"]], names["lora_B"]),
            onnx.helper.make_node("Add", [plain, names["lora_B"]], [result], names["lora"]),
        ]

    def _note(self, name: str, like: str, rank: int | str | None = None) -> None:
        """Notes the shape of a new value: that of another, its last axis the rank."""
        known = self.values.get(like)
        if known is None:
            return
        value = self.proto.value_info.add(name=name, type=known.type)
        if rank is not None:
            _set_axis(value.type.tensor_type.shape.dim[-1], rank)

    def declare(self, branch: Branch, *, inputs: bool) -> None:
        """A and B, as initialisers of the weight's type, or as inputs with defaults of rank 0."""
        import onnx

        kind = self.initialisers[branch.weight].data_type
        (into, rank), (_, out) = branch.a.shape, branch.b.shape
        if not inputs:
            for name, dims in ((branch.a.name, (into, rank)), (branch.b.name, (rank, out))):
                external = onnx.TensorProto.EXTERNAL
                self.proto.initializer.add(name=name, dims=dims, data_type=kind, data_location=external)
            return
        for name, axes, dims in (
            (branch.a.name, (into, branch.axis), (into, 0)),
            (branch.b.name, (branch.axis, out), (0, out)),
        ):
            self.proto.input.append(onnx.helper.make_tensor_value_info(name, kind, axes))
            self.proto.initializer.add(name=name, dims=dims, data_type=kind, raw_data=b"")


def _is_product(node: onnx.NodeProto) -> bool:
    """Whether a node multiplies its first input by its second and nothing more, but for a bias."""
    scales = [_attribute(node, name) for name in ("alpha", "beta")]
    return node.op_type in ("MatMul", "Gemm") and not _attribute(node, "transA") and set(scales) <= {None, 1.0}


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    import onnx

    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return None


def _set_axis(axis: Any, size: int | str) -> None:
    axis.Clear()
    if isinstance(size, int):
        axis.dim_value = size
    else:
        axis.dim_param = size
