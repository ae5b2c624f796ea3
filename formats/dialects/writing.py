"""What it takes to write an adapter in a dialect: each output tensor with what it is made of, metadata and config.

Data, the protocol, and the forms that several dialects share. Knows no container and computes nothing.
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
DROPS = ("bias", "full", "layer")  # what a user may leave behind where a dialect cannot express it
DROP_LAYER = "leave such layers behind: --drop layer"


class Making(StrEnum):
    """How an output comes from its sources, before its factor."""

    TAKEN = "taken"  # the elements in their order, in whatever shape
    TURNED = "turned"  # the transpose of a matrix
    BLOCKS = "blocks"  # (n · height, rank) → blocks on a diagonal of n columns, at the enabled slices of the rows
    TURNED_BLOCKS = "turned_blocks"  # the transpose of that
    CORED = "cored"  # a core (rank, rank, *kernel) and A (rank, in, …) → (rank, in, *kernel)
    CONSTANT = "constant"  # the factor, in every element


_TURNED = {Making.TAKEN: Making.TURNED, Making.BLOCKS: Making.TURNED_BLOCKS}


@dataclass(frozen=True)
class Piece:
    """One output tensor.

    Attributes:
        output: as it will be written.
        sources: what it is made of.
        making: how.
        factor: of every element, in float64 before the one rounding to the output's dtype.
        offset: added to every element after that.
        enabled: for BLOCKS, turned or not, the slices of the rows.
        laid: where the output has more than what is made, the number of the made block that lies in each of its blocks
            of rows, with `fill` around it; None for a block of nothing else.
        fill: there.
        heads: of so many heads the rows go from halves to pairs, as llama.cpp rotates them; negative, the way back.
        across: whether the rows of those heads are the output's columns, since it has been turned round.
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
        """Whether the bytes stay what they are."""
        same = self.factor == 1.0 and not self.offset
        plain = self.making is Making.TAKEN and same and not self.heads and not self.laid
        return plain and self.sources[0].spec.dtype is self.output.dtype


@dataclass(frozen=True)
class Written:
    """A whole adapter in a dialect.

    Attributes:
        pieces: its tensors.
        metadata: of the container.
        config: its adapter_config.json, where the dialect has one.
        dropped: tensors of the source that are left behind because the user said so.
        notes: what the user should know.
    """

    pieces: tuple[Piece, ...]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None = None
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What the caller says of the output.

    Attributes:
        base: the base's tensors, or those that the adapter implies.
        base_name: the base's path, for configs; empty without one.
        component: the part of a pipeline; empty where nobody says.
        drop: what may be left behind, of DROPS.
        kinds: the layers' kinds, where the source's products lie as the base's weights do, whatever the layer, or the
            other way round.
        model: the base's config.json; empty without one.
    """

    base: Mapping[str, TensorSpec]
    base_name: str = ""
    component: str = ""
    drop: frozenset[str] = field(default_factory=frozenset)
    kinds: Mapping[str, LayerKind] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)

    def product(self, module: AdapterModule) -> Product | None:
        """A module as a product of two factors of its layer; None for one that is no such product of the same size."""
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
        """The dialect's."""

    @property
    def weights(self) -> str:
        """The weights' file where the output is a folder; its end tells the container."""

    def write(self, adapter: Adapter, metadata: Mapping[str, str], wanted: Wanted) -> Written:
        """The adapter in this dialect; `metadata` is the source's.

        Raises:
            AdapterFormatError: what the dialect cannot express, with the flag that drops it where there is one.
        """


@dataclass(frozen=True)
class Product:
    """s · BA as any dialect of LoRA can have it: how to make A (rank, in, *kernel) and B (out, rank)."""

    module: AdapterModule
    a: Piece
    b: Piece
    rank: int

    @property
    def alpha(self) -> float:
        """Alpha with which alpha/rank is the scaling."""
        scaling = self.module.scaling
        own = self.rank == self.module.rank and not self.module.rslora
        return self.module.alpha if own else scaling * self.rank

    @property
    def magnitude(self) -> TensorRef | None:
        """DoRA's, where there is one."""
        return self.module.factors.get("lora_magnitude_vector")


def product_of(module: AdapterModule, weight: TensorSpec) -> Product | None:
    """A module as a product of two factors, without names; None for one that is no such product of the same size.

    A fused layer's slices become blocks of one B, a core is multiplied into A, and llama.cpp's order of rows and its
    embedding are turned back.
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
    """A piece under a name."""
    return replace(piece, output=replace(piece.output, name=name), **changes)


def turned(piece: Piece) -> Piece:
    """A matrix the other way round."""
    shape = piece.output.shape[::-1]
    making = {**_TURNED, **{turned: plain for plain, turned in _TURNED.items()}}[piece.making]
    output = replace(piece.output, shape=shape)
    return replace(piece, output=output, making=making, across=bool(piece.heads) and not piece.across)


def constant(name: str, value: float) -> Piece:
    """A tensor of one number, in float32."""
    return Piece(TensorSpec(name, DType.F32, ()), (), Making.CONSTANT, value)


def taken(name: str, ref: TensorRef, shape: tuple[int, ...] | None = None, factor: float = 1.0) -> Piece:
    """A tensor as it is, or multiplied, under another name and perhaps in another shape."""
    return Piece(TensorSpec(name, ref.spec.dtype, ref.spec.shape if shape is None else shape), (ref,), factor=factor)


def cannot(dialect: str, what: str, module: AdapterModule, then: str | None = None) -> NotExpressible:
    """The error for a weight whose change a dialect has no way to write.

    Args:
        dialect: its name.
        what: it has no place for; empty for the method as such.
        module: the change.
        then: what to do instead; where nothing is said, what holds for every method but LoRA.
    """
    article = "an" if module.kind is LayerKind.EMBEDDING else "a"
    method = f"{module.method} on {article} {module.kind} layer"
    if then is None and not module.method.startswith("lora"):
        then = "--to lora makes a LoRA of any method's ΔW"
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
    """The adapter without what the dialect cannot express and the user lets go, and the names of those tensors.

    Args:
        adapter: as read.
        dialect: its name.
        wanted: what may be left behind.
        biases: tells the changes of biases that the dialect has.
        replaced_biases: whether it has biases in full.
        whole: whether it has whole differences of weights.

    Raises:
        AdapterFormatError: something that the dialect cannot express, and that the user did not let go.
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
    """The parts of a pipeline as one file: diffusers' settings of all of them, of other metadata the first part's.

    Raises:
        AdapterFormatError: two parts that the dialect gives one name.
    """
    pieces = tuple(piece for part in parts for piece in part.pieces)
    twice = [name for name, count in Counter(piece.output.name for piece in pieces).items() if count > 1]
    if twice:
        raise AdapterFormatError("the dialect gives two of the parts one name", found=", ".join(twice[:3]))
    metadata = {key: text for part in reversed(parts) for key, text in part.metadata.items()}
    settings: dict[str, Any] = {}
    for part in parts:
        settings |= json.loads(part.metadata.get(CONFIGS, "{}"))
    if settings:
        metadata[CONFIGS] = json.dumps(settings, indent=2, sort_keys=True)
    dropped = tuple(name for part in parts for name in part.dropped)
    return Written(pieces, metadata, None, dropped, tuple(dict.fromkeys(note for part in parts for note in part.notes)))


def kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of a source's metadata still holds in another dialect: how it was trained, and the model's card.

    Hashes of the file or its tensors do not, and neither does the config of another dialect.
    """
    stale = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
    return {key: text for key, text in metadata.items() if key.startswith(("ss_", "modelspec.")) and key not in stale}
