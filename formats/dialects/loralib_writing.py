"""Writes loralib's state dicts (microsoft/LoRA). `loralib` reads them.

The file holds no alpha, and a model's layers are usually built with a single alpha. So all scalings are converted to
one alpha. This module does no mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from formats.adapter import Adapter
from formats.dialects.peft_writing import commonest
from formats.dialects.writing import (
    Piece,
    Wanted,
    Written,
    cannot,
    kept_metadata,
    named,
    taken,
    without_dropped,
)
from formats.errors import AdapterFormatError
from formats.layers import LayerKind, owner


@dataclass(frozen=True)
class LoralibWriter:
    """Writes the dialect of microsoft/LoRA: linear layers and embeddings, and biases in full."""

    name: str = "loralib"
    weights: str = "lora.safetensors"

    def write(self, adapter: Adapter, metadata: Mapping[str, str], wanted: Wanted) -> Written:
        """The adapter in this dialect. Also raises AdapterFormatError for convolutions, whose layout differs."""
        adapter, dropped = without_dropped(adapter, self.name, wanted, replaced_biases=True)
        products = {}
        for module in adapter.modules:
            product = wanted.product(module)
            if product is None or module.method == "dora" or module.kind is LayerKind.CONV:
                raise cannot(self.name, {"dora": "DoRA"}.get(module.method, ""), module)
            if not module.target.endswith(".weight"):
                raise AdapterFormatError(
                    f"{self.name} has no name for this weight",
                    where=module.target,
                    then="choose another dialect with --to, such as peft",
                )
            products[owner(module.target)] = product
        alpha = commonest(product.alpha for product in products.values())
        pieces: list[Piece] = []
        folded = 0
        for layer, product in products.items():
            factor = product.module.scaling * product.rank / alpha
            folded += factor != 1.0
            pieces += (named(product.a, f"{layer}.lora_A"), named(product.b, f"{layer}.lora_B", factor=factor))
        pieces += [taken(one.target, one.source) for one in adapter.replacements]
        notes = [f"the file cannot store alpha: load it with lora_alpha = {alpha}"]
        if folded:
            notes.append(f"{folded} layers have another alpha: the difference is multiplied into their lora_B")
        return Written(tuple(pieces), kept_metadata(metadata), None, dropped, tuple(notes))
