"""Determines the kind of each weight of a model from the available evidence.

Names and shapes come first, then the numbers in config.json. Only if these leave a doubt does transformers build the
model on the meta device, without weights and without running foreign code. If a doubt remains, the user must settle it
with a flag; nothing is guessed. This module reads no payload.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from formats.layers import LayerKind, layer_kinds, owner, untold
from formats.spec import TensorSpec, shape_text
from surgery.errors import SurgeryError
from surgery.model.meta_model import known_names, may_rename, meta_model
from surgery.model.patterns import matching

# What --kind accepts: a layer's kind, a matrix that is no layer's, the layout of a stack of experts, or "in full".
ASKED = ("linear", "transposed", "embedding", "conv", "parameter", "experts", "experts-transposed", "full")
_ROUTER = re.compile(r"gate|router", re.IGNORECASE)
_LIKE_EXPERTS = re.compile(r"\.(gate|w[123]|gate_proj|up_proj|down_proj)\.weight$")
_HEAD = re.compile(r"head|decoder|output|classifier|logits|score|predict|proj", re.IGNORECASE)
_KERNEL = 64  # the longest plausible kernel of a Conv1d; anything longer may be a stack of matrices


@dataclass(frozen=True)
class Structure:
    """What is known of a model's weights.

    Attributes:
        kinds: the kind of every tensor that could become factors.
        swapped: stacks of experts stored (experts, in, out) instead of (experts, out, in).
        doubtful: tensors whose kind is not certain, with the reason.
        order: parameters in the order in which the model registers them, or in which the user names them.
        names: the model's own names of tensors, if the model was built; transformers renames some while loading.
        fused: tensors that transformers fuses into others while loading.
        config: the model's config.json; empty without one.
    """

    kinds: Mapping[str, LayerKind]
    swapped: frozenset[str] = frozenset()
    doubtful: Mapping[str, str] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    fused: frozenset[str] = frozenset()
    config: Mapping[str, Any] = field(default_factory=dict)


def learn_structure(specs: Mapping[str, TensorSpec], paths: Iterable[str], asked: Mapping[str, str]) -> Structure:
    """Determines the structure of a model, and settles as many doubts as possible.

    Args:
        specs: the model's tensors.
        paths: paths of the model and its base; the first config.json in their folders is used as evidence.
        asked: the user's choices, one of ASKED by pattern. They override all evidence.

    Raises:
        SurgeryError: a kind is unknown, or does not fit the weight's shape.
        UnknownTensor: a pattern matches nothing.
    """
    folder, config = _read_config(paths)
    kinds = {f"{module}.weight": kind for module, kind in layer_kinds(specs).items()}
    kinds |= {name: LayerKind.PARAMETER for name, spec in specs.items() if _is_parameter(name, spec, kinds)}
    doubtful = dict(_doubts(specs, kinds, config))
    told = _told(asked, specs)
    learned: dict[str, LayerKind | None] = {}
    swapped: set[str] = set()
    names: dict[str, str] = {}
    fused: frozenset[str] = frozenset()
    # Shapes do not show a convolution's groups.
    asks = doubtful.keys() - told.keys() or LayerKind.CONV in kinds.values() or may_rename(config)
    model = meta_model(folder) if config and asks else None
    if model is not None:
        names, fused = known_names(model, specs)
        learned, swapped = _of_model(model, names, specs)
    for name in learned.keys() & kinds.keys():  # what the model says is certain; tensors it lacks keep their doubt
        kind = learned[name]
        kinds = {**kinds, name: kind} if kind else {other: k for other, k in kinds.items() if other != name}
        doubtful.pop(name, None)
    if fused:
        # In a model with experts, peft takes every layer with such a name for an expert and loses it, but it keeps
        # parameters.
        kinds |= {name: LayerKind.PARAMETER for name in names if _LIKE_EXPERTS.search(name) and name in kinds}
    for name, word in told.items():
        doubtful.pop(name, None)
        kinds.pop(name, None)
        swapped -= {name}
        if word.startswith("experts"):
            kinds[name] = LayerKind.PARAMETER
            swapped |= {name} if word == "experts-transposed" else set()
        elif word != "full":
            kinds[name] = LayerKind(word)
    order = tuple(learned or told)
    doubtful |= _unordered(kinds, order)
    return Structure(kinds, frozenset(swapped), doubtful, order, names, fused, config)


def _read_config(paths: Iterable[str]) -> tuple[Path, Mapping[str, Any]]:
    """The first folder with a config.json that is a JSON object, and the config; empty if there is none."""
    folders = [path if path.is_dir() else path.parent for path in map(Path, paths)]
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if isinstance(document, dict):
                return folder, document
    return folders[0], {}


def _is_parameter(name: str, spec: TensorSpec, kinds: Mapping[str, LayerKind]) -> bool:
    """Whether a tensor is a matrix, or a stack of them, that belongs to no ordinary layer."""
    if name in kinds or not spec.dtype.is_weight or re.search(r"bias(es)?$", name):
        return False
    return len(spec.shape) == 2 or (len(spec.shape) == 3 and spec.shape[0] > 1)


def _doubts(
    specs: Mapping[str, TensorSpec], kinds: Mapping[str, LayerKind], config: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    numbers = set(_numbers(config))
    open_squares = untold(specs)
    for name, kind in kinds.items():
        shape = specs[name].shape
        last = owner(name).rpartition(".")[2]
        if owner(name) in open_squares and name.endswith(".weight"):
            yield name, "a square weight with a bias: nothing tells which side is the output"
        elif kind is LayerKind.EMBEDDING and numbers and shape[0] not in numbers:
            yield name, f"named like an embedding, but its {shape[0]} rows do not appear in config.json"
        elif (
            kind is LayerKind.LINEAR
            and f"{owner(name)}.bias" not in specs
            and shape[0] == config.get("vocab_size")
            and not _HEAD.search(last)
        ):
            yield name, "as long as the vocabulary: an embedding or a head"
        elif kind is LayerKind.LINEAR and _ROUTER.fullmatch(last):
            yield name, "a router: some models have a linear layer here, others a bare parameter"
        elif kind is LayerKind.CONV and len(shape) == 3 and shape[2] > _KERNEL:
            yield name, f"a convolution with a kernel of {shape[2]}, or a stack of matrices"
        elif kind is LayerKind.PARAMETER and len(shape) == 3:
            yield name, "a stack of matrices: nothing tells which side is the output"


def _numbers(value: Any) -> Iterator[int]:
    """Every integer in a config, at any depth."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _told(asked: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The user's choice of kind for each tensor, in the order in which the choices were given."""
    told: dict[str, str] = {}
    for pattern, kind in asked.items():
        if kind not in ASKED:
            raise SurgeryError(
                "no such kind of weight",
                where=f"--kind {pattern}",
                expected=", ".join(ASKED),
                found=kind,
                then=f"pass one of these, for example --kind {pattern}=linear",
            )
        for name in matching(list(specs), pattern):
            told[name] = kind
            _check_shape(name, specs[name], kind)
    return told


def _check_shape(name: str, spec: TensorSpec, kind: str) -> None:
    dimensions = {"conv": (3, 4, 5), "experts": (3,), "experts-transposed": (3,), "full": range(9)}.get(kind, (2,))
    if len(spec.shape) not in dimensions:
        raise SurgeryError(
            "a weight of this shape cannot be of that kind",
            where=f"--kind {name}={kind}",
            expected=f"{' or '.join(map(str, dimensions))} dimensions",
            found=shape_text(spec.shape),
            then="choose a kind that fits the shape",
        )


def _unordered(kinds: Mapping[str, LayerKind], order: Sequence[str]) -> dict[str, str]:
    """Parameters that share a module with others, and whose order is not known."""
    places = {name: place for place, name in enumerate(order)}
    modules: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        if kind is LayerKind.PARAMETER:
            modules.setdefault(owner(name), []).append(name)
    reason = "one of several parameters of its module, which peft nests in the model's own order"
    return {name: reason for names in modules.values() if len(names) > 1 for name in names if name not in places}


def _of_model(
    model: Any, names: Mapping[str, str], specs: Mapping[str, TensorSpec]
) -> tuple[dict[str, LayerKind | None], set[str]]:
    """The kinds of the model's own modules in the order of registration (None for a layer that factors cannot adapt),
    and the stacks of experts stored (experts, in, out)."""
    stored = {known: name for name, known in names.items()}
    kinds: dict[str, LayerKind | None] = {}
    swapped: set[str] = set()
    for module_name, module in model.named_modules():
        for last, parameter in module.named_parameters(recurse=False):
            name = stored.get(f"{module_name}.{last}" if module_name else last)
            if name is None or tuple(parameter.shape) != specs[name].shape:
                continue
            kinds[name] = kind = _kind_of(module, last, parameter.dim())
            if kind is LayerKind.PARAMETER and parameter.dim() == 3 and getattr(module, "is_transposed", False):
                swapped.add(name)
    return kinds, swapped


def _is_plain(convolution: Any) -> bool:
    """Whether peft can adapt the convolution. With groups, BA would connect channels that the weight does not; and
    peft's forward passes on neither dilation nor padding mode."""
    undilated = all(step == 1 for step in convolution.dilation)
    return bool(convolution.groups == 1 and undilated and convolution.padding_mode == "zeros")


def _kind_of(module: Any, parameter: str, dimensions: int) -> LayerKind | None:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if parameter == "weight":
        ours = {
            nn.Linear: LayerKind.LINEAR,
            Conv1D: LayerKind.TRANSPOSED,
            nn.Embedding: LayerKind.EMBEDDING,
            nn.Conv1d: LayerKind.CONV,
            nn.Conv2d: LayerKind.CONV,
            nn.Conv3d: LayerKind.CONV,
        }
        for layer, kind in ours.items():
            if isinstance(module, layer):
                return kind if kind is not LayerKind.CONV or _is_plain(module) else None
    return LayerKind.PARAMETER if dimensions in (2, 3) else None
