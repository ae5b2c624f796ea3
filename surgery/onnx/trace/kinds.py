"""From a transformers class and its configuration to the way the model is used: its graphs and their inputs.

The arguments of the class's forward and the config's values decide; there is no list of architectures.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from formats.model_config import parsed_config
from surgery.errors import Unsupported
from surgery.model.base_model import BaseModel
from surgery.onnx.trace.cached_decoder import CachedDecoder, CacheShape, cached_program
from surgery.onnx.trace.encoder_decoder import EncoderDecoder
from surgery.onnx.trace.program import FLOAT, Input
from surgery.onnx.trace.single_pass import SinglePass, audio_program, image_program, token_program

OPTIONAL_INPUTS = ("attention_mask", "token_type_ids")  # follow input_ids, if the model uses them
EXPORTED = (
    "a class of transformers that takes tokens, images of one size or log-mel features, encoder–decoders included"
)
_NO_CACHE = "omit --with-cache"
_IMAGE_SIDE = 224  # if neither config.json nor preprocessor_config.json gives a size
_FACTORY = "build the module yourself: --factory package.module:function, with --inputs and its weight file"


def kind_of(
    model_class: Any, config: Any, model: BaseModel, cached: bool
) -> SinglePass | CachedDecoder | EncoderDecoder:
    """How a model is used.

    Args:
        model_class: a transformers class.
        config: its configuration.
        model: a folder with config.json, and perhaps preprocessor_config.json, which gives the size of images.
        cached: whether keys and values of past tokens are inputs and outputs.

    Raises:
        Unsupported: a quantised checkpoint, inputs that are neither tokens nor images nor log-mel features, or a cache
            for a model that has none.
    """
    takes = inspect.signature(model_class.forward).parameters
    fed = model_class.main_input_name
    if getattr(config, "quantization_config", None):
        raise _refused(model_class, model, "the checkpoint is quantised")
    if "decoder_input_ids" in takes:
        return _encoder_decoder(model_class, config, model, fed, cached)
    if fed == "input_ids" and "input_ids" in takes:
        if cached:
            return _cached_decoder(model_class, config, model, takes)
        return _single_pass(takes, config)
    if cached:
        raise _refused(model_class, model, f"it takes {fed} and keeps no keys and values", _NO_CACHE)
    if fed == "pixel_values":
        return SinglePass(image_program(getattr(config, "num_channels", 3), *_image_size(config, model)))
    if fed == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return SinglePass(audio_program(config.num_mel_bins, 2 * config.max_source_positions))
    raise _refused(model_class, model, f"the model takes {fed}, whose shape config.json does not give")


def longest(config: Any) -> int:
    """The longest sequence the model can take, in tokens; 512 where the config sets no limit."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None)
    return int(limit) if limit else 512


def _single_pass(takes: Mapping[str, Any], config: Any) -> SinglePass:
    text = config.get_text_config()
    types = getattr(config, "type_vocab_size", 0)
    listens = {"attention_mask": True, "token_type_ids": types > 1}
    names = ("input_ids", *(name for name in OPTIONAL_INPUTS if name in takes and listens[name]))
    return SinglePass(
        token_program(names),
        vocabulary=text.vocab_size,
        types=max(1, types),
        padding=getattr(text, "pad_token_id", None) or 0,
        longest=max(1, longest(config) - 2),  # RoBERTa's positions begin at 2
    )


def _cached_decoder(model_class: Any, config: Any, model: BaseModel, takes: Mapping[str, Any]) -> CachedDecoder:
    text = config.get_text_config(decoder=True)
    if "past_key_values" not in takes or not model_class.can_generate():
        reason = "it does not generate token by token, so it keeps no keys and values"
        raise _refused(model_class, model, reason, _NO_CACHE)
    cache = _cache_shape(text, text.num_hidden_layers, text.num_attention_heads)
    program = cached_program(cache, "position_ids" in takes)
    return CachedDecoder(program, cache, text.vocab_size, longest(config))


def _encoder_decoder(model_class: Any, config: Any, model: BaseModel, fed: str, cached: bool) -> EncoderDecoder:
    length: str | int = "encoder_sequence"
    if fed == "input_ids":
        source = Input("input_ids", "int64", ("batch", length))
    elif fed == "input_features" and hasattr(config, "num_mel_bins"):
        length = config.max_source_positions
        source = Input("input_features", FLOAT, ("batch", config.num_mel_bins, 2 * config.max_source_positions))
    else:
        raise _refused(model_class, model, f"its encoder takes {fed}")
    if cached and not model_class.can_generate():
        raise _refused(model_class, model, "it generates nothing, so it keeps no keys and values", _NO_CACHE)
    layers = _number(config, "num_decoder_layers", "decoder_layers", "num_hidden_layers")
    heads = _number(config, "decoder_attention_heads", "num_attention_heads")
    return EncoderDecoder(
        source=source,
        masked=fed == "input_ids",
        length=length,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        longest=longest(config),
        cache=_cache_shape(config, layers, heads) if cached else None,
    )


def _cache_shape(text: Any, layers: int, heads: int) -> CacheShape:
    width = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or text.hidden_size // heads
    shared = 1 if getattr(text, "multi_query", False) else getattr(text, "num_key_value_heads", None)
    return CacheShape(layers, shared or heads, width)


def _number(config: Any, *names: str) -> int:
    return next(int(value) for name in names if (value := getattr(config, name, None)) is not None)


def _image_size(config: Any, model: BaseModel) -> tuple[int, int]:
    """Height and width: from config.json, from the preprocessor's crop size, or 224."""
    path = model.folder / "preprocessor_config.json"
    prepared = parsed_config(model.files.content(path), path, "preprocessor's config") if path.is_file() else {}
    for size in (getattr(config, "image_size", None), prepared.get("crop_size"), prepared.get("size")):
        if isinstance(size, int):
            return size, size
        if isinstance(size, list | tuple) and len(size) == 2:
            return int(size[0]), int(size[1])
        if isinstance(size, dict) and {"height", "width"} <= size.keys():
            return int(size["height"]), int(size["width"])
        if isinstance(size, dict) and "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    return _IMAGE_SIDE, _IMAGE_SIDE


def _refused(model_class: Any, model: BaseModel, reason: str, then: str = _FACTORY) -> Unsupported:
    return Unsupported(
        f"cannot export {model_class.__name__}: {reason}",
        where=model.config_file,
        expected=f"{EXPORTED}, in floating point",
        then=then,
    )
