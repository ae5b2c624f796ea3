"""An ONNX Runtime session on the provider that was asked for, and on no other.

ONNX Runtime falls back to the CPU without an error where a provider does not load; here that is one. Knows nothing of
what the session is for.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from surgery.errors import ProviderUnavailable, Unsupported


def provider_name(wanted: str) -> str:
    """`cpu` → `CPUExecutionProvider`, as ONNX Runtime spells it. Raises ProviderUnavailable with those there are."""
    import onnxruntime

    there = onnxruntime.get_available_providers()
    for name in there:
        if wanted.lower() in (name.lower(), name.lower().removesuffix("executionprovider")):
            return str(name)
    raise ProviderUnavailable(
        "this ONNX Runtime has no such execution provider",
        expected=", ".join(name.removesuffix("ExecutionProvider").lower() for name in there),
        found=wanted,
        then="choose one of those, or install the ONNX Runtime package that has it",
    )


def open_session(
    path: Path,
    provider: str,
    threads: int | None,
    *,
    settings: Mapping[str, str] = MappingProxyType({}),
    optimised: Path | None = None,
    profile: Path | None = None,
) -> Any:
    """A session that really runs on `provider`, on one thread pool that does not spin.

    Args:
        path: the graph.
        provider: as ONNX Runtime spells it.
        threads: intra-op threads; None leaves their number to ONNX Runtime.
        settings: entries of the session's configuration, by ONNX Runtime's keys.
        optimised: where to save the graph that runs, after ONNX Runtime's own optimisation.
        profile: what the names of profiles begin with, where runs are to be profiled.

    Raises:
        ProviderUnavailable: ONNX Runtime fell back to another provider, as it does without an error.
        Unsupported: it does not load the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in {"session.intra_op.allow_spinning": "0", **settings}.items():
        options.add_session_config_entry(key, value)
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
        options.log_severity_level = 3  # or it warns that such a graph is of this machine, as is meant
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    exact = {"use_tf32": "0"} if provider == "CUDAExecutionProvider" else {}
    try:
        with _muffled() if provider != "CPUExecutionProvider" else contextlib.nullcontext():
            if provider == "CUDAExecutionProvider":
                onnxruntime.preload_dlls()
            session = onnxruntime.InferenceSession(str(path), options, providers=[(provider, exact)])
    except Exception as error:  # its exceptions share no base class of their own
        raise Unsupported("ONNX Runtime does not load this graph", where=path, found=error) from error
    actual = session.get_providers()[0]
    if actual != provider:
        raise ProviderUnavailable(
            "ONNX Runtime would run the graph on another provider",
            where=path,
            expected=provider,
            found=actual,
            then="install what that provider needs (for CUDA: its libraries and a GPU), or ask for another",
        )
    return session


@contextlib.contextmanager
def _muffled() -> Iterator[None]:
    """Keeps ONNX Runtime from printing why a provider does not load, on stdout of all places: that becomes an error."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # what it starts with
