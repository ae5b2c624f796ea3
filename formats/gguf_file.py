"""GGUF files that hold an adapter for llama.cpp, as a form of plain files; and the gguf package, where it is needed.

Their key-values are the metadata, as texts. A file of a model is none of ours: llama.cpp's weights are quantised, and
in orders of its own. The package writes the header of a file, from which all places follow, and reads every file before
anybody else does. Knows no dialect and no mathematics.
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
    """The gguf package. Raises FormatError where it is not installed."""
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
    """The metadata are key-values, all of them strings but for the alpha, a float32; they name the architecture."""
    ordered = tuple(specs)
    header = _header(ordered, metadata)
    offsets: dict[str, int] = {}
    position = end = len(header)
    for spec in ordered:
        position = offsets[spec.name] = position + -position % ALIGNMENT
        position = end = position + spec.nbytes
    size = end + -end % ALIGNMENT  # the last tensor is padded too, as the package does it
    return Layout(header, offsets, size, ((end, b"\0" * (size - end)),))


def _header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Everything before the payload, without the padding: the package writes it to a path, so to a file of its own."""
    gguf = gguf_package()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer = gguf.GGUFWriter(path, metadata[ARCHITECTURE])
        for key, text in sorted(metadata.items()):
            if key == ALPHA:
                writer.add_float32(key, float(text))
            elif key != ARCHITECTURE:  # written by the package first of all
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
    """Opens what we wrote with the gguf package's own reader before anybody else does."""
    path = f"/proc/self/fd/{descriptor}"
    if os.path.exists(path):
        found = {tensor.name for tensor in gguf_package().GGUFReader(path).tensors}
        if found != names:
            raise IncompleteOutput("the gguf package reads other tensors than we wrote", where=path)


GGUF = Form(_read, _laid_out, _check)
