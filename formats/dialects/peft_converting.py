"""Writes an adapter of any dialect in peft's names with peft's config, or in diffusers' names, which are peft's with
the name of a pipeline's part as prefix. Tested against peft itself.

One config gives the method, so all layers must have the same one; ranks and alphas may differ. This module does no
mathematics.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from formats.adapter import Adapter, AdapterModule
from formats.dialects.dotted import CONFIGS
from formats.dialects.parts import DOTTED, prefix_of
from formats.dialects.peft_factors import PREFIX
from formats.dialects.peft_ia3 import ia3_form
from formats.dialects.peft_kronecker import kronecker_config
from formats.dialects.peft_writing import (
    Extracted,
    bias_key,
    commonest,
    factor_keys,
    full_key,
    lora_config,
    magnitude_key,
    magnitude_shape,
)
from formats.dialects.unet_names import NameForm, Names
from formats.dialects.writing import (
    Piece,
    Product,
    Wanted,
    Written,
    cannot,
    kept_metadata,
    named,
    taken,
    without_dropped,
)
from formats.errors import AdapterFormatError
from formats.layers import LayerKind, ancestors, owner
from formats.paths import ADAPTER_WEIGHTS

_PRODUCTS = ("lora", "dora", "lora_fused", "lora_tucker")


@dataclass(frozen=True)
class PeftWriter:
    """Writes the dialect of Hugging Face's peft: LoRA, DoRA, LoHa, LoKr, (IA)³, biases and other tensors in full."""

    name: str = "peft"
    weights: str = ADAPTER_WEIGHTS

    def write(self, adapter: Adapter, metadata: Mapping[str, str], wanted: Wanted) -> Written:
        """The adapter in this dialect."""
        adapter, dropped = without_dropped(adapter, self.name, wanted, biases=lambda module: True, replaced_biases=True)
        described = {"format": "pt", **kept_metadata(metadata)}
        methods = {module.method for module in adapter.modules}
        if methods and methods <= {"ia3", "lycoris_ia3"}:
            pieces, config = ia3_form(adapter, wanted)
            return Written(pieces, described, config, dropped)
        for method in ("loha", "lokr"):
            if methods == {method}:
                pieces = tuple(piece for module in adapter.modules for piece in _kronecker(module))
                config = kronecker_config(method, adapter, wanted.base) | {"base_model_name_or_path": wanted.base_name}
                return Written(pieces, described, config, dropped)
        pieces, config = lora_form(adapter, wanted, self.name)
        targets = {owner(module.target) for module in adapter.modules}
        for one in adapter.replacements:
            key = full_key(one.target, wrappers=1 if owner(one.target) in targets else 0)
            pieces += (taken(key, one.source),)
        config["bias"] = "all" if adapter.replacements else "none"
        return Written(pieces, described, config, dropped)


@dataclass(frozen=True)
class DiffusersWriter:
    """Writes the dialect of Hugging Face's diffusers: peft's LoRA and DoRA, prefixed with a pipeline's part."""

    name: str = "diffusers"
    weights: str = "pytorch_lora_weights.safetensors"

    def write(self, adapter: Adapter, metadata: Mapping[str, str], wanted: Wanted) -> Written:
        """The adapter in this dialect. Also raises AdapterFormatError if the part is unknown."""
        adapter, dropped = without_dropped(adapter, self.name, wanted, biases=lambda module: True)
        if not wanted.component:
            raise AdapterFormatError(
                "diffusers' files name the part of a pipeline that they adapt, and this adapter does not",
                where=adapter.ref.path,
                expected=", ".join(DOTTED.values()),
                then="name it, e.g. --component unet",
            )
        for module in adapter.modules:
            product = wanted.product(module)
            kind = product.module.kind if product else module.kind
            if kind not in (LayerKind.LINEAR, LayerKind.CONV):
                raise cannot(self.name, "layers that are neither linear nor a convolution", module)
        # diffusers distinguishes unet from transformer.
        prefix = f"{wanted.component}." if f"{wanted.component}." in DOTTED else prefix_of(wanted.component, DOTTED)
        pieces, config = lora_form(*_in_their_names(adapter, wanted), self.name)
        pieces = tuple(named(piece, f"{prefix}{piece.output.name.removeprefix(PREFIX)}") for piece in pieces)
        told = {f"{prefix}{key}": value for key, value in config.items() if value is not None}
        text = json.dumps(told, indent=2, sort_keys=True)
        return Written(pieces, {"format": "pt", **kept_metadata(metadata), CONFIGS: text}, None, dropped)


def _in_their_names(adapter: Adapter, wanted: Wanted) -> tuple[Adapter, Wanted]:
    """An adapter and its base with layers renamed to diffusers' names. Raises AdapterFormatError as Names.adapted."""
    names = Names.of("diffusers", NameForm.DIFFUSERS, map(owner, wanted.base))

    def renamed(tensor: str) -> str:
        return f"{names.get(owner(tensor))}.{tensor.rpartition('.')[2]}"

    for module in adapter.modules:
        names.adapted(owner(module.target))
    modules = tuple(replace(module, target=renamed(module.target)) for module in adapter.modules)
    base = {renamed(name): replace(spec, name=renamed(name)) for name, spec in wanted.base.items()}
    kinds = {names.get(module): kind for module, kind in wanted.kinds.items()}
    return replace(adapter, modules=modules), replace(wanted, base=base, kinds=kinds)


def lora_form(adapter: Adapter, wanted: Wanted, dialect: str) -> tuple[tuple[Piece, ...], dict[str, Any]]:
    """The tensors of LoRA or DoRA under peft's names, and their config.

    Raises:
        AdapterFormatError: the method is another, or only some of the layers have DoRA or a change of the bias.
    """
    products: dict[str, Product] = {}
    biases: dict[str, AdapterModule] = {}
    for module in adapter.modules:
        if module.target.endswith(".bias"):
            biases[owner(module.target)] = module
            continue
        product = wanted.product(module)
        if product is None or not module.target.endswith(".weight"):
            if module.method in _PRODUCTS:
                raise cannot(dialect, "this weight", module)
            raise cannot(dialect, f"{module.method} together with LoRA" if products else "", module)
        products[owner(module.target)] = product
    for what, some in (
        ("DoRA", {layer for layer, product in products.items() if product.magnitude is not None}),
        ("the change of a bias", set(biases)),
    ):
        if some and some != set(products):
            layer = min(some ^ set(products))
            then = None if what == "DoRA" else "leave biases behind: --drop bias"
            other = products[layer].module if layer in products else biases[layer]
            raise cannot(dialect, f"{what} on some layers and not on others", other, then)
    pieces = tuple(piece for layer, product in products.items() for piece in _product(layer, product, wanted))
    for layer, module in biases.items():
        (ref,) = module.factors.values()
        pieces += (taken(bias_key(layer), ref, factor=module.scaling / products[layer].module.scaling),)
    holders = {owner(name) for name in wanted.base}
    ranks = {layer: product.rank for layer, product in products.items()}
    described = Extracted(
        ranks=ranks,
        saved=(),
        biases=False,
        transposed=any(product.module.kind is LayerKind.TRANSPOSED for product in products.values()),
        modules=frozenset(holders.union(*map(ancestors, holders))),
        rank=commonest(ranks.values()),
        base=wanted.base_name,
        lora_bias=bool(biases),
        dora=any(product.magnitude is not None for product in products.values()),
        alphas={layer: product.alpha for layer, product in products.items()},
    )
    return pieces, lora_config(described)


def _product(layer: str, product: Product, wanted: Wanted) -> Iterator[Piece]:
    key_a, key_b = factor_keys(layer, product.module.kind)
    yield named(product.a, key_a)
    yield named(product.b, key_b)
    if product.magnitude is not None:
        weight = wanted.base[product.module.target]
        shape = magnitude_shape(product.module.kind, weight.shape)
        yield taken(magnitude_key(layer), product.magnitude, shape)


def _kronecker(module: AdapterModule) -> Iterator[Piece]:
    layer = owner(module.target)
    for role, ref in sorted(module.factors.items()):
        yield taken(f"{PREFIX}{layer}.{role}", ref)
