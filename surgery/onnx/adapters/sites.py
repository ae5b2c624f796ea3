"""Puts the grafts that fold leaves into a graph: bottlenecks, prefixes and prompts, one after the other.

Also returns which tensors the payload then holds, and from what they are made. This module knows names and shapes; it
reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from formats.grafts import BranchGraft, Graft, PrefixGraft, PromptGraft
from formats.spec import TensorSpec
from surgery.onnx.adapters.bottleneck import HALF, graft_branch
from surgery.onnx.adapters.graph import Graph
from surgery.onnx.adapters.positions import move_positions
from surgery.onnx.adapters.prefix import graft_prefix
from surgery.onnx.adapters.prompt import graft_prompt
from surgery.onnx.files.made import Made

if TYPE_CHECKING:
    import onnx

WAYS = ("branch", HALF)


def graft_sites(
    model: onnx.ModelProto,
    sites: Sequence[Graft],
    tensors: Mapping[str, TensorSpec],
    weights: Mapping[str, TensorSpec],
    turned: frozenset[str],
    way: str,
) -> tuple[onnx.ModelProto, tuple[Made, ...]]:
    """A copy of the graph with all grafts in it, and the tensors that it needs in addition to the model's own.

    Args:
        model: the graph of a template, or an exported graph.
        sites: the grafts and their places.
        tensors: the grafts' tensors.
        weights: the model's tensors.
        turned: the modules whose weights are stored (in, out).
        way: "branch", or "half-folded" for bottlenecks with the same input as a projection.

    Raises:
        Unsupported: the graph is not built as a graft expects.
    """
    graph, made = Graph(model), list[Made]()
    for site in sorted(sites, key=lambda site: not isinstance(site, PromptGraft)):  # first prompts: they change lengths
        if isinstance(site, BranchGraft):
            made += graft_branch(graph, site, tensors, weights, turned=site.module in turned, way=way)
        elif isinstance(site, PrefixGraft):
            made += graft_prefix(graph, site, tensors, turned=site.module in turned)
        else:
            made += graft_prompt(graph, site, tensors)
    for length in _moving(sites, {name: spec.shape for name, spec in tensors.items()}):
        move_positions(graph, length)
    return graph.finish(), tuple(made)


Shapes = Mapping[str, tuple[int, ...]]  # shapes of the grafts' tensors, by name


def tokens_added(sites: Sequence[Graft], shapes: Shapes) -> int:
    """The number of tokens that the outputs have in addition to the input's."""
    return sum(shapes[site.embedding][0] for site in sites if isinstance(site, PromptGraft))


def positions_taken(sites: Sequence[Graft], shapes: Shapes) -> int:
    """The number of the model's positions that the input can no longer use."""
    among = (shapes[site.embedding][0] for site in sites if isinstance(site, PromptGraft) and site.among_words)
    return sum([*among, *_moving(sites, shapes)])


def _moving(sites: Sequence[Graft], shapes: Shapes) -> set[int]:
    prefixes = (site for site in sites if isinstance(site, PrefixGraft) and site.moves_positions)
    return {shapes[site.keys][0] for site in prefixes}
