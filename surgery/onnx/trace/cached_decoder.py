"""Decoders with cached keys and values: one graph does prefill and every further step.

Inputs and outputs have optimum's names: `past_key_values.N.key`, `present.N.key` and so on, each
(batch, heads, length, width). The first call has a past of length 0. `position_ids` are an input, because only the
caller knows where left padding ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.onnx.trace.program import FLOAT, Input, OutputComparison, Program, Runtime, as_arrays, as_tensors

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

TRIALS = ((1, 1), (1, 9), (3, 6))  # batch, tokens of the prompt
STEPS = (1, 1, 2)  # tokens of the further calls
PAST, PRESENT = "past_key_values", "present"


@dataclass(frozen=True)
class CacheShape:
    """The number of layers, the number of key and value heads, and the width of a head."""

    layers: int
    heads: int
    width: int

    def names(self, stem: str, part: str = "") -> list[str]:
        """`stem.0.key`, `stem.0.value`, `stem.1.key` …, with the `part` before key and value."""
        return [f"{stem}.{n}{part}.{what}" for n in range(self.layers) for what in ("key", "value")]

    def inputs(self, length: str | int, part: str = "") -> tuple[Input, ...]:
        """The inputs that hold a past of this length."""
        return tuple(Input(n, FLOAT, ("batch", self.heads, length, self.width)) for n in self.names(PAST, part))

    def empty(self, batch: int, part: str = "") -> dict[str, Array]:
        """A cache of length 0."""
        import numpy as np

        return {n: np.zeros((batch, self.heads, 0, self.width), np.float32) for n in self.names(PAST, part)}


@dataclass(frozen=True)
class CachedDecoder:
    """A decoder that continues from its cache.

    Attributes:
        program: its graph.
        cache: the shape of the cache.
        vocabulary: size of the vocabulary; token ids are below it.
        longest: the longest sequence to try.
    """

    program: Program
    cache: CacheShape
    vocabulary: int
    longest: int

    @property
    def programs(self) -> tuple[Program, ...]:
        """The graph."""
        return (self.program,)

    def compare(self, module: Any, runtime: Runtime, seed: int) -> Iterator[OutputComparison]:
        """As in ModelKind: runs a left-padded prompt (except its first row) and steps from the graph's own cache, and
        compares them with the module's single pass over all tokens, without a cache."""
        import numpy as np

        rng = np.random.default_rng(seed)
        for batch, prompt in TRIALS:
            total = min(prompt + sum(STEPS), self.longest)
            ids = rng.integers(0, self.vocabulary, (batch, total))
            mask = np.ones_like(ids)
            for row in range(1, batch):
                mask[row, : int(rng.integers(1, prompt))] = 0
            positions = np.maximum(mask.cumsum(1) - 1, 0)
            whole = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            fed = as_tensors(self._fed(whole), module)
            plain = module(**fed, use_cache=False)
            held = self.program.call(module, fed | as_tensors(self.cache.empty(batch), module))
            reference = as_arrays(held | {"logits": plain.logits})
            past, begin = self.cache.empty(batch), 0
            for length in (prompt, *STEPS):
                end = min(begin + length, total)
                if begin == end:
                    break
                now = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end]}
                found = runtime.run("", self._fed({**now, "position_ids": positions[:, begin:end]}) | past)
                past = dict(zip(past, (found[name] for name in self.cache.names(PRESENT)), strict=True))
                valid = mask[:, begin:end].astype(bool)
                yield OutputComparison(
                    "logits", (batch, end), reference["logits"][:, begin:end], found["logits"], valid
                )
                begin = end
            for name in self.cache.names(PRESENT):
                expected, given = (each[name].swapaxes(1, 2) for each in (reference, found))  # tokens before heads
                yield OutputComparison(name, (batch, total), expected, given, mask.astype(bool))

    def _fed(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        return {each.name: feed[each.name] for each in self.program.inputs if each.name in feed}


def cached_program(cache: CacheShape, takes_positions: bool) -> Program:
    """The graph of a decoder with its cache; `takes_positions`: whether its forward takes position_ids."""
    inputs = (
        Input("input_ids", "int64", ("batch", "sequence")),
        Input("attention_mask", "int64", ("batch", "total_sequence")),
        *((Input("position_ids", "int64", ("batch", "sequence")),) if takes_positions else ()),
        *cache.inputs("past_sequence"),
    )

    def call(module: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        plain = {name: tensor for name, tensor in given.items() if not name.startswith(PAST)}
        held = filled([given[name] for name in cache.names(PAST)])
        output = module(**plain, past_key_values=held, use_cache=True)
        return {"logits": output.logits, **dict(zip(cache.names(PRESENT), kept(held), strict=True))}

    return Program("", inputs, call)


def filled(tensors: list[Any]) -> Any:
    """A transformers cache with keys and values, layer by layer; no layer drops tokens, because the mask implements
    sliding windows."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in zip(tensors[::2], tensors[1::2], strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device = keys.dtype, keys.device
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache


def kept(cache: Any) -> list[Any]:
    """Keys and values of a cache, layer by layer."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
