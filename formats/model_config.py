"""The config.json of a model's folder: where it lies, and its content as a JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from formats.errors import CorruptFile

CONFIG = "config.json"
Read = Callable[[Path], bytes]  # all of a small file


def config_file(model: str | Path) -> Path | None:
    """The config.json in a model's folder, or beside its file; None where there is none."""
    path = Path(model)
    file = (path if path.is_dir() else path.parent) / CONFIG
    return file if file.is_file() else None


def model_config(model: str | Path, read: Read = Path.read_bytes) -> dict[str, Any]:
    """The content of a model's config.json; empty where there is none. Raises CorruptFile. `read` reads the file."""
    file = config_file(model)
    return {} if file is None else parsed_config(read(file), file)


def parsed_config(content: bytes | str, where: Path, what: str = "model's config") -> dict[str, Any]:
    """The JSON object in a config. Raises CorruptFile for anything else; `what` is what the error calls it."""
    try:
        document = json.loads(content)
    except ValueError as error:
        raise CorruptFile(
            f"the {what} is not JSON: {error}", where=where, then="correct the file, or copy it from the model again"
        ) from error
    if not isinstance(document, dict):
        raise CorruptFile(
            f"the {what} is not a JSON object",
            where=where,
            found=type(document).__name__,
            then="correct the file, or copy it from the model again",
        )
    return document
