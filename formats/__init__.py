"""Names and bytes: containers and dialects of saved weights. Knows no mathematics and never imports `surgery`.

The public names load when they are used, so that an error class or a config costs no numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from formats.checkpoint import Checkpoint as Checkpoint
    from formats.checkpoint import CheckpointWriter as CheckpointWriter
    from formats.destination import Destination as Destination
    from formats.destination import create_checkpoint as create_checkpoint
    from formats.destination import destination_like as destination_like
    from formats.errors import FormatError as FormatError
    from formats.errors import ReportedError as ReportedError
    from formats.paths import open_checkpoint as open_checkpoint
    from formats.spec import CheckpointRef as CheckpointRef
    from formats.spec import DType as DType
    from formats.spec import Place as Place
    from formats.spec import TensorRef as TensorRef
    from formats.spec import TensorSpec as TensorSpec

# Where each public name is defined. Type checkers read the imports above, a program this table.
_HOMES = {
    "Checkpoint": "formats.checkpoint",
    "CheckpointRef": "formats.spec",
    "CheckpointWriter": "formats.checkpoint",
    "DType": "formats.spec",
    "Destination": "formats.destination",
    "FormatError": "formats.errors",
    "Place": "formats.spec",
    "ReportedError": "formats.errors",
    "TensorRef": "formats.spec",
    "TensorSpec": "formats.spec",
    "create_checkpoint": "formats.destination",
    "destination_like": "formats.destination",
    "open_checkpoint": "formats.paths",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'formats' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
