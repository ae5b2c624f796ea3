"""toyml, a dialect: keys `layers/0/q:lora_A`, and what is to be said of each layer as JSON in the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from formats.adapter import Adapter, AdapterModule, Told
from formats.checkpoint import Checkpoint
from formats.dialects.dialect import Dialect
from formats.dialects.resolve import resolver
from formats.dialects.writing import Piece, Wanted, Written, cannot, named, taken, without_dropped
from formats.errors import AdapterFormatError
from formats.layers import LayerKind, owner
from formats.spec import TensorRef, TensorSpec


class Toyml(Dialect):
    """Linear layers, by any method."""

    name = "toyml"
    weights = "toyml.safetensors"  # the file that convert writes into a folder
    weights_files = (weights,)  # and those that are read in one

    def recognises(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> bool:
        """By the metadata."""
        return config is None and self.name in checkpoint.metadata

    def read(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any] | None,
        base: Mapping[str, TensorSpec],
        names: Mapping[str, str],
        told: Told,
    ) -> Adapter:
        """The adapter, resolved against the base's tensors."""
        where = checkpoint.ref.path
        layers: dict[str, Any] = json.loads(checkpoint.metadata[self.name])
        factors: dict[str, dict[str, TensorRef]] = {layer: {} for layer in layers}
        for key in checkpoint.specs:
            layer, _, role = key.partition(":")
            if layer not in layers or not role:
                raise AdapterFormatError(
                    "a key that the metadata does not speak of", where=where, expected="LAYER:ROLE", found=key
                )
            factors[layer][role] = checkpoint.tensor(key)
        weights = {layer: f"{layer.replace('/', '.')}.weight" for layer in layers}
        rename = resolver(weights.values(), base, where)  # refuses names that are not the base's, with the nearest
        modules = []
        for layer, said in layers.items():
            roles = sorted(factors[layer])
            if roles != said["roles"]:
                raise AdapterFormatError(
                    "a layer has other factors than it says",
                    where=f"{where}: {layer}",
                    expected=said["roles"],
                    found=roles,
                )
            target = rename(weights[layer])
            rank, alpha = int(said["rank"]), float(said["alpha"])
            modules.append(AdapterModule(target, said["method"], LayerKind.LINEAR, factors[layer], rank, alpha))
        return Adapter(checkpoint.ref, self.name, {}, tuple(modules), ())

    def write(self, adapter: Adapter, metadata: Mapping[str, str], wanted: Wanted) -> Written:
        """The adapter in this dialect: a LoRA's two factors, or what another method has."""
        adapter, dropped = without_dropped(adapter, self.name, wanted)
        pieces: list[Piece] = []
        layers = {}
        for module in adapter.modules:
            layer = owner(module.target).replace(".", "/")
            product, found = wanted.product(module), dict(module.factors)
            if module.kind is not LayerKind.LINEAR or module.settings or not module.target.endswith(".weight"):
                raise cannot(self.name, "", module)
            if product is not None and product.magnitude is None:
                pieces += [named(product.a, f"{layer}:lora_A"), named(product.b, f"{layer}:lora_B")]
                method, rank, alpha, roles = "lora", product.rank, product.alpha, ["lora_A", "lora_B"]
            else:
                pieces += [taken(f"{layer}:{role}", ref) for role, ref in sorted(found.items())]
                method, rank, alpha, roles = module.method, 1, module.scaling, sorted(found)
            layers[layer] = {"method": method, "rank": rank, "alpha": alpha, "roles": roles}
        return Written(tuple(pieces), {self.name: json.dumps(layers)}, None, dropped)


TOYML = Toyml()
