"""Opens ONNX Runtime sessions that really run on the requested provider, with inputs and outputs in fixed buffers.

ONNX Runtime falls back to the CPU without an error; this module raises one. Knows nothing of clocks and verdicts.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from surgery.errors import ProviderUnavailable, Unsupported

if TYPE_CHECKING:
    from surgery.onnx.run.feeds import Feeds

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
_ON_CUDA = (CUDA, TENSORRT)
_RECORDED = (
    "intra_op_num_threads", "inter_op_num_threads", "execution_mode", "graph_optimization_level",
    "enable_cpu_mem_arena", "enable_mem_pattern", "use_deterministic_compute",
)  # fmt: skip
_SETTINGS = {"session.intra_op.allow_spinning": "0", "session.record_ep_graph_assignment_info": "1"}


@dataclass(frozen=True)
class Setting:
    """The settings of every session of a bench: see `open_session`."""

    provider: str
    threads: int | None
    cuda_graph: bool

    @property
    def device(self) -> str:
        """Where buffers are allocated."""
        return "cuda" if self.provider in _ON_CUDA else "cpu"


@dataclass(frozen=True)
class Bound:
    """A session with its inputs and outputs bound to fixed buffers."""

    session: Any
    binding: Any
    buffers: tuple[Any, ...]

    def run(self) -> None:
        """Runs once and waits until the run has finished."""
        self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()


def provider_name(wanted: str) -> str:
    """`cpu` → `CPUExecutionProvider`, as ONNX Runtime spells it. Raises ProviderUnavailable and lists the available
    ones."""
    import onnxruntime

    there = onnxruntime.get_available_providers()
    for name in there:
        if wanted.lower() in (name.lower(), name.lower().removesuffix("executionprovider")):
            return str(name)
    raise ProviderUnavailable(
        "this ONNX Runtime does not have the execution provider",
        expected=", ".join(name.removesuffix("ExecutionProvider").lower() for name in there),
        found=wanted,
        then="choose one of those, or install the ONNX Runtime package that has it",
    )


def open_session(
    path: Path,
    provider: str,
    threads: int | None,
    *,
    cuda_graph: bool = False,
    settings: Mapping[str, str] = MappingProxyType({}),
    optimised: Path | None = None,
    profile: Path | None = None,
) -> Any:
    """Opens a session that really runs on `provider`, with one thread pool that does not spin.

    float32 stays float32: TF32 is off. TensorRT gets no engine cache: its choice of kernels is part of the difference
    between two sessions of one model, and its cache distinguishes models by their graphs, not by their weights.

    Args:
        path: the graph.
        provider: the provider, as ONNX Runtime spells it.
        threads: number of intra-op threads; None leaves it to ONNX Runtime.
        cuda_graph: capture the first run into a CUDA graph, and replay it from then on.
        settings: further entries of the session's configuration, by ONNX Runtime's keys.
        optimised: path to save the graph after ONNX Runtime's own optimisation.
        profile: prefix of the profiles' file names; None for no profiling.

    Raises:
        ProviderUnavailable: ONNX Runtime silently fell back to another provider, or gave no node to the requested one.
        Unsupported: ONNX Runtime does not load the graph, or cannot make a CUDA graph of it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in (_SETTINGS | dict(settings)).items():
        options.add_session_config_entry(key, value)
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
        options.log_severity_level = 3  # suppresses the warning that the saved graph suits only this machine
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
        options.log_severity_level = 4  # suppresses the error that a graph which does not load has no profile
    try:
        with _muffled() if provider != "CPUExecutionProvider" else contextlib.nullcontext():
            if provider in _ON_CUDA:
                onnxruntime.preload_dlls()
            session = onnxruntime.InferenceSession(str(path), options, providers=_asked(provider, cuda_graph))
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise Unsupported(
            "ONNX Runtime does not load this graph",
            where=path,
            found=error,
            then="export it with an opset that this ONNX Runtime has, or install a newer one"
            if _opset(error)
            else None,
        ) from error
    nodes = assigned(session)
    actual = session.get_providers()[0]
    if actual != provider or (nodes and provider not in nodes):
        raise ProviderUnavailable(
            "ONNX Runtime would run the graph on another provider",
            where=path,
            expected=provider,
            found=actual if actual != provider else ", ".join(nodes),
            then="install what that provider needs (for CUDA: its libraries and a GPU), or choose another --provider",
        )
    return session


def _opset(error: Exception) -> bool:
    """Whether a graph is refused because of its opset or IR version."""
    return any(each in str(error) for each in ("ValidateOpsetForDomain", "Unsupported model IR version"))


def _asked(provider: str, cuda_graph: bool) -> list[tuple[str, dict[str, str]]]:
    """The providers to load, with their options; CUDA follows TensorRT, for nodes that TensorRT does not take."""
    cuda = {"use_tf32": "0"} | ({"enable_cuda_graph": "1"} if cuda_graph else {})
    if provider == TENSORRT:
        return [(TENSORRT, {}), (CUDA, cuda)]
    return [(provider, cuda if provider == CUDA else {})]


def assigned(session: Any) -> dict[str, int]:
    """Number of nodes that each provider got in the optimised graph; empty if this ONNX Runtime does not report it."""
    if not hasattr(session, "get_provider_graph_assignment_info"):  # new in ONNX Runtime 1.24
        return {}
    nodes: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        nodes[part.ep_name] += len(part.get_nodes())
    return dict(nodes)


def provider_options(session: Any, provider: str) -> Mapping[str, str]:
    """The provider's options in the session."""
    return {name: str(value) for name, value in sorted(session.get_provider_options().get(provider, {}).items())}


def session_settings(session: Any) -> Mapping[str, str]:
    """The session's provider-independent settings, by ONNX Runtime's names; 0 threads means that it chooses."""
    options = session.get_session_options()
    plain = {name: getattr(options, name) for name in _RECORDED}
    said = {name: str(getattr(value, "name", value)) for name, value in plain.items()}
    return said | {key: options.get_session_config_entry(key) for key in _SETTINGS}


@contextlib.contextmanager
def _muffled() -> Iterator[None]:
    """Keeps ONNX Runtime from printing to stdout why a provider does not load; callers raise an error for that."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # the default


def bind(path: Path, feeds: Feeds, setting: Setting) -> Bound:
    """A session with inputs and outputs in buffers on the provider's device, allocated once.

    Raises:
        ProviderUnavailable, Unsupported: see `open_session`; or ONNX Runtime cannot run the graph on these inputs.
    """
    import numpy as np
    import onnxruntime

    session = open_session(path, setting.provider, setting.threads, cuda_graph=setting.cuda_graph)
    once = onnxruntime.RunOptions()
    if setting.cuda_graph:
        once.add_run_config_entry("gpu_graph_id", "-1")  # this run uses other buffers, so it must not be captured
    try:
        outputs = session.run(None, feeds, once)  # for their shapes
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        shapes = ", ".join(f"{name}{list(array.shape)}" for name, array in feeds.items())
        raise Unsupported(
            "ONNX Runtime does not run this graph on such inputs",
            where=path,
            found=f"{shapes}: {error}",
            then="choose a --shape that the graph takes",
        ) from error
    binding = session.io_binding()
    buffers = []
    for name, array in feeds.items():
        buffers.append(onnxruntime.OrtValue.ortvalue_from_numpy(array, setting.device))
        binding.bind_ortvalue_input(name, buffers[-1])
    for output, array in zip(session.get_outputs(), outputs, strict=True):
        buffers.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros_like(array), setting.device))
        binding.bind_ortvalue_output(output.name, buffers[-1])
    return Bound(session, binding, tuple(buffers))
