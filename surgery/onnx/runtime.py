"""What ONNX Runtime makes of a graph: the graph that runs after its own optimisation, and who runs which node.

The optimised graph is written to a scratch folder, weights and all, since the runtime's optimiser looks at their
values. Nothing is fed and nothing runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.onnx.canonical import Program, canonical
from surgery.onnx.difference import Difference
from surgery.onnx.graph_file import count_nodes, load_graph
from surgery.onnx.session import open_session

_SETTINGS = {
    "session.record_ep_graph_assignment_info": "1",
    "session.optimized_model_external_initializers_file_name": "weights",
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}


@dataclass(frozen=True)
class Optimised:
    """The graph that runs.

    Attributes:
        program: what it is.
        nodes: how many it has.
        assigned: how many nodes of each op each provider took: (provider, op) → nodes.
    """

    program: Program
    nodes: int
    assigned: Mapping[tuple[str, str], int]


def optimise(path: Path, provider: str) -> Optimised:
    """Loads a graph as for running it. Needs as much space for temporary files as the weights take.

    Args:
        path: the graph.
        provider: as ONNX Runtime spells it.

    Raises:
        ProviderUnavailable: ONNX Runtime would run it on another provider.
        Unsupported: it does not load the graph.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "optimised.onnx"
        session = open_session(path, provider, None, settings=_SETTINGS, optimised=out)
        counts: dict[tuple[str, str], int] = {}
        for part in session.get_provider_graph_assignment_info():
            for node in part.get_nodes():
                key = (part.ep_name, f"{node.domain}::{node.op_type}" if node.domain else node.op_type)
                counts[key] = counts.get(key, 0) + 1
        del session
        model = load_graph(out)
        program = canonical(model, out, folded=True)
    return Optimised(program, count_nodes(model), dict(sorted(counts.items())))


def assignment_difference(a: Optimised, b: Optimised) -> Difference | None:
    """The first op, by name, of which a provider takes another number of nodes; None where there is none."""
    for key in sorted({*a.assigned, *b.assigned}):
        if a.assigned.get(key, 0) != b.assigned.get(key, 0):
            provider, op = key
            texts = [f"{each.assigned.get(key, 0)} nodes" for each in (a, b)]
            return Difference(f"{op} on {provider}", *texts)
    return None
