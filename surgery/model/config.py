"""What config.json must say of a merge's output so that it can be loaded: a vocabulary that grows, and other settings.

Knows no dialect: it compares the tensors of base and output, and takes settings as they come.
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
    """The numbers of rows, before and after, of tensors that grow; one pair or none."""
    after = {spec.name: spec.shape for spec in outputs}
    both = ((spec.shape, after[spec.name]) for spec in base if spec.name in after)
    return tuple(sorted({(old[0], new[0]) for old, new in both if new != old}))


def resized_config(destination: Destination, sizes: tuple[tuple[int, int], ...]) -> bytes | None:
    """The config.json that goes along to a folder, with its vocab_size grown; None if it can stay as it is.

    The size may stand in the config of a part, such as `text_config`; where it is another number it is left alone.
    Raises CorruptFile.
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
    """A config.json with other values, each for the whole and for every part that has its key. Raises CorruptFile."""
    document = parsed_config(config, where)
    for key, value in settings.items():
        for part in [document, *(value for value in document.values() if isinstance(value, dict))]:
            if part is document or key in part:
                part[key] = value
    return json.dumps(document, indent=2).encode() + b"\n"


def parsed_config(config: bytes, where: Path) -> dict[str, Any]:
    """A config.json's content. Raises CorruptFile."""
    try:
        document = json.loads(config)
    except ValueError as error:
        raise CorruptFile(f"the model's config is not JSON: {error}", where=where) from error
    if not isinstance(document, dict):
        raise CorruptFile("the model's config is not a JSON object", where=where)
    return document


def companion(destination: Destination, name: str) -> Path | None:
    """The file of that name that would be copied along, if there is one."""
    return next((path for path in destination.companions if path.name == name), None)


def without_companion(destination: Destination, name: str) -> Destination:
    """The destination without a file that would be copied along as it is."""
    kept = tuple(path for path in destination.companions if path.name != name)
    return replace(destination, companions=kept)


def model_config(model: str | Path) -> dict[str, Any]:
    """The config.json of a model's folder; empty where there is none. Raises CorruptFile."""
    path = Path(model) / CONFIG
    return parsed_config(path.read_bytes(), path) if path.is_file() else {}
