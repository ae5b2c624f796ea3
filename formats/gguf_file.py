"""GGUF files that hold an adapter for llama.cpp.

The file's key-values become the checkpoint's metadata, as strings. GGUF files of models are refused: llama.cpp's
weights are quantised and stored in an order of their own. The gguf package writes the header, which fixes every offset,
and reads each file back before the output appears. This module knows no dialect and no mathematics.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from formats.errors import FormatError, IncompleteOutput
from formats.gguf_header import ALIGNMENT, TYPES, read_header
from formats.layout import Layout
from formats.plain_file import Form, Header
from formats.spec import TensorSpec

ARCHITECTURE, ALPHA = "general.architecture", "adapter.lora.alpha"
_NUMBERS = {dtype: number for number, dtype in TYPES.items()}


def gguf_package() -> Any:
    """Imports the gguf package. Raises FormatError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise FormatError(
            f"GGUF needs the gguf package: {error}", expected="gguf", then="pip install 'model-surgery[gguf]'"
        ) from error
    return gguf


def _read(descriptor: int, path: Path) -> Header:
    return read_header(descriptor, os.fstat(descriptor).st_size, path)


def _laid_out(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> Layout:
    """Lays out the file. Every metadata value is a string except alpha, a float32; the architecture is required."""
    ordered = tuple(specs)
    header = _header(ordered, metadata)
    offsets: dict[str, int] = {}
    position = end = len(header)
    for spec in ordered:
        position = offsets[spec.name] = position + -position % ALIGNMENT
        position = end = position + spec.nbytes
    size = end + -end % ALIGNMENT  # the gguf package pads the last tensor too
    return Layout(header, offsets, size, ((end, b"\0" * (size - end)),))


def _header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Everything before the payload, without padding. The package writes to a path only, hence the temporary file."""
    gguf = gguf_package()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer = gguf.GGUFWriter(path, metadata[ARCHITECTURE])
        for key, text in sorted(metadata.items()):
            if key == ALPHA:
                writer.add_float32(key, float(text))
            elif key != ARCHITECTURE:  # the package writes this one itself, first
                writer.add_string(key, text)
        for spec in specs:
            kind = gguf.GGMLQuantizationType(_NUMBERS[spec.dtype])
            writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), spec.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return path.read_bytes()


def _check(descriptor: int, names: set[str]) -> None:
    """Opens what we wrote with the gguf package's own reader, and compares the names."""
    path = f"/proc/self/fd/{descriptor}"
    if os.path.exists(path):
        found = {tensor.name for tensor in gguf_package().GGUFReader(path).tensors}
        if found != names:
            raise IncompleteOutput("the gguf package reads other tensors than we wrote", where=path)


GGUF = Form(_read, _laid_out, _check)
