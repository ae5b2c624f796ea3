"""Writes LoRA and (IA)³ for AdapterHub (the library adapters). Tested against what the library loads and merges.

One config sets the rank, alpha and adapted places for all layers. So smaller ranks are padded with zeros, a different
alpha is multiplied into B, and places that the config adapts but the adapter does not get factors that change nothing.
Layers without any adapted place are excluded by number. This module does no mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from formats.adapter import Adapter, AdapterModule
from formats.dialects.adapterhub_sites import FUSED, INTERMEDIATE, OUTPUT, SELFATTN, SLICES, Site, sites_of
from formats.dialects.peft_writing import commonest
from formats.dialects.writing import (
    DROP_LAYER,
    Making,
    Piece,
    Wanted,
    Written,
    cannot,
    kept_metadata,
    taken,
    without_dropped,
)
from formats.errors import AdapterFormatError
from formats.layers import LayerKind, layer_kinds, owner
from formats.spec import DType, TensorSpec

_NAME = "adapter"  # the adapter's name in the file; load_as overrides it when loading
_VERSION = "adapters.1.3.0"  # the version whose format this is; before 1.1, alpha had no effect
_THREE = (True,) * len(SLICES)
_STORED = (LayerKind.LINEAR, LayerKind.TRANSPOSED)


@dataclass(frozen=True)
class AdapterHubWriter:
    """Writes AdapterHub's dialect: LoRA or (IA)³ on the layers that the library can adapt."""

    name: str = "adapterhub"
    weights: str = "adapter.safetensors"

    def write(self, adapter: Adapter, metadata: Mapping[str, str], wanted: Wanted) -> Written:
        """The adapter in this dialect. Also raises AdapterFormatError if no base is named."""
        if not wanted.base_name:
            raise AdapterFormatError(
                f"{self.name}'s config says which layers of the whole model are adapted",
                where=adapter.ref.path,
                then="name the base: --base",
            )
        adapter, dropped = without_dropped(adapter, self.name, wanted, biases=lambda module: module.method == "ia3")
        sites = sites_of(wanted.base)
        modules, unreached = _within_reach(adapter, sites, wanted)
        reach = _Reach.of(modules, sites, wanted.base)
        make = _scaled if all(module.method == "ia3" for module in modules.values()) else _low_rank
        pieces, own, notes = make(modules, reach, wanted)
        config = {
            "config": {"architecture": "lora", **reach.settings, **own, "dropout": 0.0, "use_gating": False},
            "model_name": wanted.base_name,
            "name": _NAME,
            "version": _VERSION,
        }
        notes = ("load it with load_adapter(PATH, use_safetensors=True)", *notes)
        described = {"format": "pt", **kept_metadata(metadata)}
        return Written(pieces, described, config, (*dropped, *unreached), notes)


def _within_reach(
    adapter: Adapter, sites: Mapping[str, Site], wanted: Wanted
) -> tuple[dict[str, AdapterModule], tuple[str, ...]]:
    """The adapted layers by name, and the names of tensors that the user allows to be dropped."""
    modules: dict[str, AdapterModule] = {}
    dropped: list[str] = []
    for module in adapter.modules:
        if module.target.endswith(".bias"):
            continue  # (IA)³'s, scaled by the factor of its weight
        inputs = bool(module.settings.get("feedforward"))
        if owner(module.target) in sites and module.kind in _STORED and not inputs:
            modules[owner(module.target)] = module
        elif "layer" in wanted.drop:
            dropped += [ref.name for ref in module.factors.values()]
        else:
            what = (
                "factors of a layer's inputs" if inputs else "a change of this layer, which its library does not adapt"
            )
            raise cannot("adapterhub", what, module, DROP_LAYER)
    if not modules:
        raise AdapterFormatError(
            "adapterhub can express no part of this adapter", where=adapter.ref.path, found=", ".join(dropped[:3])
        )
    return modules, tuple(dropped)


@dataclass(frozen=True)
class _Reach:
    """The smallest config that covers all adapted layers, and everything that it adapts.

    Attributes:
        settings: the config's settings that choose layers.
        sites: every layer that the config adapts.
        sides: (out, in) of these layers; for a fused layer, out is the number of outputs of one slice.
        slices: which slices of a fused layer the config adapts.
    """

    settings: Mapping[str, Any]
    sites: Mapping[str, Site]
    sides: Mapping[str, tuple[int, int]]
    slices: tuple[bool, ...]

    @classmethod
    def of(
        cls, modules: Mapping[str, AdapterModule], sites: Mapping[str, Site], base: Mapping[str, TensorSpec]
    ) -> _Reach:
        """Finds the config for these adapted layers among all sites of the base."""
        adapted = {layer: sites[layer] for layer in modules}
        chosen = {setting for site in adapted.values() for setting in site.settings}
        numbers = {site.layer for site in adapted.values()}
        matrices = {site.matrix for site in adapted.values()}
        for layer, site in adapted.items():
            if site.matrix == FUSED:
                matrices.update(name for name, on in zip(SLICES, _slices(modules[layer]), strict=True) if on)
        settings = {setting: setting in chosen for setting in (SELFATTN, INTERMEDIATE, OUTPUT)}
        reached = {
            layer: site
            for layer, site in sites.items()
            if site.layer in numbers and chosen & set(site.settings) and site.matrix in {"", FUSED, *matrices}
        }
        kinds = layer_kinds(base)
        sides = {}
        for layer, site in reached.items():
            out, into = base[f"{layer}.weight"].shape[:: -1 if kinds[layer] is LayerKind.TRANSPOSED else 1]
            sides[layer] = (out // len(SLICES) if site.matrix == FUSED else out, into)
        return cls(
            {
                **settings,
                "attn_matrices": [name for name in SLICES if name in matrices],
                "leave_out": sorted({site.layer for site in sites.values()} - numbers),
            },
            reached,
            sides,
            tuple(name in matrices for name in SLICES),
        )

    def blocks(self, layer: str) -> tuple[bool, ...]:
        """Which slices of a layer are adapted; a layer that is not fused counts as one slice."""
        return self.slices if self.sites[layer].matrix == FUSED else (True,)


def _slices(module: AdapterModule) -> tuple[bool, ...]:
    """Which slices of a fused layer an adapter changes."""
    enabled = tuple(bool(each) for each in module.settings.get("enabled", ()))
    return enabled if len(enabled) == len(SLICES) else _THREE


Made = tuple[tuple[Piece, ...], dict[str, Any], tuple[str, ...]]  # tensors, settings of the method, notes


def _scaled(modules: Mapping[str, AdapterModule], reach: _Reach, wanted: Wanted) -> Made:
    """(IA)³: one factor per output. The adapter's alpha is kept, because it scales the other slices of fused layers."""
    alpha = commonest(module.scaling for module in modules.values())
    dtype = next(iter(modules.values())).factors["ia3_l"].spec.dtype
    pieces = []
    for layer in sorted(reach.sites):
        name, shape = f"{layer}.loras.{_NAME}.lora_B", (reach.sides[layer][0] * sum(reach.blocks(layer)), 1)
        if layer in modules:
            module = modules[layer]
            pieces.append(taken(name, module.factors["ia3_l"], shape, module.scaling / alpha))
        else:
            pieces.append(Piece(TensorSpec(name, dtype, shape), (), Making.CONSTANT, 1.0 / alpha))
    settings = {"composition_mode": "scale", "r": 1, "alpha": alpha, "init_weights": "ia3"}
    return tuple(pieces), settings, _idle(modules, reach)


@dataclass(frozen=True)
class _Factored:
    """A layer's factors as in the source.

    Attributes:
        module: the adapted layer.
        a, b: how to make the factors.
        rank: rank of both factors.
        slices: which slices of the layer B contains, stacked by rows; a layer that is not fused counts as one slice.
        own: whether A has a block for each slice, rather than one that all slices share.
    """

    module: AdapterModule
    a: Piece
    b: Piece
    rank: int
    slices: tuple[bool, ...]
    own: bool

    @classmethod
    def of(cls, module: AdapterModule, site: Site, wanted: Wanted) -> _Factored:
        """Raises AdapterFormatError for another method."""
        if module.method == "lora_fused" and site.matrix == FUSED and len(module.settings["enabled"]) == len(SLICES):
            a, b = module.factors["lora_A"], module.factors["lora_B"]
            return cls(module, Piece(a.spec, (a,)), Piece(b.spec, (b,)), module.rank, _slices(module), True)
        product = wanted.product(module)
        if product is None or module.method == "dora":
            raise cannot("adapterhub", "DoRA" if module.method == "dora" else "", module)
        return cls(module, product.a, product.b, product.rank, _THREE if site.matrix == FUSED else (True,), False)

    def alpha(self, rank: int) -> float:
        """The alpha for which alpha/rank is the module's scaling."""
        module = self.module
        own = rank == self.rank == module.rank and not module.rslora
        return module.alpha if own else module.scaling * rank

    def laid(self, layer: str, reach: _Reach, rank: int, factor: float) -> tuple[Piece, Piece]:
        """Both factors, laid out for a config of that rank."""
        spec_a, spec_b = _specs(layer, reach, rank, self.a.output.dtype, self.b.output.dtype)
        left = iter(range(sum(self.slices)))
        numbers = [next(left) if on else None for on in self.slices]
        blocks = [number for number, on in zip(numbers, reach.blocks(layer), strict=True) if on]
        blocks_of_a = [number if self.own or number is None else 0 for number in blocks]
        return _laid(self.a, spec_a, blocks_of_a), replace(_laid(self.b, spec_b, blocks), factor=factor)


def _specs(layer: str, reach: _Reach, rank: int, dtype_a: DType, dtype_b: DType) -> tuple[TensorSpec, TensorSpec]:
    """lora_A (rank · n, in) and lora_B (height · n, rank) for n slices of a layer."""
    (height, into), count, path = reach.sides[layer], sum(reach.blocks(layer)), f"{layer}.loras.{_NAME}"
    return (
        TensorSpec(f"{path}.lora_A", dtype_a, (rank * count, into)),
        TensorSpec(f"{path}.lora_B", dtype_b, (height * count, rank)),
    )


def _laid(piece: Piece, output: TensorSpec, blocks: Sequence[int | None]) -> Piece:
    """A factor as an output tensor, padded where the output is larger."""
    return replace(piece, output=output, laid=() if piece.output.shape == output.shape else tuple(blocks))


def _low_rank(modules: Mapping[str, AdapterModule], reach: _Reach, wanted: Wanted) -> Made:
    """LoRA: the factors of each layer; the slices of a fused layer are stacked by rows."""
    factored = {layer: _Factored.of(module, reach.sites[layer], wanted) for layer, module in modules.items()}
    rank = max(each.rank for each in factored.values())
    alphas = {layer: each.alpha(rank) for layer, each in factored.items()}
    alpha = commonest(alphas.values())
    some = next(iter(factored.values()))
    pieces: list[Piece] = []
    for layer in sorted(reach.sites):
        if layer in factored:
            pieces += factored[layer].laid(layer, reach, rank, alphas[layer] / alpha)
        else:
            zeros = _specs(layer, reach, rank, some.a.output.dtype, some.b.output.dtype)
            pieces += (Piece(spec, (), Making.CONSTANT, 0.0) for spec in zeros)
    notes = []
    filled = sum(each.rank < rank for each in factored.values())
    if filled:
        notes.append(f"{filled} layers have a smaller rank: padded with zeros to rank {rank}")
    folded = sum(each != alpha for each in alphas.values())
    if folded:
        notes.append(f"{folded} layers have another alpha: the difference is multiplied into their lora_B")
    settings = {"composition_mode": "add", "r": rank, "alpha": alpha, "init_weights": "lora"}
    return tuple(pieces), settings, (*notes, *_idle(modules, reach))


def _idle(modules: Mapping[str, AdapterModule], reach: _Reach) -> tuple[str, ...]:
    """The note about layers whose factors change nothing."""
    count = len(reach.sites.keys() - modules.keys())
    return (f"{count} more layers are adapted by the config: they get factors that change nothing",) if count else ()
