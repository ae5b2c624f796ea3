"""Does the graph compute what the model computes?

Runs transformers' own loading of the folder in torch, and the graph over its payload in ONNX Runtime on the CPU, on
the same random inputs, and compares. Loading goes through `from_pretrained` on purpose: the comparison also checks
that our reading of names, prefixes and ties is theirs. Takes the payload as an open file, so that what is checked is
what is written, before it has a name.
"""

from __future__ import annotations

import copy
import json
import math
import mmap
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from formats import DType
from surgery.errors import Unsupported, VerificationFailed
from surgery.onnx.architecture import Architecture, quiet
from surgery.onnx.payload import PAYLOAD

if TYPE_CHECKING:
    import numpy as np

    Feed = dict[str, np.ndarray[Any, np.dtype[np.int64]]]  # input name → (batch, sequence)
    Outputs = list[np.ndarray[Any, np.dtype[Any]]]

SHAPES = ((1, 1), (1, 16), (2, 7), (3, 33))  # batch, sequence; cut to what the model takes
# What one rounding may cost, with room: in float16 both runtimes add up in float32 and round only what they store.
_ROUNDING = {DType.F32: 16 * 2.0**-23, DType.F16: 4 * 2.0**-10}


@dataclass(frozen=True)
class Verification:
    """What the comparison found.

    shapes: (batch, sequence) of each comparison.
    max_abs_error: the largest absolute difference over all outputs at valid tokens.
    max_rel_error: the largest difference in relation to its output's largest value.
    tolerance: what max_rel_error was held against.
    nodes_run: nodes that ONNX Runtime executed, after its own optimisation.
    """

    shapes: tuple[tuple[int, int], ...]
    max_abs_error: float
    max_rel_error: float
    tolerance: float
    nodes_run: int


def verify_graph(
    architecture: Architecture, graph: bytes, payload: int, dtype: DType, *, seed: int = 0
) -> Verification:
    """Compares torch with ONNX Runtime.

    Args:
        architecture: the model's folder, class and inputs.
        graph: the `.onnx` file's bytes.
        payload: a descriptor of the payload's file, open for reading.
        dtype: the checkpoint's floating-point dtype.
        seed: of the random inputs.

    Raises:
        VerificationFailed: they differ by more than the tolerance, or one of them is not finite.
        Unsupported: the graph does not load.
    """
    check_structure(graph)
    feeds = random_feeds(architecture, seed)
    expected = _run_torch(architecture, dtype, feeds)
    names, per_token, found, nodes = run_onnxruntime(architecture, graph, payload, feeds)
    found_by_output: dict[str, tuple[float, float, str]] = {}  # difference, scale, and where the difference is
    for feed, theirs, ours in zip(feeds, expected, found, strict=True):
        mask = feed["attention_mask"].astype(bool) if "attention_mask" in feed else None
        shape = " × ".join(map(str, feed["input_ids"].shape))
        for name, tokens, reference, output in zip(names, per_token, theirs, ours, strict=True):
            difference, scale = distance(reference, output, mask if tokens else None)
            worst, size, where = found_by_output.get(name, (-1.0, 0.0, ""))
            if difference > worst:
                worst, where = difference, f"{name} at {shape}"
            found_by_output[name] = (worst, max(size, scale), where)
    worst_abs = max(difference for difference, _, _ in found_by_output.values())
    worst_rel, worst_where = max((relative(*sizes), where) for *sizes, where in found_by_output.values())
    limit = tolerance(dtype, _matmuls(graph))
    if not worst_rel <= limit:
        raise VerificationFailed(
            "ONNX Runtime's outputs are not torch's; nothing was written",
            where=f"{architecture.folder}: {worst_where}",
            expected=f"a relative difference of at most {limit:.2g}",
            found=f"{worst_rel:.2g} (absolute {worst_abs:.2g})",
            then="please report this model's class and config.json",
        )
    shapes = tuple((int(b), int(s)) for b, s in (feed["input_ids"].shape for feed in feeds))
    return Verification(shapes, worst_abs, worst_rel, limit, nodes)


def tolerance(dtype: DType, matmuls: int) -> float:
    """The relative difference that rounding explains.

    Each product rounds its result once and passes on what came before; rounding errors of either sign add up like a
    random walk, so with the square root of their number. That is an order of magnitude above what we measured.
    """
    return _ROUNDING[dtype] * math.sqrt(max(matmuls, 1))


def distance(reference: Any, output: Any, valid: Any = None) -> tuple[float, float]:
    """Largest absolute difference, inf where shapes differ or a value is not finite; and the largest reference value.

    Args:
        reference, output: (batch, …), or (batch, sequence, …) with `valid`.
        valid: (batch, sequence) bool, the tokens to compare; all where None.
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
    """A difference against the size of its output, over all shapes together: two logits that happen to be near zero
    for one input carry the rounding errors of terms that are not."""
    return difference / scale if scale else (math.inf if difference else 0.0)


def random_feeds(architecture: Architecture, seed: int) -> list[Feed]:
    """Random tokens in several shapes. Where the mask is an input, all rows but the first end in padding."""
    import numpy as np

    rng = np.random.default_rng(seed)
    text = architecture.config.get_text_config()
    longest = max(1, architecture.longest - 2)  # RoBERTa's positions begin at 2
    pad = getattr(text, "pad_token_id", None) or 0
    feeds: list[Feed] = []
    for batch, length in SHAPES:
        sequence = min(length, longest)
        ids = rng.integers(0, text.vocab_size, (batch, sequence))  # (batch, sequence)
        mask = np.ones_like(ids)
        if "attention_mask" in architecture.inputs:
            for row in range(1, batch):
                mask[row, int(rng.integers(1, sequence + 1)) :] = 0
        types = rng.integers(0, max(1, getattr(text, "type_vocab_size", 1)), ids.shape)
        every = {"input_ids": np.where(mask == 1, ids, pad), "attention_mask": mask, "token_type_ids": types}
        feeds.append({name: every[name].astype(np.int64) for name in architecture.inputs})
    return feeds


def check_structure(graph: bytes) -> None:
    """ONNX's own checker with shape inference. It insists on finding external data under its name, which the payload
    does not have yet; so weights are shown to it as inputs."""
    import onnx

    model = onnx.load_model_from_string(graph)
    weights = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in weights:
        model.graph.initializer.remove(tensor)
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(model, full_check=True)


def _matmuls(graph: bytes) -> int:
    import onnx

    return sum(node.op_type in ("MatMul", "Gemm") for node in onnx.load_model_from_string(graph).graph.node)


def _run_torch(architecture: Architecture, dtype: DType, feeds: Sequence[Feed]) -> list[Outputs]:
    import torch

    from formats.tensors import torch_dtype

    with quiet():
        module = architecture.model_class.from_pretrained(
            architecture.folder,
            config=copy.deepcopy(architecture.config),
            dtype=torch_dtype(dtype),
            local_files_only=True,
        ).eval()
    outputs: list[Outputs] = []
    with torch.no_grad(), quiet():
        for feed in feeds:
            result = module(**{name: torch.from_numpy(array) for name, array in feed.items()})
            outputs.append([tensor.numpy() for tensor in result.to_tuple() if isinstance(tensor, torch.Tensor)])
    return outputs


def run_onnxruntime(
    architecture: Architecture, graph: bytes, payload: int, feeds: Sequence[Feed]
) -> tuple[list[str], list[bool], list[Outputs], int]:
    """Output names, whether each has one row per token, the outputs by feed, and the number of nodes run."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.log_severity_level = 3  # it warns of every input that has a default, as adapters' have
    with tempfile.TemporaryDirectory() as scratch, mmap.mmap(payload, 0, prot=mmap.PROT_READ) as mapped:
        options.profile_file_prefix = f"{scratch}/profile"
        view = np.frombuffer(mapped, np.uint8)
        try:
            options.add_external_initializers_from_files_in_memory([PAYLOAD], [view], [view.nbytes])
            session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class of their own
            raise Unsupported(
                "ONNX Runtime does not load the graph; nothing was written", where=architecture.folder, found=error
            ) from error
        finally:
            del view  # or the mapping cannot be closed
        found: list[Outputs] = [list(session.run(None, feed)) for feed in feeds]
        with open(session.end_profiling(), encoding="utf-8") as stream:
            events = json.load(stream)
        names = [output.name for output in session.get_outputs()]
        per_token = [list(output.shape[1:2]) == ["sequence"] for output in session.get_outputs()]
        del session
    nodes = {event["args"]["node_index"] for event in events if event["name"].endswith("_kernel_time")}
    return names, per_token, found, len(nodes)
