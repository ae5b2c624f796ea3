"""Checks that a graph computes the same as the model.

Runs the model in torch, loaded by its own library, and its graphs with their payload in ONNX Runtime on the CPU, on the
same random inputs, and compares the outputs. The model's kind decides which inputs are tried. The payload is passed as
open files, so that the check sees what is written before the output appears.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formats import DType
from surgery.errors import Unsupported, VerificationFailed
from surgery.onnx.trace.architecture import quiet
from surgery.onnx.trace.program import Arrays, Exportable, Runtime

if TYPE_CHECKING:
    import onnx

# The cost of one rounding, with some room. In float16 both runtimes accumulate in float32 and round only what they
# store. A bfloat16 graph computes in float32 (see `widened`), and only its constants are rounded, which torch has exact.
_ROUNDING = {DType.F32: 16 * 2.0**-23, DType.F16: 4 * 2.0**-10, DType.BF16: 2.0**-8}
_PRODUCTS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True)
class Verification:
    """The result of the comparison.

    Attributes:
        shapes: shape of the first input of each comparison; with a cache, batch size and tokens so far.
        max_abs_error: the largest absolute difference over all outputs at valid tokens.
        max_rel_error: the largest difference relative to its output's largest value.
        worst: the output with the largest relative difference, and the shape at which it occurred.
        tolerance: the limit for max_rel_error.
        float32_error: max_rel_error relative to the model in float32; None if the graph computes in float32. For
            bfloat16 this is the cost of rounding the weights.
        nodes_run: number of nodes that ONNX Runtime executed after its own optimisation, by the graph's prefix.
    """

    shapes: tuple[tuple[int, ...], ...]
    max_abs_error: float
    max_rel_error: float
    worst: str
    tolerance: float
    float32_error: float | None
    nodes_run: Mapping[str, int]


@dataclass(frozen=True)
class Errors:
    """The shapes tried, the largest absolute and relative differences, and where the latter occurred."""

    shapes: tuple[tuple[int, ...], ...]
    largest: float
    relative: float
    worst: str


def verify_graphs(
    model: Exportable, graphs: Mapping[str, bytes], payload: Mapping[str, int], dtype: DType, *, seed: int = 0
) -> Verification:
    """Compares torch with ONNX Runtime.

    ONNX Runtime's CPU provider cannot run bfloat16. So for bfloat16 both sides use bfloat16 weights and compute in
    float32.

    Args:
        model: the model and how it is used.
        graphs: the bytes of its `.onnx` files, by prefix.
        payload: descriptors of the weights' files, open for reading, by the names that the graphs use.
        dtype: the dtype in which the graphs compute.
        seed: seed of the random inputs.

    Raises:
        VerificationFailed: the outputs differ by more than the tolerance, or one of them is not finite.
        Unsupported: a graph does not load.
    """
    from surgery.onnx.against_torch.widened import widened

    narrow = dtype is DType.BF16
    runnable = {prefix: widened(graph) for prefix, graph in graphs.items()} if narrow else graphs
    with sessions(model, runnable, payload) as runtime:
        module = model.load(dtype)
        found = errors_of(model, module.float() if narrow else module, runtime, seed)
        del module
        exact = None if dtype is DType.F32 else errors_of(model, model.load(DType.F32), runtime, seed).relative
        nodes = runtime.nodes_run()
    limit = limit_of(dtype, graphs)
    if not found.relative <= limit:
        raise VerificationFailed(
            "ONNX Runtime's outputs differ from torch's; nothing was written",
            where=f"{model.where}: {found.worst}",
            expected=f"a relative difference of at most {limit:.2g}",
            found=f"{found.relative:.2g} (absolute {found.largest:.2g})",
            then="please report this model's class and config.json",
        )
    return Verification(found.shapes, found.largest, found.relative, found.worst, limit, exact, nodes)


def errors_of(model: Exportable, module: Any, runtime: Runtime, seed: int) -> Errors:
    """The differences between the graphs' and the module's outputs, on the inputs that the model's kind defines."""
    import torch

    shapes: dict[tuple[int, ...], None] = {}
    by_output: dict[str, tuple[float, float, str]] = {}  # difference, scale, and where the difference is
    with torch.no_grad(), quiet():
        for each in model.kind.compare(module, runtime, seed):
            shapes[each.shape] = None
            difference, scale = distance(each.reference, each.found, each.valid)
            worst, size, where = by_output.get(each.output, (-1.0, 0.0, ""))
            if difference > worst:
                worst, where = difference, f"{each.output} at {' × '.join(map(str, each.shape))}"
            by_output[each.output] = (worst, max(size, scale), where)
    rel, where = max((relative(*sizes), where) for *sizes, where in by_output.values())
    return Errors(tuple(shapes), max(largest for largest, _, _ in by_output.values()), rel, where)


def tolerance(dtype: DType, matmuls: int) -> float:
    """The relative difference that rounding can explain.

    Each product rounds its result once and passes on earlier errors. Rounding errors of random sign add up like a
    random walk, so they grow with the square root of their number. The limit is ten times what we measured.
    """
    return _ROUNDING[dtype] * math.sqrt(max(matmuls, 1))


def limit_of(dtype: DType, graphs: Mapping[str, bytes]) -> float:
    """The tolerance for graphs that compute in a dtype."""
    return tolerance(dtype, sum(map(_products, graphs.values())))


def distance(reference: Any, output: Any, valid: Any = None) -> tuple[float, float]:
    """The largest absolute difference (inf if shapes differ or a value is not finite) and the largest reference value.

    Args:
        reference, output: (batch, …), or (batch, sequence, …) with `valid`.
        valid: (batch, sequence) bool, the tokens to compare; None for all.
    """
    import numpy as np

    if reference.shape != output.shape:
        return math.inf, 0.0
    a, b = (array.astype(np.float64) for array in (reference, output))
    if valid is not None:
        a, b = a[valid], b[valid]  # (tokens, …)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf, 0.0
    return float(np.abs(a - b).max()), float(np.abs(a).max())


def relative(difference: float, scale: float) -> float:
    """A difference relative to the size of its output over all shapes, because logits that happen to be near zero for
    one input still carry the rounding errors of larger terms."""
    return difference / scale if scale else (math.inf if difference else 0.0)


def check_structure(graph: onnx.ModelProto, where: Path) -> None:
    """Runs ONNX's own checker with shape inference.

    The checker requires external data to exist under its name, which the payload does not have yet, so weights are
    passed to it as inputs. Raises Unsupported if an op does not accept its inputs, such as a bfloat16 convolution in
    the opset that we write.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph)
    weights = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in weights:
        model.graph.initializer.remove(tensor)
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise Unsupported(
            "the model cannot be written as valid ONNX; nothing was written",
            where=where,
            found=error,
            then="choose another --dtype if an op does not accept this one",
        ) from error


def _products(graph: bytes) -> int:
    import onnx

    return sum(node.op_type in _PRODUCTS for node in onnx.load_model_from_string(graph).graph.node)


class Sessions:
    """ONNX Runtime's sessions for a model's graphs. Implements Runtime."""

    def __init__(self, opened: Mapping[str, Any]) -> None:
        self._opened = opened

    def run(self, prefix: str, feed: Arrays) -> dict[str, Any]:
        """As in Runtime."""
        import numpy as np

        session = self._opened[prefix]
        half = {entry.name for entry in session.get_inputs() if entry.type == "tensor(float16)"}
        cast = {name: array.astype(np.float16) if name in half else array for name, array in feed.items()}
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, cast), strict=True))

    def axes(self, prefix: str, output: str) -> tuple[int | str | None, ...]:
        """As in Runtime."""
        shapes = {each.name: each.shape for each in self._opened[prefix].get_outputs()}
        return tuple(shapes[output])

    def nodes_run(self) -> dict[str, int]:
        """The number of nodes that each graph executed. Nothing can be run afterwards."""
        counts = {}
        for prefix, session in self._opened.items():
            with open(session.end_profiling(), encoding="utf-8") as stream:
                events = json.load(stream)
            kernels = (event for event in events if event["name"].endswith("_kernel_time"))
            counts[prefix] = len({event["args"]["node_index"] for event in kernels})
        return counts


@contextlib.contextmanager
def sessions(model: Exportable, graphs: Mapping[str, bytes], payload: Mapping[str, int]) -> Iterator[Sessions]:
    """Opens the graphs with their payload, given as open files. Raises Unsupported if one does not load."""
    import numpy as np
    import onnxruntime

    opened: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        mapped = [stack.enter_context(mmap.mmap(file, 0, prot=mmap.PROT_READ)) for file in payload.values()]
        try:
            for prefix, graph in graphs.items():
                options = onnxruntime.SessionOptions()
                options.enable_profiling = True
                options.log_severity_level = 3  # it would warn about every input with a default, as adapters have
                options.profile_file_prefix = f"{scratch}/{prefix}profile"
                views = [np.frombuffer(each, np.uint8) for each in mapped]
                sizes = [view.nbytes for view in views]
                try:
                    options.add_external_initializers_from_files_in_memory([*payload], views, sizes)
                    opened[prefix] = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
                except Exception as error:  # its exceptions share no base class of their own
                    raise Unsupported(
                        "ONNX Runtime does not load the graph; nothing was written",
                        where=model.where,
                        found=error,
                        then="update ONNX Runtime, or choose another --dtype",
                    ) from error
                finally:
                    del views, options  # otherwise the mappings cannot be closed
            yield Sessions(opened)
        finally:
            opened.clear()
