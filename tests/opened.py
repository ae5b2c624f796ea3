"""What tests open by a path, as verbs do in their jobs."""

from __future__ import annotations

from pathlib import Path

from formats.open_files import OpenFiles
from surgery.model.base_model import BaseModel
from surgery.onnx.trace.architecture import TransformersModel, read_architecture


def opened_architecture(folder: Path, *, cached: bool = False) -> TransformersModel:
    """The architecture of a model's folder."""
    return read_architecture(BaseModel.open(folder, OpenFiles()), cached=cached)
