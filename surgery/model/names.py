"""Maps the tensor names in a file to the names in the loaded model, and reads adapters that use the latter.

transformers renames layers of some models on loading (vision transformers, models of several parts), and peft adapters
use the renamed layers. The renaming rules are read only if an adapter does not match the file or is to be written for
peft, because that imports transformers and builds the model without weights.
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
    """The adapter, resolved against the model's tensors by their file names, or else by their names in transformers.

    Args:
        model: the adapter's base.
        adapter: the opened adapter.
        specs: the model's tensors, or the tensors of the planned output.
        told: settings of the adapter that the caller gives.

    Raises:
        FormatError: as `AdapterFile.read`; Quantised if the model's weights are in a quantised form that cannot be
            merged into.
    """
    told = replace(told, model=model.config)
    try:
        return adapter.read(specs, told=told)
    except (UnmatchedKeys, ShapeMismatch) as error:
        forms = foreign(specs, model.quantization)
        refuse_foreign(forms, forms, model.path)  # the weights exist, in a form that no adapter fits
        if isinstance(error, ShapeMismatch) or not model.names:
            raise
        return adapter.read(specs, model.names, told)


def in_model_names(
    model: BaseModel, adapter: Adapter, specs: Mapping[str, TensorSpec]
) -> tuple[Adapter, dict[str, TensorSpec]]:
    """A resolved adapter and the file's tensors, renamed to the names of the loaded model: peft adapts the modules of
    the model as transformers loads it."""
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
