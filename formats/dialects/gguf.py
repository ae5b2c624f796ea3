"""Reads and writes LoRA for llama.cpp, in the form that convert_lora_to_gguf.py writes and llama-adapter.cpp reads.

Keys are gguf's name of the weight plus `.lora_a` (rank, in) or `.lora_b` (out, rank). One alpha applies to all; it is
divided by the rank of each lora_b. The factors belong to llama.cpp's weights: the rows of lora_b are in llama.cpp's
order, and the token embedding's lora_a has one row per token. This module does no mathematics.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from formats.adapter import Adapter, AdapterModule, Told
from formats.checkpoint import Checkpoint
from formats.dialects.dialect import Dialect
from formats.dialects.gguf_names import HEAD, TOKENS, Architecture, architecture_of, gguf_names
from formats.dialects.peft_factors import Factors
from formats.dialects.peft_writing import commonest
from formats.dialects.resolve import unmatched_keys
from formats.dialects.writing import (
    DROP_LAYER,
    SIDES,
    Piece,
    Product,
    Wanted,
    Written,
    cannot,
    kept_metadata,
    turned,
    without_dropped,
)
from formats.errors import AdapterFormatError, ShapeMismatch
from formats.gguf_file import ALPHA, ARCHITECTURE
from formats.gguf_header import ADAPTER, TYPE
from formats.layers import LayerKind
from formats.spec import DType, TensorSpec, shape_text

_METHOD = "adapter.type"
_ACTIVATED = "adapter.alora.invocation_tokens"  # present in adapters that only certain tokens activate
_ENDS = (".lora_a", ".lora_b")
_KEPT = (DType.F32, DType.F16, DType.BF16)  # dtypes that llama.cpp multiplies; others become float32


class Gguf(Dialect):
    """The dialect of llama.cpp's LoRA adapters."""

    name = "gguf"

    def recognises(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> bool:
        """Whether the file's key-values say that it is an adapter."""
        return checkpoint.metadata.get(TYPE) == ADAPTER and ARCHITECTURE in checkpoint.metadata

    def read(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any] | None,
        base: Mapping[str, TensorSpec],
        names: Mapping[str, str],
        told: Told,
    ) -> Adapter:
        """Reads the adapter and resolves it against the base's tensors, whose names depend on the base's class."""
        where, metadata = checkpoint.ref.path, checkpoint.metadata
        if metadata.get(_METHOD) != "lora" or _ACTIVATED in metadata:
            raise AdapterFormatError(
                "only LoRA that applies to every token is supported",
                where=where,
                expected=f"{_METHOD} = lora, and no {_ACTIVATED}",
                found=f"{_METHOD} = {metadata.get(_METHOD)}",
                then="load it with llama.cpp: no weight can express it",
            )
        architecture = architecture_of(told.model, f"{where}'s base")
        if metadata[ARCHITECTURE] != architecture.name:
            raise AdapterFormatError(
                "the adapter is for another architecture than the base's",
                where=where,
                expected=architecture.name,
                found=metadata[ARCHITECTURE],
                then="check that the adapter was made for this base",
            )
        alpha = _alpha(metadata, where)
        known = {name: base[weight] for weight, name in gguf_names(architecture, base).items()}
        pairs = _pairs(checkpoint)
        unmatched = [name for name in pairs if name not in known]
        if unmatched:
            raise unmatched_keys(unmatched, len(pairs), known, where)
        reading = _Reading(architecture, told.model, alpha, where)
        modules = tuple(reading.module(name, factors, known[name]) for name, factors in sorted(pairs.items()))
        return Adapter(checkpoint.ref, self.name, {}, modules, ())


def _alpha(metadata: Mapping[str, str], where: str) -> float:
    """The alpha of all modules. It is 0 if the file has none: llama.cpp then does not scale."""
    try:
        alpha = float(metadata.get(ALPHA, "0"))
    except ValueError:
        alpha = math.nan
    if not math.isfinite(alpha):
        raise AdapterFormatError("alpha is not a finite number other than 0", where=where, found=metadata[ALPHA])
    return alpha


def _pairs(checkpoint: Checkpoint) -> dict[str, Factors]:
    """The factors of every weight, by gguf's name. Raises AdapterFormatError for other tensors, or half a pair."""
    pairs: dict[str, Factors] = {}
    for key in checkpoint.specs:
        stem, end = key[: -len(_ENDS[0])], key[-len(_ENDS[0]) :]
        if end not in _ENDS:
            raise AdapterFormatError(
                "a tensor that is not a factor; llama.cpp ignores it",
                where=f"{checkpoint.ref.path}: {key}",
                expected=f"names that end in {' or '.join(_ENDS)}",
                then="convert the adapter to GGUF again",
            )
        pairs.setdefault(stem, {})["lora_A" if end == _ENDS[0] else "lora_B"] = checkpoint.tensor(key)
    for stem, factors in pairs.items():
        if len(factors) < 2:
            raise AdapterFormatError(
                "one factor of a pair is missing",
                where=f"{checkpoint.ref.path}: {stem}",
                expected=" and ".join(_ENDS),
                found=", ".join(ref.name for ref in factors.values()),
                then="save the adapter again, from the library that trained it",
            )
    return pairs


@dataclass(frozen=True)
class _Reading:
    """The context for reading a module."""

    architecture: Architecture
    model: Mapping[str, Any]
    alpha: float
    where: str

    def module(self, name: str, factors: Factors, weight: TensorSpec) -> AdapterModule:
        """The adapted weight that gguf calls `name`. Raises ShapeMismatch for factors that do not fit it."""
        a, b = factors["lora_A"].spec.shape, factors["lora_B"].spec.shape
        kind = self.architecture.kind(name, weight.name)
        out, into = weight.shape[0], weight.shape[-1]
        if kind is not LayerKind.LINEAR:
            out, into = into, out
        rank = b[-1] if b else 0
        expected = ((into, rank) if name == TOKENS else (rank, into), (out, rank))
        if (a, b) != expected or not rank or len(weight.shape) != 2:
            raise ShapeMismatch(
                "the adapter does not fit the base's weight",
                where=f"{self.where}: {name}",
                expected=f"factors of {weight.name}, {shape_text(weight.shape)}",
                found=f"lora_a {shape_text(a)}, lora_b {shape_text(b)}",
                then="check that the adapter was made for this base",
            )
        heads = self.architecture.heads(name, self.model, out)
        method = "lora_rows" if name == TOKENS else "lora_paired" if heads else "lora"
        settings = {"heads": heads} if heads else {}
        return AdapterModule(weight.name, method, kind, factors, rank, self.alpha or rank, settings=settings)


@dataclass(frozen=True)
class GgufAdapterWriter:
    """The dialect of llama.cpp's LoRA adapters: linear layers, GPT-2's Conv1D, the token embedding."""

    name: str = "gguf"
    weights: str = "adapter.gguf"

    def write(self, adapter: Adapter, metadata: Mapping[str, str], wanted: Wanted) -> Written:
        """The adapter in this dialect. Also raises AdapterFormatError for a class of models that is not known here."""
        architecture = architecture_of(wanted.model, wanted.base_name or adapter.ref.path)
        names = gguf_names(architecture, wanted.base)
        adapter, dropped = without_dropped(adapter, self.name, wanted)
        products: dict[str, Product] = {}
        beyond: list[str] = []
        for module in adapter.modules:
            unadapted = _unadapted(module.target, names, architecture)
            if unadapted and "layer" in wanted.drop:
                beyond += [ref.name for ref in module.factors.values()]
                continue
            if unadapted:
                raise cannot(self.name, unadapted, module, DROP_LAYER)
            product = wanted.product(module)
            if product is None or product.magnitude is not None:
                raise cannot(self.name, "DoRA" if module.method == "dora" else "", module)
            name = names[module.target]
            if name in products:
                raise cannot(self.name, f"two changes of {name}", module)
            self._check_kind(name, product, architecture)
            products[name] = product
        if not products:
            raise AdapterFormatError(f"{self.name} can express no part of this adapter", where=adapter.ref.path)
        alpha = _common_alpha(product.alpha for product in products.values())
        if not alpha or not math.isfinite(alpha):
            raise AdapterFormatError(
                f"{self.name} cannot express this scaling",
                where=adapter.ref.path,
                expected="a nonzero alpha in float32's range: llama.cpp does not scale if alpha is 0",
                found=alpha,
                then="merge the adapter, and convert the merged model",
            )
        pieces: list[Piece] = []
        folded = 0
        for name, product in sorted(products.items()):
            factor = 1.0 if _single(product.alpha) == alpha else product.alpha / alpha
            folded += factor != 1.0
            heads = product.b.heads + architecture.heads(name, wanted.model, product.b.output.shape[0])
            a = turned(product.a) if name == TOKENS else product.a
            pieces.append(_stored(a, f"{name}{_ENDS[0]}"))
            pieces.append(_stored(replace(product.b, factor=factor, heads=heads), f"{name}{_ENDS[1]}"))
        said = {TYPE: ADAPTER, ARCHITECTURE: architecture.name, _METHOD: "lora", ALPHA: repr(alpha)}
        note = f"{folded} layers have another alpha: the difference is multiplied into their lora_b"
        notes = (note,) if folded else ()
        return Written(tuple(pieces), kept_metadata(metadata) | said, None, (*dropped, *beyond), notes)

    def _check_kind(self, name: str, product: Product, architecture: Architecture) -> None:
        """Refuses a layer that is stored otherwise than the model's class stores it."""
        expected = architecture.kind(name, product.module.target)
        if product.module.kind is not expected and not (name == TOKENS and product.module.kind in SIDES):
            raise cannot(self.name, f"{name} of a layer that is not {expected}", product.module)


def _unadapted(target: str, names: Mapping[str, str], architecture: Architecture) -> str:
    """Why llama.cpp cannot adapt a weight; empty if it can."""
    if target not in names:
        return "a weight to which llama.cpp applies no adapter"
    if names[target] == TOKENS and HEAD not in names.values() and not architecture.encoder:
        return "an embedding that is tied to the head too: llama.cpp aborts on its factors"
    return ""


def _common_alpha(alphas: Iterable[float]) -> float:
    """The most common alpha, rounded to float32; 0 if all are 0."""
    return float(commonest([alpha for alpha in map(_single, alphas) if alpha] or [0.0]))


def _single(value: float) -> float:
    """The nearest float32."""
    return ctypes.c_float(value).value


def _stored(piece: Piece, name: str) -> Piece:
    """A factor under a name, in a dtype that llama.cpp multiplies."""
    dtype = piece.output.dtype if piece.output.dtype in _KEPT else DType.F32
    return replace(piece, output=replace(piece.output, name=name, dtype=dtype))
