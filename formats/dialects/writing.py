"""Describes how an adapter is written in a dialect: each output tensor with its sources, the metadata and the config.

This module holds the data, the protocol, and what several dialects share. It knows no container and computes nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

from formats.adapter import Adapter, AdapterModule
from formats.dialects.dotted import CONFIGS
from formats.errors import AdapterFormatError, NotExpressible
from formats.layers import LayerKind, owner
from formats.spec import DType, TensorRef, TensorSpec

SIDES = (LayerKind.TRANSPOSED, LayerKind.EMBEDDING)  # layers that store (in, out)
DROPS = ("bias", "full", "layer")  # what a user may leave behind if the dialect cannot express it
DROP_LAYER = "leave such layers behind: --drop layer"


class Making(StrEnum):
    """How an output is made from its sources, before it is multiplied by its factor."""

    TAKEN = "taken"  # the elements in their order, reshaped if need be
    TURNED = "turned"  # the transpose of a matrix
    BLOCKS = "blocks"  # (n · height, rank) → a block diagonal with n columns of blocks, at the enabled slices of rows
    TURNED_BLOCKS = "turned_blocks"  # the transpose of BLOCKS
    CORED = "cored"  # a core (rank, rank, *kernel) times A (rank, in, …) → (rank, in, *kernel)
    CONSTANT = "constant"  # every element is the factor


_TURNED = {Making.TAKEN: Making.TURNED, Making.BLOCKS: Making.TURNED_BLOCKS}


@dataclass(frozen=True)
class Piece:
    """One output tensor.

    Attributes:
        output: the tensor that is written.
        sources: the tensors that it is made from.
        making: how it is made from them.
        factor: multiplies every element, in float64, before the single rounding to the output's dtype.
        offset: added to every element after the factor, before the rounding.
        enabled: for BLOCKS and TURNED_BLOCKS, which slices of the rows are filled.
        laid: if the output is larger than what is made: for each block of output rows, the index of the made block that
            it contains, or None for a block that contains only `fill`. Empty if the sizes agree.
        fill: value of the elements around the made blocks.
        heads: number of heads whose rows are reordered from halves to pairs, as llama.cpp's rotary embedding needs
            them; negative for the reverse; 0 for none.
        across: whether the reordering applies to the columns, because the output was transposed.
    """

    output: TensorSpec
    sources: tuple[TensorRef, ...] = ()
    making: Making = Making.TAKEN
    factor: float = 1.0
    offset: float = 0.0
    enabled: tuple[bool, ...] = ()
    laid: tuple[int | None, ...] = ()
    fill: float = 0.0
    heads: int = 0
    across: bool = False

    @property
    def is_copy(self) -> bool:
        """Whether the output's bytes are those of its source."""
        same = self.factor == 1.0 and not self.offset
        plain = self.making is Making.TAKEN and same and not self.heads and not self.laid
        return plain and self.sources[0].spec.dtype is self.output.dtype


@dataclass(frozen=True)
class Written:
    """A whole adapter in a dialect.

    Attributes:
        pieces: its tensors.
        metadata: the container's metadata.
        config: the adapter_config.json, if the dialect has one.
        dropped: tensors of the source that are left behind, as the user allowed.
        notes: remarks for the user.
    """

    pieces: tuple[Piece, ...]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None = None
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What the caller specifies about the output.

    Attributes:
        base: the base's tensors, or the tensors that the adapter implies.
        base_name: the base's path, for configs; empty without a base.
        component: the part of a pipeline; empty if unknown.
        drop: which of DROPS may be left behind.
        kinds: the layers' kinds, needed if the source or the output stores every product in the layout of the base's
            weight, whatever the layer.
        model: the base's config.json; empty without one.
    """

    base: Mapping[str, TensorSpec]
    base_name: str = ""
    component: str = ""
    drop: frozenset[str] = field(default_factory=frozenset)
    kinds: Mapping[str, LayerKind] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)

    def product(self, module: AdapterModule) -> Product | None:
        """A module as a product of two factors for its layer; None if it is not such a product of the same size."""
        product = product_of(module, self.base[module.target])
        kind = self.kinds.get(owner(module.target))
        matrix = module.method == "lora" and module.kind in (LayerKind.LINEAR, *SIDES)
        if product is None or kind is None or not matrix or (module.kind in SIDES) == (kind in SIDES):
            return product
        return replace(product, module=replace(module, kind=kind), a=turned(product.b), b=turned(product.a))


class DialectWriter(Protocol):
    """A way of writing an adapter."""

    @property
    def name(self) -> str:
        """The dialect's name."""

    @property
    def weights(self) -> str:
        """Name of the weights file in an output folder; its suffix gives the container."""

    def write(self, adapter: Adapter, metadata: Mapping[str, str], wanted: Wanted) -> Written:
        """The adapter in this dialect; `metadata` is the source's.

        Raises:
            AdapterFormatError: the dialect cannot express something. The error names the flag that drops it, if any.
        """


@dataclass(frozen=True)
class Product:
    """s · BA in a form that every dialect of LoRA can store: how to make A (rank, in, *kernel) and B (out, rank)."""

    module: AdapterModule
    a: Piece
    b: Piece
    rank: int

    @property
    def alpha(self) -> float:
        """The alpha for which alpha/rank is the module's scaling."""
        scaling = self.module.scaling
        own = self.rank == self.module.rank and not self.module.rslora
        return self.module.alpha if own else scaling * self.rank

    @property
    def magnitude(self) -> TensorRef | None:
        """DoRA's magnitudes; None without DoRA."""
        return self.module.factors.get("lora_magnitude_vector")


def product_of(module: AdapterModule, weight: TensorSpec) -> Product | None:
    """A module as a product of two factors, without names; None if it is not such a product of the same size.

    The slices of a fused layer become blocks of one B, a core is multiplied into A, and llama.cpp's row order and
    transposed embedding are reversed.
    """
    factors = module.factors
    if module.method in ("lora", "dora") and module.kind is not LayerKind.PARAMETER and module.part is None:
        a, b = factors["lora_A"], factors["lora_B"]
        spec_a, spec_b = a.spec, b.spec
        kernel = weight.shape[2:]
        if module.kind is LayerKind.CONV:
            spec_a = replace(spec_a, shape=(*spec_a.shape[:2], *kernel))
            spec_b = replace(spec_b, shape=(*spec_b.shape[:2], *(1 for _ in kernel)))
        return Product(module, Piece(spec_a, (a,)), Piece(spec_b, (b,)), module.rank)
    if module.method == "lora_fused":
        enabled = tuple(bool(each) for each in module.settings["enabled"])
        a, b = factors["lora_A"], factors["lora_B"]
        count = sum(enabled)
        rank = module.rank * count
        out = b.spec.shape[0] // count * len(enabled)
        blocks = Piece(replace(b.spec, shape=(out, rank)), (b,), Making.BLOCKS, enabled=enabled)
        return Product(module, Piece(a.spec, (a,)), blocks, rank)
    if module.method in ("lora_paired", "lora_rows"):
        stored_a, stored_b = (Piece(factors[role].spec, (factors[role],)) for role in ("lora_A", "lora_B"))
        if module.method == "lora_rows":
            return Product(module, turned(stored_a), stored_b, module.rank)
        return Product(module, stored_a, replace(stored_b, heads=-module.settings["heads"]), module.rank)
    if module.method == "lora_tucker":
        a, b, mid = factors["lora_A"], factors["lora_B"], factors["lora_mid"]
        shape = (module.rank, a.spec.shape[1], *mid.spec.shape[2:])
        cored = Piece(replace(a.spec, shape=shape), (mid, a), Making.CORED)
        return Product(module, cored, Piece(b.spec, (b,)), module.rank)
    return None


def named(piece: Piece, name: str, **changes: Any) -> Piece:
    """A piece under another name, with other changes if given."""
    return replace(piece, output=replace(piece.output, name=name), **changes)


def turned(piece: Piece) -> Piece:
    """The transpose of a matrix."""
    shape = piece.output.shape[::-1]
    making = {**_TURNED, **{turned: plain for plain, turned in _TURNED.items()}}[piece.making]
    output = replace(piece.output, shape=shape)
    return replace(piece, output=output, making=making, across=bool(piece.heads) and not piece.across)


def constant(name: str, value: float) -> Piece:
    """A float32 scalar tensor."""
    return Piece(TensorSpec(name, DType.F32, ()), (), Making.CONSTANT, value)


def taken(name: str, ref: TensorRef, shape: tuple[int, ...] | None = None, factor: float = 1.0) -> Piece:
    """A tensor, multiplied by a factor if given, under another name and if need be in another shape."""
    return Piece(TensorSpec(name, ref.spec.dtype, ref.spec.shape if shape is None else shape), (ref,), factor=factor)


def cannot(dialect: str, what: str, module: AdapterModule, then: str | None = None) -> NotExpressible:
    """The error for a weight whose change a dialect cannot store.

    Args:
        dialect: the dialect's name.
        what: what it cannot store; empty for the method as such.
        module: the change of the weight.
        then: what to do instead. If it is None, the advice that fits every method except LoRA is given.
    """
    article = "an" if module.kind is LayerKind.EMBEDDING else "a"
    method = f"{module.method} on {article} {module.kind} layer"
    if then is None and not module.method.startswith("lora"):
        then = "convert --to lora turns the ΔW of any method into a LoRA"
    ways = [way for way in (then, None if then and "--drop" in then else DROP_LAYER) if way]
    return NotExpressible(
        f"{dialect} cannot express {what or method}", where=module.target, found=method, then="; or ".join(ways)
    )


def without_dropped(
    adapter: Adapter,
    dialect: str,
    wanted: Wanted,
    *,
    biases: Callable[[AdapterModule], bool] = lambda module: False,
    replaced_biases: bool = False,
    whole: bool = False,
) -> tuple[Adapter, tuple[str, ...]]:
    """Removes what the dialect cannot express and the user allows to drop. Returns the adapter and the dropped names.

    Args:
        adapter: the adapter as read.
        dialect: the dialect's name.
        wanted: says what may be left behind.
        biases: whether the dialect can store this change of a bias.
        replaced_biases: whether the dialect can store biases in full.
        whole: whether the dialect can store whole differences of weights.

    Raises:
        AdapterFormatError: the dialect cannot express something that the user did not allow to drop.
    """
    dropped = []
    modules = []
    for module in adapter.modules:
        if module.target.endswith(".bias") and not biases(module):
            if "bias" not in wanted.drop:
                raise cannot(dialect, "the change of a bias", module, "leave biases behind: --drop bias")
            dropped += [ref.name for ref in module.factors.values()]
        elif module.method == "full" and not module.target.endswith(".bias") and not whole:
            if "full" not in wanted.drop:
                raise cannot(dialect, "a whole difference", module, "drop such tensors with --drop full")
            dropped += [ref.name for ref in module.factors.values()]
        else:
            modules.append(module)
    replacements = []
    for one in adapter.replacements:
        bias = one.target.endswith(".bias") and not one.rows
        if bias and replaced_biases:
            replacements.append(one)
            continue
        flag = "bias" if bias else "full"
        if flag not in wanted.drop:
            raise AdapterFormatError(
                f"{dialect} cannot express a tensor that the adapter carries in full",
                where=one.target,
                found=one.source.name,
                then=f"drop such tensors with --drop {flag}",
            )
        dropped.append(one.source.name)
    if not modules:
        raise AdapterFormatError(
            f"{dialect} can express no part of this adapter", where=adapter.ref.path, found=", ".join(dropped[:3])
        )
    return replace(adapter, modules=tuple(modules), replacements=tuple(replacements)), tuple(dropped)


def joined(parts: Sequence[Written]) -> Written:
    """Joins the parts of a pipeline into one file.

    diffusers' settings of all parts are combined. Where other metadata differs, the first part's is kept.

    Raises:
        AdapterFormatError: the dialect gives tensors of two parts the same name.
    """
    pieces = tuple(piece for part in parts for piece in part.pieces)
    twice = [name for name, count in Counter(piece.output.name for piece in pieces).items() if count > 1]
    if twice:
        raise AdapterFormatError(
            "the dialect gives two of the parts one name",
            found=", ".join(twice[:3]),
            then="convert the parts to files of their own, or choose another dialect with --to",
        )
    metadata = {key: text for part in reversed(parts) for key, text in part.metadata.items()}
    settings: dict[str, Any] = {}
    for part in parts:
        settings |= json.loads(part.metadata.get(CONFIGS, "{}"))
    if settings:
        metadata[CONFIGS] = json.dumps(settings, indent=2, sort_keys=True)
    dropped = tuple(name for part in parts for name in part.dropped)
    return Written(pieces, metadata, None, dropped, tuple(dict.fromkeys(note for part in parts for note in part.notes)))


def kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a source that is still true in another dialect: how it was trained, and the model card.

    Hashes of the file or its tensors are dropped, and so is the config of another dialect.
    """
    stale = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
    return {key: text for key, text in metadata.items() if key.startswith(("ss_", "modelspec.")) and key not in stale}
