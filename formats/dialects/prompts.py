"""Reading AdapterHub's and peft's prefixes and prompts. Tested against the libraries, with all models in
`adapterhub_layers`.

What is read is plain data: keys, values and embeddings are the same for every input, but no weight can hold them. Knows
no mathematics.
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
    """What makes keys and values: second(f(first(embedding))).

    Attributes:
        embedding: (length, width).
        first, second: (hidden, width) and (layers · 2 · width, hidden).
        non_linearity: f, as the config calls it, in lower case.
    """

    embedding: TensorRef
    first: Dense
    second: Dense
    non_linearity: str


@dataclass(frozen=True)
class Prefix:
    """Learned keys and values before those of the attention's own inputs (Li and Liang, arXiv 2101.00190).

    Attributes:
        ref: the adapter's file.
        length: how many there are.
        layers: the numbers of the layers that have them.
        values: (length · layers · 2 · width), of each position and layer the key and then the value, heads one after
            the other; or the network whose outputs for every position are (layers · 2 · width).
        attentions: of each layer that has them the base's weight of the attention's outputs.
        width: of a key.
        moves_positions: whether the input's positions begin behind the prefix, rather than at 0.
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
    """Learned embeddings (length, width) before the input's own (Lester et al., arXiv 2104.08691).

    Attributes:
        ref: the adapter's file.
        embedding: the embeddings.
        after_first: whether the input's first token stays before them.
        among_words: whether they are put among the embeddings of words, so that positions and the norm of embeddings
            are theirs too; else they come behind everything that embeds.
    """

    ref: CheckpointRef
    embedding: TensorRef
    after_first: bool
    among_words: bool


@dataclass(frozen=True)
class Whole:
    """Tensors that replace the base's, by its names: heads, which are trained beside an adapter.

    Attributes:
        ref: their file.
        tensors: none where they are left.
        kind: what the head is called; empty where nobody says.
        left: why the base cannot take it; empty where it can.
    """

    ref: CheckpointRef
    tensors: Mapping[str, TensorRef]
    kind: str = ""
    left: str = ""


_HOLDER = "base_model."  # before the names of tensors that peft saves in full beside a prompt
_LOCATIONS = ("self_prefix", "self")  # of models that are encoder or decoder, and not both; the latter DistilBERT's


def read_prefix(
    ref: CheckpointRef,
    roles: Roles,
    own: Mapping[str, Any],
    base: Mapping[str, TensorSpec],
    model_type: str | None = None,
) -> Prefix:
    """The adapter: its tensors by their names within it, the config of the method, and the model's type if it is known.

    Raises:
        AdapterFormatError: settings or models that are not read, tensors that are missing or belong to nothing.
        ShapeMismatch: tensors that do not fit the base's width and depth, or the config.
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
    """The adapter, as `read_prefix`."""
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
    """peft's prompt, p-tuning or prefix: saved as the embeddings, or the keys and values, that they come to.

    Heads that were trained beside it come as a part of their own. Raises as `read_prefix`, and UnmatchedKeys for a head
    that the base does not have.
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
    """What prefixes and prompts must fit.

    Attributes:
        width: of the model.
        keys: of an attention's keys, and of its values.
        attentions: the weights of the attentions' outputs, by their layers' numbers.
    """

    width: int
    keys: int
    attentions: Mapping[int, str]

    @classmethod
    def of(cls, ref: CheckpointRef, base: Mapping[str, TensorSpec], model_type: str | None = None) -> _Sizes:
        """A base's. Raises AdapterFormatError for one that is not known, or not of the adapter's type."""
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
