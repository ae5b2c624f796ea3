"""Shows what ONNX Runtime makes of a graph: the graph after its own optimisation, which provider runs which node, and
the shapes.

The optimised graph is written to a scratch folder together with its weights, because the optimiser reads their values.
Then it runs once on zeros with profiling; zeros suffice, because shapes do not depend on values.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.onnx.files.graph_file import count_nodes, load_graph
from surgery.onnx.run.session import open_session
from surgery.onnx.same_program.canonical import CanonicalProgram, canonical
from surgery.onnx.same_program.cost import Executed, Operand
from surgery.onnx.same_program.difference import ProgramDifference

if TYPE_CHECKING:
    import numpy as np
    import onnx

_ITEMSIZES = {
    "bool": 1, "uint8": 1, "int8": 1, "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2, "float": 4, "int32": 4,
    "uint32": 4, "double": 8, "int64": 8, "uint64": 8,
}  # fmt: skip
_SETTINGS = {
    "session.disable_prepacking": "1",  # the profile omits weights that a kernel has repacked
    "session.optimized_model_external_initializers_file_name": "weights",
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}


@dataclass(frozen=True)
class Optimised:
    """The optimised graph that runs.

    Attributes:
        program: its canonical program.
        nodes: number of nodes.
        assigned: number of nodes of each op that each provider took: (provider, op) → nodes.
        executed: the nodes that ran; empty if the graph does not run at this shape.
        refusal: the reason why it does not run.
    """

    program: CanonicalProgram
    nodes: int
    assigned: Mapping[tuple[str, str], int]
    executed: tuple[Executed, ...]
    refusal: str


def optimise(path: Path, provider: str, shape: tuple[int, int]) -> Optimised:
    """Loads a graph as if to run it. Needs as much space for temporary files as the weights take.

    Args:
        path: the graph.
        provider: the provider, as ONNX Runtime spells it.
        shape: batch and sequence. Batch is the length of every input's first axis, if that is free; sequence is the
            length of every other free axis.

    Raises:
        ProviderUnavailable: ONNX Runtime would run the graph on another provider.
        Unsupported: ONNX Runtime does not load the graph.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "optimised.onnx"
        profile = Path(scratch) / "profile"
        session = open_session(path, provider, None, settings=_SETTINGS, optimised=out, profile=profile)
        counts: dict[tuple[str, str], int] = {}
        for part in session.get_provider_graph_assignment_info():
            for node in part.get_nodes():
                key = (part.ep_name, f"{node.domain}::{node.op_type}" if node.domain else node.op_type)
                counts[key] = counts.get(key, 0) + 1
        refusal = ""
        try:
            session.run(None, zeros(load_graph(path), shape))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            refusal = str(error)
        events = json.loads(Path(session.end_profiling()).read_bytes())
        del session
        model = load_graph(out)
        program = canonical(model, out, folded=True)
    executed = () if refusal else tuple(map(_executed, filter(_is_node, events)))
    return Optimised(program, count_nodes(model), dict(sorted(counts.items())), executed, refusal)


def zeros(model: onnx.ModelProto, shape: tuple[int, int]) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Zeros for each input. An axis whose name is a sum, such as `past + sequence`, has the sum of their lengths."""
    import numpy as np
    import onnx

    given = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in given]
    named: dict[str, int] = {}
    for value in inputs:
        for place, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param and "+" not in dim.dim_param:
                named.setdefault(dim.dim_param, shape[min(place, 1)])

    def length(dim: Any, place: int) -> int:
        if dim.HasField("dim_value"):
            return int(dim.dim_value)
        parts = [part.strip() for part in dim.dim_param.split("+")] if dim.dim_param else []
        return sum(int(part) if part.isdigit() else named.get(part, shape[1]) for part in parts) or shape[min(place, 1)]

    feeds = {}
    for value in inputs:
        tensor = value.type.tensor_type
        sizes = [length(dim, place) for place, dim in enumerate(tensor.shape.dim)]
        feeds[value.name] = np.zeros(sizes, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return feeds


def _is_node(event: Mapping[str, Any]) -> bool:
    return event.get("cat") == "Node" and event["name"].endswith("_kernel_time")


def _executed(event: Mapping[str, Any]) -> Executed:
    args = event["args"]
    inputs, outputs = (tuple(map(_operand, args.get(f"{side}_type_shape", ()))) for side in ("input", "output"))
    return Executed(args["op_name"], args.get("provider", ""), inputs, outputs)


def _operand(said: Mapping[str, list[int]]) -> Operand:
    """From `{"float": [1, 128, 384]}`."""
    ((kind, shape),) = said.items()
    return Operand(tuple(shape), _ITEMSIZES.get(kind, 8))


def assignment_difference(a: Optimised, b: Optimised) -> ProgramDifference | None:
    """The first op, by name, for which a provider takes or runs a different number of nodes; None if there is none."""
    for verb, counts in (("taken by", [a.assigned, b.assigned]), ("run by", [_kernels(a), _kernels(b)])):
        for key in sorted({*counts[0], *counts[1]}):
            if counts[0].get(key, 0) != counts[1].get(key, 0):
                provider, op = key
                return ProgramDifference(f"{op} {verb} {provider}", *(f"{each.get(key, 0)} nodes" for each in counts))
    return None


def _kernels(optimised: Optimised) -> Mapping[tuple[str, str], int]:
    return Counter((node.provider, node.op) for node in optimised.executed)
