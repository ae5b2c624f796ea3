"""The names that a model gives to what its file holds under others, and reading an adapter that uses them.

transformers renames layers of some models while it loads them (vision transformers, models of several parts); peft's
adapters have the model's names. Only where an adapter does not match the file, or is to be written for peft, are the
model's own rules asked, which takes loading transformers and building the model without weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from formats.adapter import NOTHING_TOLD, Adapter, Told
from formats.dialects import AdapterFile
from formats.errors import ShapeMismatch, UnmatchedKeys
from formats.quantized import foreign, refuse_foreign
from formats.spec import TensorSpec
from surgery.model.base_model import BaseModel


def read_adapter(
    model: BaseModel, adapter: AdapterFile, specs: Mapping[str, TensorSpec], told: Told = NOTHING_TOLD
) -> Adapter:
    """The adapter, resolved against the model's tensors by their names in the file, or else by the model's own.

    Args:
        model: the adapter's base.
        adapter: opened.
        specs: the model's tensors, or those of what it is to become.
        told: what the caller says of the adapter.

    Raises:
        FormatError: as `AdapterFile.read`; Quantised where the model's weights are in a form that nothing can be added
            to.
    """
    told = replace(told, model=model.config)
    try:
        return adapter.read(specs, told=told)
    except (UnmatchedKeys, ShapeMismatch) as error:
        forms = foreign(specs, model.quantization)
        refuse_foreign(forms, forms, model.path)  # its weights are there, in a form that nothing fits
        if isinstance(error, ShapeMismatch) or not model.names:
            raise
        return adapter.read(specs, model.names, told)


def in_model_names(
    model: BaseModel, adapter: Adapter, specs: Mapping[str, TensorSpec]
) -> tuple[Adapter, dict[str, TensorSpec]]:
    """An adapter resolved against a model's file, and the file's tensors, by the names that the model itself gives
    them: what peft adapts are modules of the model, as transformers loads it."""
    names = model.names if model.renames else {}
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
