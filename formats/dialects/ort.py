"""Reads and writes ONNX Runtime's `.onnx_adapter`: LoRA factors that a graph takes as inputs.

Parameters are named like the inputs of a graph that `surgery export-onnx --as inputs` makes: `<module>.lora_A` (in,
rank) and `<module>.lora_B` (rank, out), with the module's name in the model's file. The scaling is multiplied into
lora_B. There is no config. The product x·A·B changes the weight by (AB)ᵀ = Bᵀ Aᵀ, so A and B swap roles when they are
read, and nothing is transposed. This module knows no graph and does no mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from formats.adapter import Adapter, AdapterModule, Told
from formats.checkpoint import Checkpoint
from formats.containers import Container, container_named
from formats.dialects.dialect import Dialect
from formats.dialects.peft_factors import Factors, pair
from formats.dialects.resolve import resolver
from formats.dialects.writing import Piece, Wanted, Written, cannot, named, turned, without_dropped
from formats.errors import AdapterFormatError, ShapeMismatch
from formats.layers import LayerKind, layer_kinds, owner
from formats.spec import TensorRef, TensorSpec, shape_text

_FACTOR = re.compile(r"^(?P<module>.+)\.(?P<role>lora_[AB])$")
_KINDS = (LayerKind.LINEAR, LayerKind.TRANSPOSED)
_FILE = f"adapter{Container.ORT.suffixes[0]}"
_MERGE = "merge it, and export the merged model: surgery merge"


class Ort(Dialect):
    """The dialect of ONNX Runtime's adapters, under the names of our graphs' inputs."""

    name = "ort"
    lays_out_by_weight = True
    weights_files = (_FILE,)

    def recognises(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> bool:
        """Whether the file is an `.onnx_adapter`; its names could be those of any dialect."""
        return container_named(checkpoint.ref.path) is Container.ORT

    def read(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any] | None,
        base: Mapping[str, TensorSpec],
        names: Mapping[str, str],
        told: Told,
    ) -> Adapter:
        """Reads the adapter and resolves it against the base's tensors."""
        where = checkpoint.ref.path
        modules: dict[str, Factors] = {}
        for key in checkpoint.specs:
            match = _FACTOR.match(key)
            if match is None:
                raise AdapterFormatError(
                    "a parameter that is not an input of an exported graph",
                    where=where,
                    expected="….lora_A and ….lora_B",
                    found=key,
                    then="use an adapter for a graph that surgery export-onnx wrote",
                )
            modules.setdefault(match["module"], {})[match["role"]] = checkpoint.tensor(key)
        rename = resolver([f"{module}.weight" for module in modules], base, where)
        kinds = layer_kinds(base)
        adapted = []
        for module, factors in sorted(modules.items()):
            a, b = pair(factors, ("lora_A", "lora_B"), f"{where}: {module}")
            weight = base[rename(f"{module}.weight")]
            adapted.append(_module(a, b, weight, kinds.get(owner(weight.name), LayerKind.LINEAR), where))
        return Adapter(checkpoint.ref, self.name, {}, tuple(adapted), ())


def _module(a: TensorRef, b: TensorRef, weight: TensorSpec, kind: LayerKind, where: str) -> AdapterModule:
    """An adapted weight. `kind` is its layer's kind, which decides the layout of a square weight."""
    first, second = a.spec.shape, b.spec.shape
    product = (*first[:1], *second[1:])  # (in, out)
    fits = len(first) == len(second) == 2 and first[1] == second[0] > 0
    if not fits or weight.shape not in (product, product[::-1]):
        raise ShapeMismatch(
            "the adapter does not fit the base's weight",
            where=f"{where}: {weight.name}",
            expected=f"lora_A (in, rank) and lora_B (rank, out) for the base's {shape_text(weight.shape)}",
            found=f"lora_A {shape_text(first)}, lora_B {shape_text(second)}",
            then="check that the adapter was made for this base",
        )
    square = product[0] == product[1]
    lies_so = kind is LayerKind.TRANSPOSED if square else weight.shape == product
    stored = LayerKind.LINEAR if lies_so else LayerKind.TRANSPOSED  # of BA, which is (in, out)
    return AdapterModule(weight.name, "lora", stored, {"lora_A": b, "lora_B": a}, first[1], float(first[1]))


@dataclass(frozen=True)
class OrtWriter:
    """Writes the dialect of ONNX Runtime's adapters: LoRA on linear layers, in the graph's dtype."""

    name: str = "ort"
    weights: str = _FILE

    def write(self, adapter: Adapter, metadata: Mapping[str, str], wanted: Wanted) -> Written:
        """The adapter in this dialect. Also raises AdapterFormatError without a base, which names a graph's inputs."""
        if not wanted.base_name:
            raise AdapterFormatError(
                "a graph's inputs have the names and the dtype of its model's weights, so the base is needed",
                where=adapter.ref.path,
                then="name the model that was exported: --base",
            )
        adapter, dropped = without_dropped(adapter, self.name, wanted)
        pieces: list[Piece] = []
        for module in adapter.modules:
            product = wanted.product(module)
            if product is None or module.method == "dora" or product.module.kind not in _KINDS:
                raise cannot(self.name, {"dora": "DoRA"}.get(module.method, ""), module, _MERGE)
            layer, _, last = module.target.rpartition(".")
            dtype = wanted.base[module.target].dtype
            if last != "weight" or not dtype.is_weight:
                raise AdapterFormatError(
                    "exported graphs do not multiply by this tensor",
                    where=module.target,
                    expected="a layer's floating-point weight",
                    found=dtype,
                    then=_MERGE,
                )
            a, b = turned(product.a), turned(product.b)  # (in, rank), (rank, out)
            for role, piece, factor in (("lora_A", a, 1.0), ("lora_B", b, product.module.scaling)):
                output = replace(piece.output, dtype=dtype)
                pieces.append(named(replace(piece, output=output), f"{layer}.{role}", factor=factor))
        return Written(tuple(pieces), {}, None, dropped)
