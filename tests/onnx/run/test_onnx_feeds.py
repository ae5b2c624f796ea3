from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from surgery.errors import Unsupported
from surgery.onnx.run.feeds import graph_inputs, make_feeds, tokens_per_run, vocabulary

PATH = Path("graph.onnx")
INT64, HALF, FLOAT, BFLOAT16 = (getattr(onnx.TensorProto, name) for name in ("INT64", "FLOAT16", "FLOAT", "BFLOAT16"))
Axes = tuple[int | str | None, ...]


def _graph(inputs: dict[str, tuple[int, Axes]]) -> Any:
    """A graph of nothing but inputs."""
    declared = [onnx.helper.make_tensor_value_info(name, *described) for name, described in inputs.items()]
    return onnx.helper.make_model(onnx.helper.make_graph([], "inputs", declared, []))


def _tokens(*names: str, axes: Axes = ("batch", "sequence")) -> dict[str, tuple[int, Axes]]:
    return dict.fromkeys(names, (INT64, axes))


def test_feeds_follow_the_graph(bert: Any) -> None:
    """Tokens below the vocabulary, masks of ones, one kind of token, in the graph's own dtypes."""
    model = onnx.load(bert.onnx, load_external_data=False)
    assert vocabulary(model) == 100
    feeds = make_feeds(model, bert.onnx, (2, 7), seed=0)
    assert feeds.keys() == {entry.name for entry in graph_inputs(model)}
    assert {(array.dtype, array.shape) for array in feeds.values()} == {(np.dtype(np.int64), (2, 7))}
    assert feeds["input_ids"].max() < 100
    assert feeds["attention_mask"].all()
    assert not feeds["token_type_ids"].any()
    np.testing.assert_array_equal(feeds["input_ids"], make_feeds(model, bert.onnx, (2, 7), seed=0)["input_ids"])
    assert tokens_per_run(model, (2, 7)) == 14


def test_positions_count_up() -> None:
    """position_ids are positions."""
    model = _graph(_tokens("input_ids", "position_ids"))
    assert make_feeds(model, PATH, (2, 3), 0)["position_ids"].tolist() == [[0, 1, 2]] * 2


def test_pixels_of_half_precision() -> None:
    """Floats are standard normal, of the declared type; a batch sizes the first axis and the others are fixed."""
    model = _graph({"pixel_values": (HALF, ("batch", 3, 32, 32))})
    (pixels,) = make_feeds(model, PATH, (4, 1), 0).values()
    assert (pixels.dtype, pixels.shape) == (np.float16, (4, 3, 32, 32))
    assert abs(float(pixels.astype(np.float64).std()) - 1) < 0.05
    assert tokens_per_run(model, (4, 1)) is None


def test_embeddings_follow_the_sequence() -> None:
    """A float input with a named sequence axis gets that."""
    model = _graph({"inputs_embeds": (FLOAT, ("batch", "seq_len", 16)), **_tokens("attention_mask")})
    assert make_feeds(model, PATH, (2, 5), 0)["inputs_embeds"].shape == (2, 5, 16)


@pytest.mark.parametrize(
    ("past", "total"),
    [("past_sequence_length", "total_sequence_length"), ("past_sequence_length", "past_sequence_length + 1")],
)
def test_a_cache_takes_the_sequence(past: str, total: str) -> None:
    """With a cache of S tokens, one run computes one more: its position is S, and the mask covers all."""
    names = [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    model = _graph(
        {
            **_tokens("input_ids", "position_ids"),
            **_tokens("attention_mask", axes=("batch", total)),
            **dict.fromkeys(names, (HALF, ("batch", 4, past, 8))),
        }
    )
    feeds = make_feeds(model, PATH, (3, 10), 0)
    assert feeds["input_ids"].shape == (3, 1)
    assert feeds["position_ids"].tolist() == [[10]] * 3
    assert feeds["attention_mask"].shape == (3, 11)
    assert {(feeds[name].shape, feeds[name].dtype) for name in names} == {((3, 4, 10, 8), np.dtype(np.float16))}
    assert tokens_per_run(model, (3, 10)) == 3


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"cache_position": (INT64, ("sequence",))}, "do not say which values"),
        ({"pixel_values": (BFLOAT16, ("batch", 3, 8, 8))}, "do not say which values"),
        ({"pixel_values": (FLOAT, ("batch", 3, "height", "width"))}, "do not determine the lengths"),
        ({"pixel_values": (FLOAT, (1, 3, 8, 8))}, "does not take this shape"),
        ({"input_ids": (INT64, (2, 64))}, "does not take this shape"),
        ({"input_ids": (INT64, ("batch",))}, "does not take this shape"),
    ],
)
def test_inputs_we_cannot_feed(inputs: dict[str, tuple[int, Axes]], reason: str) -> None:
    """Unknown names, axes that nothing sizes, and fixed shapes are refused by naming them."""
    with pytest.raises(Unsupported, match=reason) as caught:
        make_feeds(_graph(inputs), PATH, (2, 7), 0)
    assert next(iter(inputs)) in caught.value.details["where"]


def test_a_vocabulary_behind_a_reshape() -> None:
    """As GPT-2 flattens its ids before it looks them up."""
    nodes = [
        onnx.helper.make_node("Reshape", ["input_ids", "flat"], ["ids"]),
        onnx.helper.make_node("Gather", ["positions", "other"], ["no"]),
        onnx.helper.make_node("Gather", ["words", "ids"], ["yes"]),
    ]
    held = [onnx.numpy_helper.from_array(np.zeros((size, 4), np.float32), name) for name, size in _TABLES.items()]
    declared = [onnx.helper.make_tensor_value_info("input_ids", INT64, ("batch", "sequence"))]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "ids", declared, [], held))
    assert vocabulary(model) == 37
    assert make_feeds(model, PATH, (4, 64), 0)["input_ids"].max() < 37


_TABLES = {"positions": 64, "words": 37}
