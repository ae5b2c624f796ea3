"""Puts bottlenecks, up f(down ·), into a graph at the sites that their grafts name.

A site is found by the name of the projection's weight, and by following its product to the bias, the residual and the
norm. There are two forms. As a branch, a bottleneck has two products and two biases of its own. Half-folded, its last
bias is added to the projection's bias, and if it has the same input as the projection, its first product is computed by
additional rows of the projection. This module knows names and shapes; no payload, no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from formats.grafts import BranchGraft, Value
from formats.spec import TensorSpec
from surgery.errors import Unsupported
from surgery.onnx.adapters.activation_nodes import activate
from surgery.onnx.adapters.graph import Graph
from surgery.onnx.files.made import Made, Part, taken

if TYPE_CHECKING:
    import onnx

HALF = "half-folded"
_FOLDER = "the model's class is built differently there: fold what can be folded, or report the class and config.json"


@dataclass(frozen=True)
class Site:
    """The place of a bottleneck as nodes and values of a graph.

    Attributes:
        product: the projection's product.
        bias: the node that adds its bias; None if Gemm does, or if there is none.
        inner: the projection's output h as its own node makes it; (tokens, out) if that is Gemm.
        output: h as (batch, sequence, out).
        sum: the node that adds the residual.
        residual: the residual r.
    """

    product: onnx.NodeProto
    bias: onnx.NodeProto | None
    inner: str
    output: str
    sum: onnx.NodeProto
    residual: str


def graft_branch(
    graph: Graph,
    site: BranchGraft,
    tensors: Mapping[str, TensorSpec],
    weights: Mapping[str, TensorSpec],
    *,
    turned: bool,
    way: str,
) -> tuple[Made, ...]:
    """Puts a bottleneck into a graph, and returns the tensors that the payload then needs.

    Args:
        graph: the graph, changed in place.
        site: the bottleneck and its place.
        tensors: the grafts' tensors.
        weights: the model's tensors.
        turned: whether the projection's weight is stored (in, out).
        way: "branch" or "half-folded".

    Raises:
        Unsupported: the graph around the projection is not as expected.
    """
    found = find_site(graph, site.module, turned=turned)
    if site.reads is Value.PRODUCT:
        return _joined(graph, site, found, tensors)
    inside = site.reads is Value.INPUT and site.adds_to is Value.OUTPUT
    if inside and way == HALF:
        return _half_folded(graph, site, found, tensors, weights, turned=turned)
    made = tuple(
        taken(tensors[source], f"{site.module}.adapter_{role}", turned=role.endswith("weight"))
        for source, role in (
            (site.down, "down.weight"),
            (site.down_bias, "down.bias"),
            (site.up, "up.weight"),
            (site.up_bias, "up.bias"),
        )
    )
    down, down_bias, up, up_bias = (graph.declare(each.spec, f"{site.module}.weight") for each in made)
    read = _value(graph, site, found, site.reads)
    # A branch that reads x adds to h as the product gives it: with Gemm both are (tokens, …), and only after it is h
    # (batch, sequence, …) again.
    onto = found.inner if inside else _value(graph, site, found, site.adds_to)
    _check_width(graph, site.module, read, made[0].spec.shape[0])
    path, readers = f"{site.module}/adapter", list(graph.readers(found.inner if inside else found.output))
    product = graph.add("MatMul", [read, down], f"{path}/down", like=read, last=made[0].spec.shape[1])
    z = graph.add("Add", [product, down_bias], f"{path}/down_bias", like=product)
    product = graph.add("MatMul", [activate(graph, site.non_linearity, z, path), up], f"{path}/up", like=onto)
    biased = graph.add("Add", [product, up_bias], f"{path}/up_bias", like=onto)
    result = graph.add("Add", [onto, biased], f"{path}/Add", like=onto)
    for reader in [node for node in readers if not node.name.startswith(f"{path}/")]:
        graph.reroute(reader, found.inner if inside else found.output, result)
    return made


def find_site(graph: Graph, module: str, *, turned: bool) -> Site:
    """The nodes around a projection. Raises Unsupported if they are not a projection followed by a residual."""
    products = graph.products(f"{module}.weight", turned, _FOLDER)
    if len(products) > 1:
        raise _unexpected(module, "one product with the weight", f"{len(products)} products: layers share the weight")
    (product,) = products
    inner, bias = product.output[0], None
    if product.op_type == "MatMul":
        after = graph.only_reader(inner)
        if after is not None and after.op_type == "Add" and f"{module}.bias" in after.input:
            inner, bias = after.output[0], after
    output, after = inner, graph.only_reader(inner)
    if after is not None and after.op_type == "Reshape" and after.input[0] == inner:
        output = after.output[0]
    total = graph.only_reader(output)
    if total is None or total.op_type != "Add" or len(graph.axes(total.output[0])) != 3:
        found = ", ".join(f"{node.op_type} ({node.name})" for node in graph.readers(output)) or "nothing"
        raise _unexpected(module, "one Add of the residual (batch, sequence, width)", found)
    (residual,) = [name for name in total.input if name != output] or [output]
    if residual in graph.initialisers or graph.axes(residual)[-1:] != graph.axes(output)[-1:]:
        raise _unexpected(module, "an Add of the residual", f"{total.name} with {residual}")
    return Site(product, bias, inner, output, total, residual)


def _value(graph: Graph, site: BranchGraft, found: Site, value: Value) -> str:
    """A value around the projection. The sum and its norm without the bottleneck get nodes of their own."""
    if value is not Value.SUM and value is not Value.NORMED:
        x: str = found.product.input[0]
        return {Value.INPUT: x, Value.OUTPUT: found.output, Value.RESIDUAL: found.residual}[value]
    total, path = found.sum.output[0], f"{site.module}/adapter"
    name = f"{path}/sum"
    if graph.maker(name) is None:
        graph.add("Add", [found.output, found.residual], name, like=total)
    if value is Value.SUM:
        return name
    norms = [node for node in graph.readers(total) if node.op_type == "LayerNormalization"]
    norms = [node for node in norms if list(node.input[:2]) == [total, f"{site.norm}.weight"]]
    if not norms:
        kinds = ", ".join(f"{node.op_type} ({node.name})" for node in graph.readers(total))
        raise _unexpected(site.module, f"LayerNormalization with {site.norm}.weight", kinds or "nothing")
    if graph.maker(f"{path}/normed") is None:
        from onnx.helper import get_attribute_value

        same = {each.name: get_attribute_value(each) for each in norms[0].attribute}
        graph.add("LayerNormalization", [name, *norms[0].input[1:]], f"{path}/normed", like=norms[0].output[0], **same)
    return f"{path}/normed"


def _half_folded(
    graph: Graph,
    site: BranchGraft,
    found: Site,
    tensors: Mapping[str, TensorSpec],
    weights: Mapping[str, TensorSpec],
    *,
    turned: bool,
) -> tuple[Made, ...]:
    """Lets the projection compute both h and f's input, so that only f, up and the sum remain. up's bias is added to
    the projection's bias.

    Gemm adds its bias at no cost, so one bias serves both. After MatMul, ONNX Runtime fuses h's bias with the following
    norm, so h keeps its own Add node. If h has no bias, one Add serves both.
    """
    weight, bias, path = f"{site.module}.weight", f"{site.module}.bias", f"{site.module}/adapter"
    (out, rank), dtype = tensors[site.up].shape, tensors[site.up].dtype
    axis, shape = 1 if turned else 0, list(weights[weight].shape)
    shape[axis] += rank
    both = Made(
        TensorSpec(f"{site.module}.half_folded.weight", dtype, tuple(shape)),
        (Part(weight, own=True), Part(site.down, turned=turned)),
        axis,
    )
    _check_width(graph, site.module, found.product.input[0], tensors[site.down].shape[1])
    graph.declare(both.spec, weight)
    for reader in list(graph.readers(weight)):
        graph.reroute(reader, weight, both.spec.name)
        if reader is not found.product:  # the node that transposes it
            graph.note(reader.output[0], weight, shape[::-1])
    up = taken(tensors[site.up], f"{site.module}.adapter_up.weight", turned=True)
    graph.declare(up.spec, weight)
    product, first = found.product.output[0], Part(site.up_bias)
    if bias in weights:
        first = Part(bias, own=True, added=site.up_bias)
    before, readers, name = graph.axes(product), list(graph.readers(product)), f"{site.module}.half_folded.bias"
    graph.note(product, product, (*before[:-1], out + rank))
    gemm = found.product.op_type == "Gemm"
    apart = not gemm and found.bias is not None
    if apart:
        biases = [
            Made(TensorSpec(name, dtype, (out,)), (first,)),
            taken(tensors[site.down_bias], f"{site.module}.adapter_down.bias"),
        ]
    else:
        biases = [Made(TensorSpec(name, dtype, (out + rank,)), (first, Part(site.down_bias)))]
    for each in biases:
        graph.declare(each.spec, weight)
    whole = product
    if gemm:
        del found.product.input[2:]
        found.product.input.append(name)
    elif not apart:
        whole = graph.add("Add", [product, name], f"{path}/bias", like=product)
    parts = [(f"{path}/h", product, before), (f"{path}/z", product, (*before[:-1], rank))]
    h, z = graph.add("Split", [whole, graph.integers(out, rank)], f"{path}/Split", parts, axis=-1), f"{path}/z"
    if apart:
        z = graph.add("Add", [z, biases[1].spec.name], f"{path}/down_bias", like=z)
    active = activate(graph, site.non_linearity, z, path)
    if gemm:
        result = graph.add("Gemm", [active, up.spec.name, h], f"{path}/up", like=h)
    else:
        change = graph.add("MatMul", [active, up.spec.name], f"{path}/up", like=h)
        result = graph.add("Add", [h, change], f"{path}/Add", like=h)
    if apart:
        graph.reroute(found.bias, bias, name)
    for reader in readers:
        graph.reroute(reader, product, result)
    return (both, *biases, up)


def _joined(graph: Graph, site: BranchGraft, found: Site, tensors: Mapping[str, TensorSpec]) -> tuple[Made, ...]:
    """Adds the bottleneck to the projection's product W x, before the projection's bias, which then serves both."""
    bias, path = f"{site.module}.bias", f"{site.module}/adapter"
    both = Made(
        TensorSpec(f"{site.module}.half_folded.bias", tensors[site.up_bias].dtype, tensors[site.up_bias].shape),
        (Part(bias, own=True, added=site.up_bias),),
    )
    down = taken(tensors[site.down], f"{site.module}.adapter_down.weight", turned=True)
    down_bias = taken(tensors[site.down_bias], f"{site.module}.adapter_down.bias")
    up = taken(tensors[site.up], f"{site.module}.adapter_up.weight", turned=True)
    for each in (both, down, down_bias, up):
        graph.declare(each.spec, f"{site.module}.weight")
    if found.product.op_type != "Gemm" and found.bias is None:
        raise _unexpected(site.module, f"an Add of {bias}", "none")
    plain, readers = found.product.output[0], list(graph.readers(found.product.output[0]))
    _check_width(graph, site.module, plain, down.spec.shape[0])
    rank = down.spec.shape[1]
    if found.product.op_type == "Gemm":
        del found.product.input[2:]
        z = graph.add("Gemm", [plain, down.spec.name, down_bias.spec.name], f"{path}/down", like=plain, last=rank)
        active = activate(graph, site.non_linearity, z, path)
        added = graph.add("Gemm", [active, up.spec.name, plain], f"{path}/up", like=plain)
        result = graph.add("Add", [added, both.spec.name], f"{path}/bias", like=plain)
    else:
        product = graph.add("MatMul", [plain, down.spec.name], f"{path}/down", like=plain, last=rank)
        z = graph.add("Add", [product, down_bias.spec.name], f"{path}/down_bias", like=product)
        active = activate(graph, site.non_linearity, z, path)
        change = graph.add("MatMul", [active, up.spec.name], f"{path}/up", like=plain)
        result = graph.add("Add", [plain, change], f"{path}/Add", like=plain)
        graph.reroute(found.bias, bias, both.spec.name)
    for reader in readers:
        graph.reroute(reader, plain, result)
    return both, down, down_bias, up


def _check_width(graph: Graph, module: str, read: str, width: int) -> None:
    if graph.axes(read)[-1:] != (width,):
        raise _unexpected(module, f"{width} columns, as the adapter needs", f"{read} {graph.axes(read)}")


def _unexpected(module: str, expected: str, found: str) -> Unsupported:
    return Unsupported(
        "the graph is not built as the adapter expects at this place",
        where=module,
        expected=expected,
        found=found,
        then=_FOLDER,
    )
