"""Opens adapters that use the model's names of tensors, where the model's file has other names.

transformers renames layers of some models while loading (vision transformers, models with several parts), and peft's
adapters use the model's names. The renaming rules are used only if an adapter does not match the file, or if it is
written for peft: they require loading transformers and building the model without weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from formats.adapter import NOTHING_TOLD, Adapter, Told
from formats.dialects import open_adapter
from formats.errors import ShapeMismatch, UnmatchedKeys
from formats.model_config import model_config
from formats.quantized import foreign, quantization_config, refuse_foreign
from formats.spec import TensorSpec
from surgery.model.config import CONFIG, parsed_config
from surgery.model.meta_model import known_names, may_rename, meta_model


def open_adapter_of(
    model: str | Path, adapter: str | Path, specs: Mapping[str, TensorSpec], told: Told = NOTHING_TOLD
) -> Adapter:
    """Reads an adapter and resolves it against the model's tensors: by their names in the file, or else by the model's
    own names.

    Raises:
        FormatError: as `open_adapter`; Quantised if nothing can be added to the model's quantised weights.
    """
    told = replace(told, model=model_config(model))
    try:
        return open_adapter(adapter, specs, told=told)
    except (UnmatchedKeys, ShapeMismatch) as error:
        forms = foreign(specs, quantization_config(model))
        refuse_foreign(forms, forms, model)  # the weights exist, but are quantised
        if isinstance(error, ShapeMismatch):
            raise
        names = model_names(Path(model), specs)
        if not names:
            raise
        return open_adapter(adapter, specs, names, told)


def in_model_names(
    model: str | Path, adapter: Adapter, specs: Mapping[str, TensorSpec]
) -> tuple[Adapter, dict[str, TensorSpec]]:
    """Renames an adapter's targets and the file's tensors to the model's own names, because peft adapts modules of the
    model as transformers loads it."""
    path = Path(model)
    folder = path if path.is_dir() else path.parent
    file = folder / CONFIG
    config = parsed_config(file.read_bytes(), file) if file.exists() else {}
    names = model_names(folder, specs) if may_rename(config) else {}
    known = {names.get(name, name): spec for name, spec in specs.items()}
    return (
        replace(
            adapter,
            modules=tuple(replace(each, target=names.get(each.target, each.target)) for each in adapter.modules),
            replacements=tuple(
                replace(each, target=names.get(each.target, each.target)) for each in adapter.replacements
            ),
        ),
        {name: replace(spec, name=name) for name, spec in known.items()},
    )


def model_names(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The model's names of the file's tensors that it only renames; empty if they cannot be determined."""
    model = meta_model(folder)
    known = known_names(model, names)[0] if model is not None else {}
    return {name: new for name, new in known.items() if new != name}
