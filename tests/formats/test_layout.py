"""Our bytes are the reference writer's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from formats import DType, TensorSpec
from formats.errors import CorruptFile
from formats.layout import layout
from formats.tensors import bytes_from_tensor, spec_of, torch_dtype

SPECS = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
            lambda n: n != "__metadata__"
        ),
        st.sampled_from(list(DType)),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda entry: entry[0],
)


def assembled(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A file put together from the layout alone."""
    plan = layout([spec_of(name, tensor) for name, tensor in tensors.items()], metadata)
    file = bytearray(plan.size)
    file[: len(plan.header)] = plan.header
    for name, tensor in tensors.items():
        payload = bytes_from_tensor(tensor).tobytes()
        file[plan.offsets[name] : plan.offsets[name] + len(payload)] = payload
    return bytes(file)


@given(SPECS, st.dictionaries(st.sampled_from(["format"]), st.text(max_size=5)))
def test_bytes_equal_the_reference_writer(
    entries: list[tuple[str, DType, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    """Any names, dtypes and shapes: the same file as safetensors writes, for up to one metadata key."""
    tensors = {name: torch.zeros(shape, dtype=torch_dtype(dtype)) for name, dtype, shape in entries}
    assert assembled(tensors, metadata) == save(tensors, metadata or None)


def test_metadata_is_written_in_sorted_order() -> None:
    """The reference writer's order changes from run to run; ours does not."""
    metadata = {"z": "1", "a": "2", "format": "pt"}
    header = layout([], metadata).header
    assert header == layout([], dict(reversed(metadata.items()))).header
    assert load(header) == {}


def test_two_tensors_of_one_name_are_refused() -> None:
    """A header cannot hold a name twice."""
    spec = TensorSpec("a", DType.F32, (1,))
    with pytest.raises(CorruptFile, match="same name"):
        layout([spec, spec], {})


def test_golden_bytes(tmp_path: Path) -> None:
    """The format itself, byte for byte."""
    file = assembled({"b": torch.tensor([1.0]), "a": torch.tensor([2], dtype=torch.int64)}, {"format": "pt"})
    header = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},'
        b'"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}'
    )
    header += b" " * (-len(header) % 8)
    payload = (2).to_bytes(8, "little") + b"\x00\x00\x80\x3f"
    assert file == len(header).to_bytes(8, "little") + header + payload
