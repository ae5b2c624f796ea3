"""Does a graph with an adapter in it compute what the merged weights compute?

ONNX Runtime runs both on the same inputs: the grafted graph, and the base graph with the adapted weights as inputs,
which are given merged. `verify` has compared the base graph with torch, so this leads the outputs back to torch's.
Knows neither adapters nor how they are merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from formats import DType
from surgery.errors import VerificationFailed
from surgery.onnx.architecture import Architecture
from surgery.onnx.graft import with_inputs
from surgery.onnx.verify import distance, random_feeds, relative, run_onnxruntime, tolerance

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, np.ndarray[Any, np.dtype[Any]]]  # by name


@dataclass(frozen=True)
class Case:
    """One comparison: what the grafted graph is given, and what the base graph is given for the same outputs.

    Attributes:
        name: for messages.
        factors: A and B of a graph that takes them as inputs; empty for none.
        merged: the adapted weights with the adapter merged into them; empty for the base's own.
    """

    name: str
    factors: Arrays
    merged: Arrays


@dataclass(frozen=True)
class Agreement:
    """What the comparison found: as `verify.Verification`, over all cases."""

    max_abs_error: float
    max_rel_error: float
    tolerance: float
    nodes_run: int


def check_graft(
    architecture: Architecture, graph: bytes, grafted: bytes, payload: int, dtype: DType, case: Case
) -> Agreement:
    """Compares one case.

    Args:
        architecture: of the model.
        graph: the base's, pointing into the payload.
        grafted: the same with the adapter in it.
        payload: a descriptor of the payload's file, open for reading.
        dtype: of the weights.
        case: what to compare.

    Raises:
        VerificationFailed: they differ by more than rounding explains.
        Unsupported: a graph does not load.
    """
    import onnx

    base = onnx.load_model_from_string(graph)
    reference = with_inputs(base, list(case.merged)).SerializeToString(deterministic=True)
    feeds = random_feeds(architecture, 0)
    expected = run_onnxruntime(architecture, reference, payload, [{**feed, **case.merged} for feed in feeds])
    found = run_onnxruntime(architecture, grafted, payload, [{**feed, **case.factors} for feed in feeds])
    names, worst_abs, worst_rel, where = found[0], 0.0, 0.0, ""
    for index, name in enumerate(names):
        sizes = [distance(a[index], b[index]) for a, b in zip(expected[2], found[2], strict=True)]
        difference, scale = (max(each) for each in zip(*sizes, strict=True))
        worst_abs = max(worst_abs, difference)
        if relative(difference, scale) > worst_rel:
            worst_rel, where = relative(difference, scale), name
    products = sum(node.op_type in ("MatMul", "Gemm") for node in onnx.load_model_from_string(grafted).graph.node)
    limit = tolerance(dtype, products)
    if not worst_rel <= limit:
        raise VerificationFailed(
            "the graph's outputs are not those of the merged weights; nothing was written",
            where=f"{architecture.folder}, {case.name}: {where}",
            expected=f"a relative difference of at most {limit:.2g}",
            found=f"{worst_rel:.2g} (absolute {worst_abs:.2g})",
            then="merge the adapter instead, and please report the model's class and the adapter's config",
        )
    return Agreement(worst_abs, worst_rel, limit, found[3])


def worst(found: Sequence[Agreement]) -> Agreement:
    """All cases as one."""
    return Agreement(
        max(each.max_abs_error for each in found),
        max(each.max_rel_error for each in found),
        found[0].tolerance,
        found[0].nodes_run,
    )
