"""Encoder–decoders: one graph for the encoder, run once, and one for the decoder, run for every token.

Files have optimum's names, `encoder_model.onnx` and `decoder_model.onnx`, and share one set of weights. With a cache,
the encoder's graph also computes the keys and values that the decoder's layers make of the encoded sequence
(`present.N.encoder.key` …): they never change, so the decoder takes them instead of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.onnx.trace.cached_decoder import PAST, PRESENT, CacheShape, filled, kept
from surgery.onnx.trace.program import (
    FLOAT,
    Input,
    OutputComparison,
    Program,
    Runtime,
    as_arrays,
    as_tensors,
    tensors_of,
)
from surgery.onnx.trace.single_pass import right_padding

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

ENCODER, DECODER = "encoder_", "decoder_"
TRIALS = ((1, 5, 1), (2, 12, 4))  # batch, encoded tokens, first decoder tokens
STEPS = (1, 1, 2)
_OF_ENCODER, _OF_DECODER = ".encoder", ".decoder"


@dataclass(frozen=True)
class EncoderDecoder:
    """Two graphs of one model.

    Attributes:
        source: the encoder's inputs, without its mask.
        masked: whether the encoder takes a mask.
        length: length of the encoded sequence, if it is fixed.
        width: width of the encoded sequence.
        vocabulary: size of the vocabulary; token ids are below it.
        longest: the longest sequence to try.
        cache: the shape of the decoder's cache; None without a cache.
    """

    source: Input
    masked: bool
    length: str | int
    width: int
    vocabulary: int
    longest: int
    cache: CacheShape | None

    @property
    def programs(self) -> tuple[Program, ...]:
        """Encoder and decoder."""
        return (self._encoder(), self._decoder())

    def _encoder(self) -> Program:
        mask = (Input("attention_mask", "int64", ("batch", self.length)),) if self.masked else ()
        return Program(ENCODER, (self.source, *mask), self._encode)

    def _decoder(self) -> Program:
        mask = (Input("encoder_attention_mask", "int64", ("batch", self.length)),) if self.masked else ()
        tokens = Input("input_ids", "int64", ("batch", "sequence"))
        if self.cache is None:
            hidden = Input("encoder_hidden_states", FLOAT, ("batch", self.length, self.width))
            return Program(DECODER, (tokens, *mask, hidden), self._decode)
        past = (*self.cache.inputs("past_sequence", _OF_DECODER), *self.cache.inputs(self.length, _OF_ENCODER))
        return Program(DECODER, (tokens, *mask, *past), self._decode_cached)

    def _encode(self, module: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        import torch
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        hidden = module.get_encoder()(**given).last_hidden_state  # (batch, length, width)
        outputs = {"last_hidden_state": hidden}
        if self.cache is not None:  # one token runs through the decoder; only the resulting cache is used
            caches = EncoderDecoderCache(DynamicCache(), DynamicCache())
            token = torch.zeros((hidden.shape[0], 1), dtype=torch.int64)
            self._run(module, token, hidden, given.get("attention_mask"), caches)
            crossed = kept(caches.cross_attention_cache)
            outputs |= dict(zip(self.cache.names(PRESENT, _OF_ENCODER), crossed, strict=True))
        return outputs

    def _decode(self, module: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        mask = given.get("encoder_attention_mask")
        output = self._run(module, given["input_ids"], given["encoder_hidden_states"], mask, None)
        return _of_decoder(output)

    def _decode_cached(self, module: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        import torch
        from transformers.cache_utils import EncoderDecoderCache

        assert self.cache is not None
        own, crossed = (
            filled([given[name] for name in self.cache.names(PAST, part)]) for part in (_OF_DECODER, _OF_ENCODER)
        )
        caches = EncoderDecoderCache(own, crossed)
        caches.is_updated = dict.fromkeys(range(self.cache.layers), True)
        keys = crossed.layers[0].keys  # (batch, heads, length, width of a head)
        hidden = torch.zeros(
            (keys.shape[0], keys.shape[2], self.width), dtype=keys.dtype
        )  # only its shape is looked at
        output = self._run(module, given["input_ids"], hidden, given.get("encoder_attention_mask"), caches)
        return _of_decoder(output) | dict(zip(self.cache.names(PRESENT, _OF_DECODER), kept(own), strict=True))

    def _run(self, module: Any, tokens: Any, hidden: Any, mask: Any, caches: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        masks = {"attention_mask": mask} if mask is not None else {}
        return module(
            **masks,
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            decoder_input_ids=tokens,
            past_key_values=caches,
            use_cache=caches is not None,
        )

    def compare(self, module: Any, runtime: Runtime, seed: int) -> Iterator[OutputComparison]:
        """As in ModelKind: compares the encoder, and the decoder on the output of the encoder's graph (step by step if
        there is a cache), with the whole module in one pass."""
        import numpy as np

        rng = np.random.default_rng(seed)
        for batch, encoded, prompt in TRIALS:
            feed = self._source(rng, batch, min(encoded, self.longest))
            mask = feed.get("attention_mask")
            total = min(prompt + sum(STEPS), self.longest)
            tokens = rng.integers(0, self.vocabulary, (batch, total))
            given = as_tensors(feed, module)
            whole = module(**given, decoder_input_ids=as_tensors({"": tokens}, module)[""], use_cache=False)
            expected = as_arrays(_of_decoder(whole))
            encoder = as_arrays(self._encode(module, given))
            found = runtime.run(ENCODER, feed)
            valid = mask.astype(bool) if mask is not None else None
            for name, array in encoder.items():
                swap = name != "last_hidden_state"  # in keys and values, the heads axis precedes the tokens axis
                one, other = (each.swapaxes(1, 2) if swap else each for each in (array, found[name]))
                yield OutputComparison(name, next(iter(feed.values())).shape, one, other, valid)
            yield from self._decoded(runtime, tokens, prompt, mask, found, expected)

    def _decoded(
        self, runtime: Runtime, tokens: Array, prompt: int, mask: Array | None, encoded: Mapping[str, Array],
        expected: Mapping[str, Array],
    ) -> Iterator[OutputComparison]:  # fmt: skip
        batch, total = tokens.shape
        fixed = {"encoder_attention_mask": mask} if mask is not None else {}
        if self.cache is None:
            fixed["encoder_hidden_states"] = encoded["last_hidden_state"]
            found = runtime.run(DECODER, {"input_ids": tokens, **fixed})
            for name, array in expected.items():
                yield OutputComparison(name, tokens.shape, array, found[name])
            return
        crossed = (encoded[name] for name in self.cache.names(PRESENT, _OF_ENCODER))
        fixed |= dict(zip(self.cache.names(PAST, _OF_ENCODER), crossed, strict=True))
        past, begin = self.cache.empty(batch, _OF_DECODER), 0
        for length in (prompt, *STEPS):
            end = min(begin + length, total)
            if begin == end:
                break
            found = runtime.run(DECODER, {"input_ids": tokens[:, begin:end], **fixed, **past})
            past = dict(zip(past, (found[name] for name in self.cache.names(PRESENT, _OF_DECODER)), strict=True))
            for name, array in expected.items():
                yield OutputComparison(name, (batch, end), array[:, begin:end], found[name])
            begin = end

    def _source(self, rng: Any, batch: int, length: int) -> dict[str, Array]:
        import numpy as np

        sizes = {"batch": batch, "encoder_sequence": length}
        shape = [axis if isinstance(axis, int) else sizes[axis] for axis in self.source.axes]
        if self.source.dtype == FLOAT:
            feed = {self.source.name: rng.standard_normal(shape).astype(np.float32)}
        else:
            feed = {self.source.name: rng.integers(0, self.vocabulary, shape)}
        return feed | ({"attention_mask": right_padding(rng, batch, length)} if self.masked else {})


def _of_decoder(output: Any) -> dict[str, Any]:
    return {name: each for name, each in tensors_of(output).items() if not name.startswith("encoder_")}
