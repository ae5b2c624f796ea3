"""A model's config.json, and what merging changes in it so that the output can be loaded: a vocabulary that grows, a
head that is untied, layers that are repeated.

Knows no dialect: it compares the tensors of base and output, and takes settings as they come.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from formats.errors import CorruptFile
from formats.paths import Destination
from formats.spec import TensorSpec

CONFIG = "config.json"


def growth(base: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> tuple[tuple[int, int], ...]:
    """The numbers of rows, before and after, of tensors that grow; one pair or none."""
    after = {spec.name: spec.shape for spec in outputs}
    return tuple(sorted({(spec.shape[0], after[spec.name][0]) for spec in base if after[spec.name] != spec.shape}))


def changed_config(
    destination: Destination, sizes: tuple[tuple[int, int], ...], settings: Mapping[str, Any]
) -> bytes | None:
    """The config.json that goes along to a folder, changed; None if it can stay as it is.

    Args:
        destination: of the output.
        sizes: the vocabulary's rows before and after. They may stand in the config of a part, such as `text_config`;
            where it is another number it is left alone.
        settings: other values by their keys, each for the whole and for every part that has the key; None removes it.

    Raises:
        CorruptFile: it is no JSON object.
    """
    source = next((path for path in destination.companions if path.name == CONFIG), None)
    if source is None or not (sizes or settings):
        return None
    config = read_config(source)
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    before = json.dumps(config)
    for old, new in sizes:
        for part in parts:
            if part.get("vocab_size") == old:
                part["vocab_size"] = new
    for key, value in settings.items():
        for part in parts:
            if value is None:
                part.pop(key, None)
            elif part is config or key in part:
                part[key] = value
    return json.dumps(config, indent=2).encode() + b"\n" if json.dumps(config) != before else None


def read_config(file: Path) -> dict[str, Any]:
    """A config.json; empty where there is none. Raises CorruptFile."""
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFile(f"the model's config is not JSON: {error}", where=file) from error
    if not isinstance(config, dict):
        raise CorruptFile("the model's config is not a JSON object", where=file)
    return config


def without_companion(destination: Destination, name: str) -> Destination:
    """The destination without a file that would be copied along as it is."""
    kept = tuple(path for path in destination.companions if path.name != name)
    return replace(destination, companions=kept)
