"""Adapts config.json to a merge's output so that it can be loaded: the size of a grown vocabulary, and other settings.

This module knows no dialect: it compares the tensors of base and output, and writes the settings that it is given.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from formats.destination import Destination
from formats.errors import CorruptFile
from formats.spec import TensorSpec

CONFIG = "config.json"


def growth(base: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> tuple[tuple[int, int], ...]:
    """The number of rows before and after for tensors that grow: one pair, or none."""
    after = {spec.name: spec.shape for spec in outputs}
    both = ((spec.shape, after[spec.name]) for spec in base if spec.name in after)
    return tuple(sorted({(old[0], new[0]) for old, new in both if new != old}))


def resized_config(destination: Destination, sizes: tuple[tuple[int, int], ...]) -> bytes | None:
    """The output folder's config.json with the new vocab_size; None if it need not change.

    The size may also be in the config of a part, such as `text_config`. A vocab_size that differs from the old size is
    not changed. Raises CorruptFile if the config cannot be read.
    """
    source = companion(destination, CONFIG)
    if source is None or not sizes:
        return None
    config = parsed_config(source.read_bytes(), source)
    changed = False
    for old, new in sizes:
        for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
            if part.get("vocab_size") == old:
                part["vocab_size"] = new
                changed = True
    return json.dumps(config, indent=2).encode() + b"\n" if changed else None


def with_settings(config: bytes, settings: Mapping[str, Any], where: Path) -> bytes:
    """A config.json with changed settings, at the top and in every part that has the key. Raises CorruptFile."""
    document = parsed_config(config, where)
    for key, value in settings.items():
        for part in [document, *(value for value in document.values() if isinstance(value, dict))]:
            if part is document or key in part:
                part[key] = value
    return json.dumps(document, indent=2).encode() + b"\n"


def parsed_config(config: bytes, where: Path) -> dict[str, Any]:
    """Parses a config.json. Raises CorruptFile if it is not a JSON object."""
    try:
        document = json.loads(config)
    except ValueError as error:
        raise CorruptFile(
            f"the model's config is not JSON: {error}", where=where, then="download or correct the file"
        ) from error
    if not isinstance(document, dict):
        raise CorruptFile("the model's config is not a JSON object", where=where, then="download or correct the file")
    return document


def companion(destination: Destination, name: str) -> Path | None:
    """The file of this name that would be copied to the output folder, if there is one."""
    return next((path for path in destination.companions if path.name == name), None)


def without_companion(destination: Destination, name: str) -> Destination:
    """The destination without the file of this name among those that are copied."""
    kept = tuple(path for path in destination.companions if path.name != name)
    return replace(destination, companions=kept)


def model_config(model: str | Path) -> dict[str, Any]:
    """The config.json in a model's folder; empty if there is none. Raises CorruptFile if it is not a JSON object."""
    path = Path(model) / CONFIG
    return parsed_config(path.read_bytes(), path) if path.is_file() else {}
