"""What ONNX Runtime makes of a graph: the graph that runs after its own optimisation, who runs which node, and of what
shapes.

The optimised graph is written to a scratch folder, weights and all, since the runtime's optimiser looks at their
values. Then it runs once, profiled, on zeros: they have the shapes of any other numbers.
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
    "session.disable_prepacking": "1",  # a weight that a kernel has repacked is missing from the profile
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
        executed: the nodes that ran; none where the graph does not run at this shape.
        refusal: why it does not.
    """

    program: CanonicalProgram
    nodes: int
    assigned: Mapping[tuple[str, str], int]
    executed: tuple[Executed, ...]
    refusal: str


def optimise(path: Path, provider: str, shape: tuple[int, int]) -> Optimised:
    """Loads a graph as for running it. Needs as much space for temporary files as the weights take.

    Args:
        path: the graph.
        provider: as ONNX Runtime spells it.
        shape: batch, the first axis of every input that is free there; and sequence, every other free axis.

    Raises:
        ProviderUnavailable: ONNX Runtime would run it on another provider.
        Unsupported: it does not load the graph.
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
        except Exception as error:  # its exceptions share no base class of their own
            refusal = str(error)
        events = json.loads(Path(session.end_profiling()).read_bytes())
        del session
        model = load_graph(out)
        program = canonical(model, out, folded=True)
    executed = () if refusal else tuple(map(_executed, filter(_is_node, events)))
    return Optimised(program, count_nodes(model), dict(sorted(counts.items())), executed, refusal)


def zeros(model: onnx.ModelProto, shape: tuple[int, int]) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Something to feed each input. An axis that is called after others, such as `past + sequence`, is their sum."""
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
    """The first op, by name, of which a provider takes, or runs, another number of nodes; None where there is none."""
    for verb, counts in (("taken by", [a.assigned, b.assigned]), ("run by", [_kernels(a), _kernels(b)])):
        for key in sorted({*counts[0], *counts[1]}):
            if counts[0].get(key, 0) != counts[1].get(key, 0):
                provider, op = key
                return ProgramDifference(f"{op} {verb} {provider}", *(f"{each.get(key, 0)} nodes" for each in counts))
    return None


def _kernels(optimised: Optimised) -> Mapping[tuple[str, str], int]:
    return Counter((node.provider, node.op) for node in optimised.executed)
