"""Puts prompts into a graph: constant embeddings before the input's, with a longer sequence in everything after them.

Nodes before the embeddings keep the input's own length. Nodes after them read longer inputs: the mask is padded with
ones at the front, token types with zeros. Nodes that both need are duplicated. This module knows names and shapes; no
payload, no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from formats.grafts import PromptGraft
from formats.spec import TensorSpec
from surgery.errors import Unsupported
from surgery.onnx.adapters.graph import Graph
from surgery.onnx.adapters.image_prompt import find_embeddings, lengthen
from surgery.onnx.adapters.positions import count_places
from surgery.onnx.adapters.prefix import batches
from surgery.onnx.files.made import Made, Part

if TYPE_CHECKING:
    import onnx

PROMPT = "prompt.embedding"  # (1, length, width) in the payload
_TOKENS, _MASK = "input_ids", "attention_mask"
_THEN = "the model's class computes embeddings differently: report the class and its config.json"


def graft_prompt(graph: Graph, site: PromptGraft, tensors: Mapping[str, TensorSpec]) -> tuple[Made, ...]:
    """Puts a prompt into a graph, and returns the tensor that the payload then needs. Outputs per token also get rows
    for the prompt.

    Args:
        graph: the graph, changed in place.
        site: the prompt and its place.
        tensors: the grafts' tensors.

    Raises:
        Unsupported: the embeddings were not found, or the graph reads the tokens after the embeddings.
    """
    length, width = tensors[site.embedding].shape
    if site.among_words:
        count_places(graph)
    of_image = _TOKENS not in graph.inputs and not site.among_words
    end = find_embeddings(graph) if of_image else _embeddings(graph, site)
    if graph.axes(end)[-1:] != (width,):
        raise Unsupported(
            "the prompt's width differs from that of the graph's embeddings",
            where=end,
            expected=f"{graph.axes(end)[-1:]}",
            found=width,
            then="check that the adapter was made for this model",
        )
    tokens = graph.axes(end)[1]
    if isinstance(tokens, int):
        lengthen(graph, end, length)
        after: int | str = tokens + length
    else:
        longer = _Longer(graph, end, length)
        longer.go_through()
        after = longer.axis
    made = Made(TensorSpec(PROMPT, tensors[site.embedding].dtype, (1, length, width)), (Part(site.embedding),))
    graph.declare(made.spec, end)
    every = graph.add(
        "Expand", [PROMPT, batches(graph, 3)], "prompt/Expand", [("prompt/Expand", end, ("batch", length, width))]
    )
    if site.after_first:
        parts = [("prompt/first", end, ("batch", 1, width)), ("prompt/rest", end, ())]
        one, big = graph.integers(1), graph.integers(2**62)
        zero, axis = graph.integers(0), graph.integers(1)
        graph.add("Slice", [end, zero, one, axis], "prompt/first", [parts[0]])
        graph.add("Slice", [end, one, big, axis], "prompt/rest", [parts[1]])
        pieces = ["prompt/first", every, "prompt/rest"]
    else:
        pieces = [every, end]
    own = {"prompt/first", "prompt/rest"}
    readers = [node for node in graph.readers(end) if node.name not in own]
    axes = ("batch", after, width)
    joined = graph.add("Concat", pieces, "prompt/Concat", [("prompt/Concat", end, axes)], axis=1)
    for node in readers:
        graph.reroute(node, end, joined)
    return (made,)


def _embeddings(graph: Graph, site: PromptGraft) -> str:
    """The value before which a prompt is put: the word embeddings, or the output of the whole embedding block."""
    end: str = _words(graph).output[0]
    while not site.among_words and len(graph.readers(end)) == 1:
        node = graph.readers(end)[0]
        if node.op_type not in ("Add", "LayerNormalization", "MatMul", "Gemm", "Reshape"):
            raise _unexpected("the sum and the norm of embeddings", node)
        end = node.output[0]
    return end


def _words(graph: Graph) -> onnx.NodeProto:
    """The node that looks up the tokens' embeddings."""
    value = _TOKENS
    while True:
        readers = [node for node in graph.readers(value) if node.op_type in ("Gather", "Reshape")]
        readers = [node for node in readers if value in (node.input[1], node.input[0])]
        tables = [node for node in readers if node.op_type == "Gather" and node.input[0] in graph.initialisers]
        if len(tables) == 1:
            return tables[0]
        if len(tables) > 1 or len(readers) != 1:
            raise _unexpected("one Gather of the tokens' embeddings", (tables or readers or [None])[0])
        value = readers[0].output[0]


@dataclass
class _Longer:
    """The part of a graph after the embeddings, which gets more tokens than the inputs have.

    Attributes:
        graph: the graph, changed in place.
        end: the value of the embeddings.
        length: number of additional tokens.
        made: longer replacements made so far, by the name of the value before.
    """

    graph: Graph
    end: str
    length: int
    made: dict[str, str] = field(default_factory=dict)

    @property
    def axis(self) -> str:
        """The name of the longer axis."""
        return f"{self.length} + sequence"

    def go_through(self) -> None:
        """Lets the nodes after the embeddings read longer replacements of earlier values."""
        graph, before = self.graph, self._before()
        behind = [node for node in graph.nodes if node.output[0] not in before]
        for node in behind:
            for name in dict.fromkeys(node.input):
                if name != self.end and (name in before or name in graph.inputs):
                    new = self._instead(name, node, before)
                    if new != name:
                        graph.reroute(node, name, new)
        for node in behind:
            for name in node.output:
                graph.rename_axis(name, "sequence", self.axis)

    def _before(self) -> set[str]:
        """The values from which the embeddings are computed."""
        found, pending = set(), [self.end]
        while pending:
            node = self.graph.maker(pending.pop())
            if node is not None and node.output[0] not in found:
                found.update(node.output)
                pending += node.input
        return found

    def _instead(self, name: str, reader: onnx.NodeProto, before: set[str]) -> str:
        """The value that a node reads instead of an earlier one: the same value computed from longer inputs, if it
        depends on their length."""
        graph = self.graph
        if name in graph.inputs:
            if name == _TOKENS and reader.op_type != "Shape":
                raise _unexpected("no use of the tokens after their embeddings", reader)
            if name not in self.made:
                padded, pads = f"{name}/prompt", graph.integers(0, self.length, 0, 0)
                inputs = [name, pads, *([graph.integer(1)] if name == _MASK else [])]
                self.made[name] = graph.add("Pad", inputs, padded, [(padded, name, (graph.axes(name)[0], self.axis))])
            return self.made[name]
        if name not in before or name == self.end:
            return name
        if name not in self.made:
            node = graph.makers[name]
            inputs = [self._instead(each, node, before) for each in node.input]
            if inputs == list(node.input):
                self.made.update({each: each for each in node.output})
            else:
                self._copy(node, inputs)
        return self.made[name]

    def _copy(self, node: onnx.NodeProto, inputs: list[str]) -> None:
        from onnx.helper import get_attribute_value

        attributes = {each.name: get_attribute_value(each) for each in node.attribute}
        outputs = [(f"{each}/prompt", each, self.graph.axes(each)) for each in node.output]
        self.graph.add(node.op_type, inputs, f"{node.name}/prompt", outputs, **attributes)
        for old, (new, _, _) in zip(node.output, outputs, strict=True):
            self.made[old] = new
            self.graph.rename_axis(new, "sequence", self.axis)


def _unexpected(expected: str, node: onnx.NodeProto | None) -> Unsupported:
    return Unsupported(
        "the graph's embeddings are not built as a prompt needs them",
        expected=expected,
        found="nothing" if node is None else f"{node.op_type} ({node.name})",
        then=_THEN,
    )
