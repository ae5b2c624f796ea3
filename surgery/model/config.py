"""Updates config.json so that an output can be loaded: a larger vocabulary, changed settings.

Works on plain dicts. Knows no dialect: it compares the tensors of base and output, and takes settings from the caller.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from formats.spec import TensorSpec


def growth(base: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> tuple[tuple[int, int], ...]:
    """The row counts, before and after, of tensors that grow; one pair or none."""
    after = {spec.name: spec.shape for spec in outputs}
    both = ((spec.shape, after[spec.name]) for spec in base if spec.name in after)
    return tuple(sorted({(old[0], new[0]) for old, new in both if new != old}))


def parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A config, and the configs of its parts, such as `text_config`."""
    yield config
    yield from (value for value in config.values() if isinstance(value, dict))


def resized(config: Mapping[str, Any], sizes: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """A config with its vocab_size grown. The size may be in the config of a part; a vocab_size with
    another value is not changed."""
    result = copy.deepcopy(dict(config))
    for old, new in sizes:
        for part in parts(result):
            if part.get("vocab_size") == old:
                part["vocab_size"] = new
    return result


def with_settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config with changed settings, each at the top level and in every part that has its key."""
    result = copy.deepcopy(dict(config))
    for key, value in settings.items():
        for part in parts(result):
            if part is result or key in part:
                part[key] = value
    return result
