"""Builds the model that a config names, with transformers on the meta device: modules and shapes, no weights.

Only the built model gives the kinds of its layers, the order of its parameters, and the tensors that it renames on
loading. Runs only transformers' own code. Everything is empty if transformers is not installed or does not know the
class.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def meta_model(said: Mapping[str, Any]) -> Any:
    """The model that a config.json names, an nn.Module of meta tensors; None if it cannot be built."""
    try:
        import torch
        import transformers

        config = transformers.CONFIG_MAPPING[said["model_type"]].from_dict(dict(said))
        model_class = getattr(transformers, str((config.architectures or [""])[0]), None)
        if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
            return None
        with torch.device("meta"):
            return model_class(config)
    except Exception:  # a class may reject its config or the meta device with any exception
        return None


def config_of(config_class: Any, said: Mapping[str, Any]) -> Any:
    """A transformers config of a class, from a parsed config.json. Like `from_pretrained`, it takes the
    part of a composite model's config that belongs to the class (transformers 5, configuration_utils.py)."""
    key = config_class.base_config_key
    part = said[key] if key and key in said else said
    if part.get("model_type", config_class.model_type) != config_class.model_type:
        parts = (value for value in part.values() if isinstance(value, Mapping))
        part = next((each for each in parts if each.get("model_type") == config_class.model_type), part)
    return config_class.from_dict(copy.deepcopy(dict(part)))


def known_names(model: Any, names: Iterable[str]) -> tuple[dict[str, str], frozenset[str]]:
    """File name → model name for every tensor that is loaded unchanged, and the tensors that are fused into others on
    loading. Tensors that the model does not know are in neither."""
    names = list(names)
    held = model.state_dict()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        found = {name: rename_source_key(name, renamings, converters, model.base_model_prefix, held) for name in names}
    except Exception:  # transformers before 5 renames nothing
        found = {name: (name, None) for name in names}
    taken = {name: known for name, (known, converter) in found.items() if known in held and not converter}
    return taken, frozenset(name for name, (_, converter) in found.items() if converter)


def may_rename(config: Mapping[str, Any]) -> bool:
    """Whether transformers has renaming rules for this model. Reads the table of rules as text, since importing it
    takes seconds and most models are not in it."""
    text = _rules()
    return any(f'"{word}"' in text for word in _identifiers(config))


def _identifiers(config: Mapping[str, Any]) -> list[str]:
    """The classes and model types that a config and its parts name."""
    classes = [str(name) for name in config.get("architectures") or ()]
    found = classes + [re.sub(r"(For[A-Z].*|Model)$", "Model", name) for name in classes]  # and the model inside
    found += [str(config["model_type"])] if "model_type" in config else []
    for part in config.values():
        found += _identifiers(part) if isinstance(part, Mapping) else []
    return found


@functools.cache
def _rules() -> str:
    package = importlib.util.find_spec("transformers")
    folders = package.submodule_search_locations if package is not None else None
    table = Path(folders[0]) / "conversion_mapping.py" if folders else None
    return table.read_text(encoding="utf-8") if table is not None and table.is_file() else ""
