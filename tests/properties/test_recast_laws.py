"""Laws of resize and combine: hypothesis makes up the adapters."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import surgery

DTYPES = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
LAYER = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 12))
ADAPTERS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "dtype": st.sampled_from(list(DTYPES)),
        "layers": st.lists(LAYER, min_size=1, max_size=3),
        "alpha": st.sampled_from([1, 3, 8, 16.5]),
        "rslora": st.booleans(),
    }
)


def write(path: Path, factors: list[tuple[torch.Tensor, torch.Tensor]], alpha: float, rslora: bool) -> Path:
    """A peft adapter of linear layers with these B and A; alpha is the same for all."""
    tensors, ranks = {}, {}
    for number, (b, a) in enumerate(factors):
        key = f"base_model.model.layers.{number}.proj"
        tensors |= {f"{key}.lora_A.weight": a.contiguous(), f"{key}.lora_B.weight": b.contiguous()}
        ranks[f"layers\\.{number}\\.proj"] = a.shape[0]
    config = {
        "peft_type": "LORA", "r": 1, "rank_pattern": ranks, "lora_alpha": alpha, "use_rslora": rslora,
        "target_modules": ["proj"],
    }  # fmt: skip
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def made(adapter: dict[str, object]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """B and A of every layer."""
    generator = torch.Generator().manual_seed(adapter["seed"])
    return [
        tuple(torch.randn(*shape, generator=generator).to(adapter["dtype"]) for shape in ((out, rank), (rank, into)))
        for out, into, rank in adapter["layers"]
    ]


def deltas(path: Path) -> list[torch.Tensor]:
    """ΔW of every layer, float64."""
    tensors, config = (
        load_file(path / "adapter_model.safetensors"),
        json.loads((path / "adapter_config.json").read_text()),
    )
    found = []
    for number in range(len(tensors) // 2):
        key = f"base_model.model.layers.{number}.proj"
        a, b = (tensors[f"{key}.lora_{role}.weight"].double() for role in "AB")
        pattern = {name.replace("\\", ""): value for name, value in (config.get("alpha_pattern") or {}).items()}
        alpha = pattern.get(f"layers.{number}.proj", config["lora_alpha"])
        found.append(b @ a * (alpha / (len(a) ** 0.5 if config["use_rslora"] else len(a))))
    return found


@given(ADAPTERS)
@settings(max_examples=40, deadline=None)
def test_the_full_rank_loses_nothing_but_the_dtypes_rounding(adapter: dict[str, object]) -> None:
    """Whatever scaling there was, and also where the rank exceeds a side of the weight."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = write(folder / "a", made(adapter), adapter["alpha"], adapter["rslora"])
        report = surgery.resize(before, folder / "b", rank=64)
        assert report.residual <= 4 * DTYPES[adapter["dtype"]]
        for old, new in zip(deltas(before), deltas(folder / "b"), strict=True):
            assert (new - old).norm() <= 12 * DTYPES[adapter["dtype"]] * old.norm()


@given(ADAPTERS, st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_resizing_twice_is_resizing_once(adapter: dict[str, object], rank: int) -> None:
    """The second time there is nothing left to drop: the same tensors, to the bit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = write(folder / "a", made(adapter), adapter["alpha"], adapter["rslora"])
        surgery.resize(before, folder / "b", rank=rank)
        surgery.resize(folder / "b", folder / "c", rank=rank)
        once, twice = (load_file(folder / each / "adapter_model.safetensors") for each in "bc")
        assert once.keys() == twice.keys()
        assert all(torch.equal(once[key], twice[key]) for key in once)


@given(ADAPTERS, st.floats(0.1, 0.9))
@settings(max_examples=40, deadline=None)
def test_an_adapter_split_in_two_combines_to_itself(adapter: dict[str, object], share: float) -> None:
    """By its columns, the parts of other ranks than each other: cat gives it back, and svd at its rank too."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        factors = [(b.repeat(1, 2), a.repeat(2, 1)) for b, a in made(adapter)]  # a rank of at least 2
        cuts = [max(1, min(len(a) - 1, round(share * len(a)))) for _, a in factors]
        first = [(b[:, :cut], a[:cut]) for (b, a), cut in zip(factors, cuts, strict=True)]
        second = [(b[:, cut:], -a[cut:]) for (b, a), cut in zip(factors, cuts, strict=True)]
        one, other = (
            write(folder / name, part, adapter["alpha"], False) for name, part in (("a", first), ("b", second))
        )
        expected = [left - right for left, right in zip(deltas(one), deltas(other), strict=True)]
        surgery.combine([one, (other, -1.0)], folder / "c", how="cat", dtype="float32")
        surgery.combine([one, (other, -1.0)], folder / "d", how="svd", rank=64, dtype="float32")
        for made_of in ("c", "d"):
            for found, delta, (b, a) in zip(deltas(folder / made_of), expected, factors, strict=True):
                size = b.double().norm() * a.double().norm() * adapter["alpha"]
                assert (found - delta).norm() <= 1e-6 * size
