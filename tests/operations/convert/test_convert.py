"""What convert computes; what it writes from and to each dialect is in test_round_trips.py."""

from __future__ import annotations

import torch

from formats.dialects.writing import Piece
from formats.spec import CheckpointRef, DType, TensorRef, TensorSpec
from surgery.operations.convert.convert import Make


def test_what_is_computed_is_rounded_once() -> None:
    """To bfloat16 the nearest of the float64 product, not of the float32 between the two."""
    value = 1 + 2**-8 + 2**-30  # float32 makes a tie of it, which goes down to 1
    source = TensorRef(CheckpointRef("adapter"), TensorSpec("lora_B", DType.BF16, (1,)))
    made = Make(Piece(source.spec, (source,), factor=value))(torch.ones(1, dtype=torch.bfloat16))
    assert made.tensors[0].item() == 1 + 2**-7
