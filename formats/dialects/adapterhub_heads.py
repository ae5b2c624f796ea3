"""Reads the head that the library adapters saves with an adapter: head_config.json and a file of weights.

A head of one of transformers' classes keeps its names. A flexible head of the library is a list of layers; it fits a
base whose class has the same head (adapters.head_utils, 1.3). This module holds plain data and does no mathematics.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.checkpoint import Checkpoint
from formats.dialects.prompts import Whole
from formats.errors import AdapterFormatError, CorruptFile
from formats.open_files import OpenFiles
from formats.spec import TensorRef, TensorSpec, shape_text

CONFIG = "head_config.json"
_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")
_LAYER = re.compile(r"heads\.[^.]+\.(?P<number>\d+)\.(?P<last>weight|bias)")


@dataclass(frozen=True)
class _Class:
    """The head of one of transformers' classes.

    Attributes:
        head_type: the library's name for such a head.
        modules: the head's modules that have weights, in order.
        activation: the activation between them.
        use_pooler: whether the head reads the pooled output; None where the library does not check.
    """

    head_type: str
    modules: tuple[str, ...]
    activation: str | None = None
    use_pooler: bool | None = None


_FAMILIES = ("Bert", "Roberta", "XLMRoberta", "DistilBert", "GPT2", "Llama", "Mistral")
_CLASSES: Mapping[str, _Class] = {
    **{f"{family}ForQuestionAnswering": _Class("question_answering", ("qa_outputs",)) for family in _FAMILIES},
    **{f"{family}ForTokenClassification": _Class("tagging", ("classifier",)) for family in _FAMILIES},
    **{f"{family}ForTokenClassification": _Class("tagging", ("score",)) for family in ("Llama", "Mistral")},
    **{f"{family}ForSequenceClassification": _Class("classification", ("score",)) for family in _FAMILIES[4:]},
    **{
        f"{family}ForSequenceClassification": _Class(
            "classification", ("classifier.dense", "classifier.out_proj"), "tanh", False
        )
        for family in ("Roberta", "XLMRoberta")
    },
    "BertForSequenceClassification": _Class("classification", ("classifier",), None, True),
    "DistilBertForSequenceClassification": _Class("classification", ("pre_classifier", "classifier"), "relu", False),
    "ViTForImageClassification": _Class("image_classification", ("classifier",), None, False),
}


def has_head(adapter: Path) -> bool:
    """Whether a head lies beside an adapter, or half of one."""
    folder = adapter if adapter.is_dir() else adapter.parent
    return any((folder / name).is_file() for name in (CONFIG, *_WEIGHTS))


def open_head(adapter: Path, files: OpenFiles) -> tuple[Checkpoint, dict[str, Any]] | None:
    """The tensors and the config of the head beside an adapter; None where there is none.

    Raises:
        AdapterFormatError: the weights or the config are missing.
        CorruptFile: the config is not a JSON object.
    """
    folder = adapter if adapter.is_dir() else adapter.parent
    weights = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    config = folder / CONFIG
    if bool(weights) is not config.is_file():
        raise AdapterFormatError(
            "the head saved next to the adapter is incomplete",
            where=folder,
            expected=f"{CONFIG} and {' or '.join(_WEIGHTS)}",
            found=(weights or [config])[0].name,
            then="add the missing file, or remove this one",
        )
    if not weights:
        return None
    try:
        document = json.loads(files.content(config))
        if not isinstance(document, dict) or not isinstance(document.get("config"), dict | None):
            raise ValueError("not the config of a head")
    except ValueError as error:
        raise CorruptFile(
            f"the head's config cannot be read: {error}", where=config, then="download or copy the file again"
        ) from error
    return files.checkpoint(weights[0]), document


def read_head(
    adapter: Path, base: Mapping[str, TensorSpec], model: Mapping[str, Any], files: OpenFiles
) -> Whole | None:
    """The head beside an adapter, by the base's names; or without tensors, and with the reason why it is left.

    Args:
        adapter: the adapter's folder, or its file of weights.
        base: the base's tensors.
        model: its config.json, which says what class it is; empty where there is none.
        files: that are open already.

    Raises:
        AdapterFormatError: half of the head is missing, or its tensors are not those of a head.
        CorruptFile: as `open_head`.
    """
    found = open_head(adapter, files)
    if found is None:
        return None
    checkpoint, config = found
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.specs}
    ref = checkpoint.ref
    classes = model.get("architectures") or [None]
    base_class, own = str(classes[0]), config["config"]
    kind = str(own.get("head_type")) if own else str(config.get("model_class"))
    if classes == [None]:
        return Whole(ref, {}, kind, "the base's class is unknown, because it has no config.json that names it")
    if own:
        known = _CLASSES.get(base_class)
        if known is None or not _same(known, own):
            return Whole(ref, {}, kind, f"{base_class} has no such head: {_described(own)}")
        tensors = _renamed(tensors, known, ref.path)
    elif base_class != kind:
        return Whole(ref, {}, kind, f"the base is a {base_class}")
    for name, tensor in tensors.items():
        if name not in base:
            return Whole(ref, {}, kind, f"the base has no {name} of its own")
        if base[name].shape != tensor.spec.shape:
            shapes = f"{shape_text(base[name].shape)}, the head's {shape_text(tensor.spec.shape)}"
            return Whole(ref, {}, kind, f"the base's {name} is {shapes}: give the base the same number of labels first")
    return Whole(ref, tensors, kind)


def _same(known: _Class, own: Mapping[str, Any]) -> bool:
    """Whether a flexible head is the same as a class's head."""
    layers = own.get("layers")
    if own.get("head_type") != known.head_type or layers != len(known.modules):
        return False
    pooled = known.use_pooler is None or bool(own.get("use_pooler")) is known.use_pooler
    return pooled and (layers == 1 or own.get("activation_function") == known.activation)


def _described(own: Mapping[str, Any]) -> str:
    said = (f"{key} = {own[key]}" for key in ("layers", "activation_function", "use_pooler") if key in own)
    return ", ".join((str(own.get("head_type")), *said))


def _renamed(tensors: Mapping[str, TensorRef], known: _Class, where: str) -> dict[str, TensorRef]:
    """Renames the tensors of a flexible head to a class's names. Raises AdapterFormatError for other tensors."""
    matches = {name: match for name in tensors if (match := _LAYER.fullmatch(name))}
    numbers = sorted({int(match["number"]) for match in matches.values()})
    if len(matches) < len(tensors) or len(numbers) != len(known.modules):
        raise AdapterFormatError(
            "the tensors of the head's file contradict its config",
            where=where,
            expected=f"heads.NAME.N.weight of {len(known.modules)} layers",
            found=", ".join(sorted(tensors)),
            then="download or save the adapter again",
        )
    modules = dict(zip(numbers, known.modules, strict=True))
    return {f"{modules[int(match['number'])]}.{match['last']}": tensors[name] for name, match in matches.items()}
