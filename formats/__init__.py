"""Containers and adapter dialects: how saved weights are stored and named.

This package does no mathematics and never imports `surgery`.
"""

from formats.checkpoint import Checkpoint, CheckpointWriter
from formats.destination import Destination, create_checkpoint, destination_like
from formats.errors import FormatError, ReportedError
from formats.paths import open_checkpoint
from formats.spec import CheckpointRef, DType, Place, TensorRef, TensorSpec

__all__ = [
    "Checkpoint",
    "CheckpointRef",
    "CheckpointWriter",
    "DType",
    "Destination",
    "FormatError",
    "Place",
    "ReportedError",
    "TensorRef",
    "TensorSpec",
    "create_checkpoint",
    "destination_like",
    "open_checkpoint",
]
