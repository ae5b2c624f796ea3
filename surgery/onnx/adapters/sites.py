"""What a fold leaves to the graph, put there: bottlenecks, prefixes and prompts at their sites, one after the other.

Says too which tensors the payload then holds, and of what they are made. Knows names and shapes; reads nothing.
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
    """The graph with all of them in it, and the tensors that it needs besides the model's own.

    Args:
        model: a template's, or an exported graph; it is left as it is.
        sites: what is put where.
        tensors: the grafts' own.
        weights: the model's.
        turned: the modules whose weights are stored (in, out).
        way: "branch", or "half-folded" for what reads what a projection reads.

    Raises:
        Unsupported: a site that does not look as expected.
    """
    graph, made = Graph(model), list[Made]()
    for site in sorted(sites, key=lambda site: not isinstance(site, PromptGraft)):  # which changes all lengths
        if isinstance(site, BranchGraft):
            made += graft_branch(graph, site, tensors, weights, turned=site.module in turned, way=way)
        elif isinstance(site, PrefixGraft):
            made += graft_prefix(graph, site, tensors, turned=site.module in turned)
        else:
            made += graft_prompt(graph, site, tensors)
    for length in _moving(sites, {name: spec.shape for name, spec in tensors.items()}):
        move_positions(graph, length)
    return graph.finish(), tuple(made)


Shapes = Mapping[str, tuple[int, ...]]  # of the grafts' tensors, by name


def tokens_added(sites: Sequence[Graft], shapes: Shapes) -> int:
    """How many tokens more than the input the outputs have."""
    return sum(shapes[site.embedding][0] for site in sites if isinstance(site, PromptGraft))


def positions_taken(sites: Sequence[Graft], shapes: Shapes) -> int:
    """How many of the model's positions the input cannot have."""
    among = (shapes[site.embedding][0] for site in sites if isinstance(site, PromptGraft) and site.among_words)
    return sum([*among, *_moving(sites, shapes)])


def _moving(sites: Sequence[Graft], shapes: Shapes) -> set[int]:
    prefixes = (site for site in sites if isinstance(site, PrefixGraft) and site.moves_positions)
    return {shapes[site.keys][0] for site in prefixes}
