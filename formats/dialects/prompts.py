"""Reads AdapterHub's and peft's prefixes and prompts. Tested against the libraries, with all models in
`adapterhub_layers`.

The result is plain data. The keys, values and embeddings are the same for every input, but no weight can hold them.
This module does no mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from formats.checkpoint import Checkpoint
from formats.dialects.adapterhub_layers import LAYOUTS, layout_of
from formats.dialects.bottleneck import Dense, Roles, refuse_others, setting, shaped
from formats.dialects.resolve import unmatched_keys
from formats.errors import AdapterFormatError
from formats.spec import CheckpointRef, TensorRef, TensorSpec


@dataclass(frozen=True)
class Network:
    """The network that computes keys and values: second(f(first(embedding))).

    Attributes:
        embedding: (length, width).
        first, second: projections with weights (hidden, width) and (layers · 2 · width, hidden).
        non_linearity: the config's name of f, in lower case.
    """

    embedding: TensorRef
    first: Dense
    second: Dense
    non_linearity: str


@dataclass(frozen=True)
class Prefix:
    """Learned keys and values, put before those of the attention's inputs (Li and Liang, arXiv 2101.00190).

    Attributes:
        ref: the adapter's file.
        length: number of keys and values per layer.
        layers: numbers of the layers that have a prefix.
        values: (length · layers · 2 · width): for each position and layer the key and then the value, with the heads
            concatenated; or the network whose output for each position is (layers · 2 · width).
        attentions: for each layer with a prefix, the base's weight of the attention's output projection.
        width: width of a key.
        moves_positions: whether the input's positions begin after the prefix, rather than at 0.
    """

    ref: CheckpointRef
    length: int
    layers: tuple[int, ...]
    values: TensorRef | Network
    attentions: tuple[str, ...]
    width: int
    moves_positions: bool


@dataclass(frozen=True)
class Prompt:
    """Learned embeddings (length, width), put before the input's own (Lester et al., arXiv 2104.08691).

    Attributes:
        ref: the adapter's file.
        embedding: the embeddings.
        after_first: whether the input's first token stays before the prompt.
        among_words: whether the prompt joins the word embeddings, so that it too gets position embeddings and the
            embedding norm. If not, it is inserted after the whole embedding block.
    """

    ref: CheckpointRef
    embedding: TensorRef
    after_first: bool
    among_words: bool


@dataclass(frozen=True)
class Whole:
    """Tensors that replace the base's: a head that was trained together with an adapter.

    Attributes:
        ref: the head's file.
        tensors: the tensors by the base's names; empty if the head does not fit the base.
        kind: the head's name; empty if unknown.
        left: why the head does not fit the base; empty if it does.
    """

    ref: CheckpointRef
    tensors: Mapping[str, TensorRef]
    kind: str = ""
    left: str = ""


_HOLDER = "base_model."  # prefix of the tensors that peft saves in full together with a prompt
_LOCATIONS = ("self_prefix", "self")  # for models that are encoder or decoder, not both; the latter is DistilBERT's


def read_prefix(
    ref: CheckpointRef,
    roles: Roles,
    own: Mapping[str, Any],
    base: Mapping[str, TensorSpec],
    model_type: str | None = None,
) -> Prefix:
    """Reads a prefix from its tensors by role, the method's config, and the model's type if it is known.

    Raises:
        AdapterFormatError: a setting or the model is not supported, or tensors are missing or unknown.
        ShapeMismatch: tensors do not fit the base's width and depth, or the config.
    """
    sizes = _Sizes.of(ref, base, model_type)
    width, keys, attentions = sizes.width, sizes.keys, sizes.attentions
    layers = tuple(sorted(set(attentions) - set(own.get("leave_out") or ())))
    places = tuple(attentions[layer] for layer in layers)
    length, columns = setting(own, "prefix_length", int, ref), len(layers) * 2 * keys
    location = next((each for each in _LOCATIONS if any(role.startswith(f"{each}.") for role in roles)), _LOCATIONS[0])
    path, where = f"{location}.control_trans", ref.path
    if own.get("flat"):
        flat = shaped(path, roles, (length * columns,), where)
        refuse_others(roles, {flat}, where)
        return Prefix(ref, length, layers, flat, places, keys, False)
    hidden = setting(own, "bottleneck_size", int, ref)
    embedding = shaped(f"{location}.wte.weight", roles, (length, width), where)
    first, second = (
        Dense(shaped(f"{path}.{n}.weight", roles, shape, where), shaped(f"{path}.{n}.bias", roles, shape[:1], where))
        for n, shape in ((0, (hidden, width)), (2, (columns, hidden)))
    )
    refuse_others(roles, {embedding, first.weight, first.bias, second.weight, second.bias}, where)
    network = Network(embedding, first, second, setting(own, "non_linearity", str, ref).lower())
    return Prefix(ref, length, layers, network, places, keys, False)


def read_prompt(
    ref: CheckpointRef,
    roles: Roles,
    own: Mapping[str, Any],
    base: Mapping[str, TensorSpec],
    model_type: str | None = None,
) -> Prompt:
    """Reads a prompt. Arguments and errors are those of `read_prefix`."""
    combine = own.get("combine", "prefix")
    if combine not in ("prefix", "prefix_after_bos"):
        raise AdapterFormatError(
            "an unknown place for a prompt", where=ref.path, expected="prefix, prefix_after_bos", found=combine
        )
    shape = (setting(own, "prompt_length", int, ref), _Sizes.of(ref, base, model_type).width)
    embedding = shaped("prompt_embedding.weight", roles, shape, ref.path)
    refuse_others(roles, {embedding}, ref.path)
    return Prompt(ref, embedding, combine == "prefix_after_bos", False)


def read_peft_prompt(
    checkpoint: Checkpoint, config: Mapping[str, Any], base: Mapping[str, TensorSpec]
) -> tuple[Prefix | Prompt | Whole, ...]:
    """Reads peft's prompt, p-tuning or prefix, which peft saves as the resulting embeddings, or keys and values.

    A head that was trained with it is returned as a part of its own. Raises the errors of `read_prefix`, and
    UnmatchedKeys for a head that the base does not have.
    """
    ref = checkpoint.ref
    sizes = _Sizes.of(ref, base)
    attentions = sizes.attentions
    roles = {name: checkpoint.tensor(name) for name in checkpoint.specs}
    length = setting(config, "num_virtual_tokens", int, ref)
    prefix = config.get("peft_type") == "PREFIX_TUNING"
    columns = len(attentions) * 2 * sizes.keys if prefix else sizes.width
    tensor = shaped("prompt_embeddings", roles, (length, columns), ref.path)
    heads = {name.removeprefix(_HOLDER): part for name, part in roles.items() if name.startswith(_HOLDER)}
    refuse_others(roles, {tensor, *heads.values()}, ref.path)
    absent = [name for name in heads if name not in base]
    if absent:
        raise unmatched_keys(absent, len(heads), base, ref.path)
    for name in heads:
        shaped(name, heads, base[name].shape, ref.path)
    whole = (Whole(ref, heads),) if heads else ()
    if not prefix:
        return Prompt(ref, tensor, False, True), *whole
    layers = tuple(sorted(attentions))
    return Prefix(ref, length, layers, tensor, tuple(attentions[layer] for layer in layers), sizes.keys, True), *whole


@dataclass(frozen=True)
class _Sizes:
    """The sizes that prefixes and prompts must fit.

    Attributes:
        width: width of the model.
        keys: width of an attention's keys and values.
        attentions: the weights of the attentions' output projections, by layer number.
    """

    width: int
    keys: int
    attentions: Mapping[int, str]

    @classmethod
    def of(cls, ref: CheckpointRef, base: Mapping[str, TensorSpec], model_type: str | None = None) -> _Sizes:
        """The sizes of a base. Raises AdapterFormatError if the base is unknown, or not of the adapter's model type."""
        layout = layout_of(base)
        if layout is not None and model_type not in (None, *layout.types):
            raise AdapterFormatError(
                "the adapter is for another type of model than the base, or for one that is not supported",
                where=ref.path,
                expected=" or ".join(layout.types),
                found=model_type,
                then="check that the adapter was made for this base",
            )
        if layout is None:
            raise AdapterFormatError(
                "prefixes and prompts are supported only for models whose layers are known",
                where=ref.path,
                expected=f"a base like {', '.join(each.types[0] for each in LAYOUTS)}",
                found=", ".join(list(base)[:3]),
                then="name such a base",
            )
        attention = layout.places[0]
        paths = dict(layout.layers(base, attention))
        path = next(iter(paths.values()))
        width = base[f"{path}{attention.norm}.weight"].size
        keys = base[f"{path}{layout.keys}.weight"].shape[0] if layout.keys else width
        return cls(width, keys, {number: f"{path}{attention.behind}.weight" for number, path in paths.items()})
