"""Models that are run once: encoders and decoders over tokens without a cache, images, audio features, own modules.

Their graph is the module's forward on tensors; its outputs are the tensors among the module's outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

SHAPES = ((1, 1), (1, 16), (2, 7), (3, 33))  # batch, sequence; shortened to the model's limit
_OTHER_AXES = (16, 24, 32)  # sizes for other axes of a user's own module, in turn


@dataclass(frozen=True)
class SinglePass:
    """A module's forward as one graph.

    Attributes:
        program: the graph.
        vocabulary: size of the vocabulary; token ids are below it; 2 if unknown.
        types: number of token types; token_type_ids are below it.
        padding: the padding token.
        longest: the longest sequence to try.
    """

    program: Program
    vocabulary: int = 2
    types: int = 1
    padding: int = 0
    longest: int = 512

    @property
    def programs(self) -> tuple[Program, ...]:
        """The graph."""
        return (self.program,)

    def compare(self, module: Any, runtime: Runtime, seed: int) -> Iterator[OutputComparison]:
        """As in ModelKind: runs every shape once; with a mask, all rows except the first end in padding."""
        for feed in self.feeds(seed):
            reference = as_arrays(self.program.call(module, as_tensors(feed, module)))
            found = runtime.run(self.program.prefix, feed)
            mask = feed.get("attention_mask")
            shape = next(iter(feed.values())).shape
            for name, array in reference.items():
                per_token = runtime.axes(self.program.prefix, name)[1:2] == ("sequence",)
                valid = mask.astype(bool) if mask is not None and per_token else None
                yield OutputComparison(name, shape, array, found[name], valid)

    def feeds(self, seed: int) -> list[dict[str, Array]]:
        """Random inputs in several shapes; in two for models without a sequence, because only the batch varies."""
        import numpy as np

        rng = np.random.default_rng(seed)
        axes = {axis for each in self.program.inputs for axis in each.axes}
        shapes = SHAPES if "sequence" in axes else ((1, 1), (3, 1))
        feeds = []
        for index, (batch, length) in enumerate(shapes):
            sizes = dict.fromkeys(self.program.sizes(), _OTHER_AXES[index % len(_OTHER_AXES)])
            sizes |= {"batch": batch, "sequence": min(length, self.longest)}
            feeds.append(self._feed(rng, sizes))
        return feeds

    def _feed(self, rng: Any, sizes: Mapping[str, int]) -> dict[str, Array]:
        import numpy as np

        feed: dict[str, Array] = {}
        for each in self.program.inputs:
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in each.axes]
            if each.dtype == FLOAT or each.dtype.startswith("float"):
                feed[each.name] = rng.standard_normal(shape).astype(np.float32)
            elif each.name == "attention_mask":
                feed[each.name] = right_padding(rng, *shape)
            else:
                below = {"input_ids": self.vocabulary, "token_type_ids": self.types}.get(each.name, 2)
                feed[each.name] = rng.integers(0, below, shape).astype(each.dtype)
        if {"input_ids", "attention_mask"} <= feed.keys():
            feed["input_ids"] = np.where(feed["attention_mask"] == 1, feed["input_ids"], self.padding)
        return feed


def right_padding(rng: Any, batch: int, sequence: int) -> Array:
    """A mask whose first row is full and whose other rows end in padding.  # (batch, sequence) int64"""
    import numpy as np

    mask = np.ones((batch, sequence), np.int64)
    for row in range(1, batch):
        mask[row, int(rng.integers(1, sequence + 1)) :] = 0
    return mask


def forward(module: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The module's own forward, and the tensors among its outputs."""
    return tensors_of(module(**inputs))


def token_program(names: tuple[str, ...]) -> Program:
    """A forward over tokens."""
    return Program("", tuple(Input(name, "int64", ("batch", "sequence")) for name in names), forward)


def image_program(channels: int, height: int, width: int) -> Program:
    """A forward over images of a fixed size; only their number varies."""
    return Program("", (Input("pixel_values", FLOAT, ("batch", channels, height, width)),), forward)


def audio_program(features: int, frames: int) -> Program:
    """A forward over log-mel features of a fixed length."""
    return Program("", (Input("input_features", FLOAT, ("batch", features, frames)),), forward)
