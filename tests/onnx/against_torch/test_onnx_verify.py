from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from opened import opened_architecture

from formats import DType
from surgery.onnx.against_torch.model import distance, relative, tolerance
from surgery.onnx.trace.single_pass import SinglePass

pytestmark = pytest.mark.processor


def test_differences_are_relative_to_the_largest_value() -> None:
    """An output's scale is its largest value; small entries do not blow a difference up."""
    reference = np.array([[100.0, 0.001]], np.float32)
    found = distance(reference, reference + np.float32([[0, 0.5]]))
    assert found == pytest.approx((0.5, 100.0), rel=1e-4)
    assert relative(*found) == pytest.approx(0.005, rel=1e-4)
    assert distance(reference, reference)[0] == 0.0


def test_padding_is_not_compared() -> None:
    """Only valid tokens count."""
    reference = np.zeros((1, 3, 2))
    reference[0, :2] = 1
    output = reference.copy()
    output[0, 2] = 77
    assert distance(reference, output, np.array([[True, True, False]])) == (0.0, 1.0)
    assert distance(reference, output) == (77.0, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_never_agrees(bad: float) -> None:
    """NaN equals nothing, and an infinity on both sides proves nothing; nor do other shapes, or zeros."""
    array = np.array([[1.0, bad]])
    assert relative(*distance(array, array)) == math.inf
    assert relative(*distance(np.ones((1, 2)), np.ones((2, 1)))) == math.inf
    assert relative(*distance(np.zeros(2), np.ones(2))) == math.inf
    assert relative(0.0, 0.0) == 0.0


def test_tolerance_follows_dtype_and_depth() -> None:
    """Deeper graphs and coarser numbers may differ by more, and neither by much."""
    assert tolerance(DType.F32, 48) < tolerance(DType.F32, 192) == 2 * tolerance(DType.F32, 48) < 1e-4
    assert tolerance(DType.F32, 48) < tolerance(DType.F16, 48) < 0.05


def test_inputs_hold_padding_and_fit_the_model(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    """Several shapes; first rows are full, others end in padding; no sequence is longer than the model takes."""
    folder = make_model(tmp_path / "m", "bert", max_position_embeddings=20, pad_token_id=3)
    kind = opened_architecture(folder).kind
    assert isinstance(kind, SinglePass)
    feeds = kind.feeds(seed=0)
    assert len({feed["input_ids"].shape for feed in feeds}) == len(feeds) == 4
    padded = 0
    for feed in feeds:
        ids, mask = feed["input_ids"], feed["attention_mask"]
        assert ids.shape[1] <= 18
        assert (mask[0] == 1).all()
        assert (mask[:, 0] == 1).all()
        assert (np.diff(mask, axis=1) <= 0).all()
        assert (ids[mask == 0] == 3).all()
        assert ids.max() < 100
        assert feed["token_type_ids"].max() <= 1
        padded += int((mask == 0).sum())
    assert padded > 0
