"""What a run of a graph costs: floating-point operations, and bytes read and written, node by node.

Counted from the shapes of what each node took and gave. A product counts two operations for each multiplication. Every
other op that computes counts one for each element of its largest operand, a convention: what it really takes depends on
the kernel. Ops that only move or rename elements count none. Bytes are those of a node's inputs and outputs, as if no
cache held any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

Shape = tuple[int, ...]

_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Shape", "Size", "Squeeze", "Unsqueeze"})
_AROUND = frozenset({"If", "Loop", "Scan"})  # the nodes within are counted by themselves
_MOVES = frozenset(
    {
        "Cast", "Compress", "Concat", "ConstantOfShape", "DepthToSpace", "Expand", "EyeLike", "Gather",
        "GatherElements", "GatherND", "MemcpyFromHost", "MemcpyToHost", "NonZero", "OneHot", "Pad", "Range",
        "ReorderInput", "ReorderOutput", "Resize", "ScatterElements", "ScatterND", "Slice", "SpaceToDepth", "Split",
        "Tile", "Transpose", "Trilu",
    }
)  # fmt: skip
# Ops whose operands' shapes do not tell their cost, or not by these rules.
_OPAQUE = frozenset(
    {
        "ConvInteger", "DecoderMaskedMultiHeadAttention", "DeformConv", "Det", "DFT", "DynamicQuantizeMatMul", "Einsum",
        "GRU", "LSTM", "MatMulBnb4", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "MoE",
        "PackedAttention", "PackedMultiHeadAttention", "QAttention", "QGemm", "QLinearConv", "QLinearMatMul", "QMoE",
        "RNN", "STFT",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """What a node took or gave: its shape, and bytes of an element."""

    shape: Shape
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Executed:
    """A node that ran: its op, who ran it, and what it took and gave, left-out inputs left out."""

    op: str
    provider: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]


@dataclass(frozen=True)
class Tally:
    """Of all nodes of one op: how many, their floating-point operations, and the bytes they move."""

    nodes: int
    flops: int
    nbytes: int


@dataclass(frozen=True)
class Cost:
    """Of a run: in all, by op, and the ops that could not be counted."""

    flops: int
    nbytes: int
    by_op: Mapping[str, Tally]
    uncounted: tuple[str, ...]


def cost(nodes: Iterable[Executed]) -> Cost:
    """Counts a run."""
    by_op: dict[str, Tally] = {}
    uncounted = []
    for node in nodes:
        rule = _rule(node)
        if rule is None:
            uncounted.append(node.op)
            continue
        flops = rule([each.shape for each in node.inputs], [each.shape for each in node.outputs])
        past = by_op.get(node.op, Tally(0, 0, 0))
        by_op[node.op] = Tally(past.nodes + 1, past.flops + flops, past.nbytes + _moved(node))
    flops, nbytes = (sum(getattr(each, name) for each in by_op.values()) for name in ("flops", "nbytes"))
    return Cost(flops, nbytes, dict(sorted(by_op.items())), tuple(sorted(uncounted)))


def _moved(node: Executed) -> int:
    if node.op in _VIEWS or node.op in _AROUND:
        return 0
    written = sum(each.nbytes for each in node.outputs)
    if node.op in ("Gather", "GatherElements", "GatherND", "Slice"):  # of the first input, only what is taken
        return 2 * written + sum(each.nbytes for each in node.inputs[1:])
    return written + sum(each.nbytes for each in node.inputs)


_Rule = Callable[[Sequence[Shape], Sequence[Shape]], int]


def _rule(node: Executed) -> _Rule | None:
    """What counts a node's operations; None where nothing here does."""
    if node.op in _OPAQUE:
        return None
    if node.op in _VIEWS or node.op in _MOVES or node.op in _AROUND:
        return _nothing
    return _PRODUCTS.get(node.op, _elementwise)


def _nothing(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    return 0


def _elementwise(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    return max(map(math.prod, (*inputs, *outputs)), default=0)


def _matmul(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """Of (…, M, K) or its transpose and (…, K, N) or its: the axis of the first that is not the result's M is K."""
    first, result = inputs[0], outputs[0]
    turned = len(first) > 1 and len(result) > 1 and first[-2] != result[-2] and len(first) == len(result)
    return 2 * math.prod(result) * first[-2 if turned else -1]


def _gemm(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    return _matmul(inputs, outputs) + (math.prod(outputs[0]) if len(inputs) > 2 else 0)


def _conv(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    weight = inputs[1]  # (out, in / groups, *kernel)
    return math.prod(outputs[0]) * (2 * math.prod(weight[1:]) + (len(inputs) > 2))


def _conv_transpose(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    weight = inputs[1]  # (in, out / groups, *kernel)
    return 2 * math.prod(inputs[0]) * math.prod(weight[1:]) + (math.prod(outputs[0]) if len(inputs) > 2 else 0)


def _attention(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """Scores and their product with the values, over the keys that there are; and com.microsoft's own projection."""
    query, key = inputs[0], inputs[1] if len(inputs) > 1 else ()
    if len(key) < 2:  # all three in one, and perhaps a bias
        return 4 * math.prod(outputs[0]) * query[1]
    if len(query) == 3 and len(key) == 2:  # (batch, length, width) and all weights (width, 3 · width)
        return 2 * math.prod(query) * key[1] + 4 * math.prod(outputs[0]) * query[1]
    return 4 * math.prod(outputs[0]) * (key[1] if len(key) in (3, 5) else key[-2])


def _grouped_attention(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    return 4 * math.prod(outputs[0]) * (outputs[1][2] if len(outputs) > 1 else inputs[0][1])  # (batch, heads, keys, …)


_PRODUCTS: Mapping[str, _Rule] = MappingProxyType(
    {
        "MatMul": _matmul,
        "FusedMatMul": _matmul,
        "Gemm": _gemm,
        "FusedGemm": _gemm,
        "Conv": _conv,
        "FusedConv": _conv,
        "NhwcFusedConv": _conv,
        "ConvTranspose": _conv_transpose,
        "Attention": _attention,
        "MultiHeadAttention": _attention,
        "GroupQueryAttention": _grouped_attention,
    }
)
