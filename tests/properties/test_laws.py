"""Laws that hold for any model: hypothesis makes up the models."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import surgery

pytestmark = pytest.mark.processor

ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
MODELS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "dtype": st.sampled_from(list(ULP)),
        "layers": st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.booleans()), min_size=1, max_size=4),
        "norm": st.booleans(),
        "scale": st.sampled_from([1e-4, 1e-2, 1.0]),
        "rank": st.integers(1, 50),
    }
)


KINDS = {"kinds": {"*.proj.weight": "linear"}}  # a square weight with a bias would be in doubt


def make(model: dict[str, object], folder: Path) -> tuple[Path, Path]:
    """Writes base.st and tuned.st."""
    generator = torch.Generator().manual_seed(model["seed"])
    dtype = model["dtype"]
    base: dict[str, torch.Tensor] = {}
    for index, (out, into, bias) in enumerate(model["layers"]):
        base[f"layers.{index}.proj.weight"] = torch.randn(out, into, generator=generator).to(dtype)
        if bias:
            base[f"layers.{index}.proj.bias"] = torch.randn(out, generator=generator).to(dtype)
    if model["norm"]:
        base["final_norm.weight"] = torch.ones(7, dtype=dtype)
    tuned = {
        name: (tensor.float() + model["scale"] * torch.randn(tensor.shape, generator=generator)).to(dtype)
        for name, tensor in base.items()
    }
    tuned["layers.0.proj.weight"][0, 0] += 1  # something changes, whatever rounding does
    save_file(base, folder / "base.st")
    save_file(tuned, folder / "tuned.st")
    return folder / "base.st", folder / "tuned.st"


@given(MODELS)
@settings(max_examples=40, deadline=None)
def test_extract_at_full_rank_then_merge_is_tuned(model: dict[str, object]) -> None:
    """With float32 factors: within a unit in the last place of the stored dtype, full tensors to the bit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, tuned = make(model, folder)
        surgery.extract(base, tuned, folder / "a.st", rank=64, dtype="float32", **KINDS)
        surgery.merge(base, folder / "a.st", folder / "m.st")
        merged, goal = load_file(folder / "m.st"), load_file(tuned)
        assert set(merged) == set(goal)
        for key, tensor in goal.items():
            if tensor.dim() == 2:
                # float32 factors keep about 20 bits of the largest entry of the difference
                slack = ULP[model["dtype"]] * tensor.double().abs() + 2.0**-18 * tensor.double().abs().max()
                assert ((merged[key].double() - tensor.double()).abs() <= slack).all(), key
            else:
                assert torch.equal(merged[key], tensor), key


@given(MODELS)
@settings(max_examples=25, deadline=None)
def test_serial_and_threaded_runs_write_the_same_bytes(model: dict[str, object]) -> None:
    """extract, merge and unmerge, with one thread and with three, on a large and on a tiny budget."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, tuned = make(model, folder)
        seen: list[set[bytes]] = [set(), set(), set()]
        for index, resources in enumerate([surgery.Resources(1), surgery.Resources(3), surgery.Resources(2, memory=1)]):
            adapter, merged, back = (folder / f"{part}{index}.st" for part in "amb")
            surgery.extract(base, tuned, adapter, rank=model["rank"], resources=resources, **KINDS)
            surgery.merge(base, adapter, merged, resources=resources)
            surgery.unmerge(merged, adapter, back, resources=resources)
            for files, path in zip(seen, (adapter, merged, back), strict=True):
                files.add(path.read_bytes())
        assert [len(files) for files in seen] == [1, 1, 1]


@given(MODELS)
@settings(max_examples=40, deadline=None)
def test_unmerge_after_merge_is_the_base_up_to_rounding_and_says_where(model: dict[str, object]) -> None:
    """Restored tensors to the bit; subtracted ones within the rounding of the merged value; the report is true."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, tuned = make(model, folder)
        surgery.extract(base, tuned, folder / "a.st", rank=model["rank"], **KINDS)
        surgery.merge(base, folder / "a.st", folder / "m.st")
        report = surgery.unmerge(folder / "m.st", folder / "a.st", folder / "b.st")
        before, merged, after = (load_file(path) for path in (base, folder / "m.st", folder / "b.st"))
        differing = {key for key in before if not torch.equal(before[key], after[key])}
        assert set(report.differing) == differing
        assert len(report.equal) + len(differing) == report.ledger["unmerged"]
        assert (report.bit_exact, report.changed) == (not differing, ())
        for key in differing:
            assert int((before[key] != after[key]).sum()) <= report.differing[key] <= before[key].numel()
            bound = ULP[model["dtype"]] * torch.maximum(merged[key].double().abs(), before[key].double().abs())
            assert ((after[key].double() - before[key].double()).abs() <= bound).all(), key
        assert sum(report.ledger.values()) == len(merged)
