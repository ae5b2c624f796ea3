"""unmerge --undo ∘ merge --undo is the identity on files, whatever the adapters: hypothesis makes them up."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import surgery

LORA = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 8),
        "scale": st.sampled_from([1e-8, 1e-5, 1e-2, 1.0, 10.0, 100.0]),
        "weight": st.sampled_from([None, 1.0, -0.5, 3.0]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "bias": st.booleans(),
        "both": st.booleans(),
    }
)
MODELS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
        "shape": st.tuples(st.integers(1, 40), st.integers(1, 40)),
        "adapters": st.lists(LORA, min_size=1, max_size=3),
        "other": st.sampled_from([None, "dora", "ia3", "hra"]),
        "saved": st.booleans(),
        "jobs": st.permutations([1, 2, 4]),
    }
)


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], rank: int, **settings: object) -> Path:
    """An adapter as peft writes it; LoRA where the settings name no other."""
    folder.mkdir()
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_transform(folder: Path, method: str, out: int, into: int, random: Callable[..., torch.Tensor]) -> Path:
    """An adapter of a method that makes another weight of W0, for the layer that no other adapts."""
    config: dict[str, object] = {"target_modules": ["turned"]}
    if method == "dora":
        config["use_dora"] = True
        factors = {
            "lora_A.weight": random(2, into),
            "lora_B.weight": random(out, 2),
            "lora_magnitude_vector": random(out),
        }
    elif method == "ia3":
        config |= {"peft_type": "IA3", "feedforward_modules": []}
        factors = {"ia3_l": random(out, 1)}
    else:
        config["peft_type"] = "HRA"
        factors = {"hra_u": random(into, 2)}
    return write_adapter(folder, {f"turned.{role}": factor for role, factor in factors.items()}, 2, **config)


@given(MODELS)
@settings(max_examples=100, deadline=None)
def test_undo_restores_the_base_bit_for_bit(model: dict[str, object]) -> None:
    """One to three adapters at once, from 1e-8 of W0 to larger than it, any dtypes, any threads; with tensors in full,
    and with a method that is no delta."""
    generator = torch.Generator().manual_seed(model["seed"])

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    out, into = model["shape"]
    base = {f"{name}.weight": (0.1 * random(out, into)).to(model["dtype"]) for name in ("up", "gate", "turned")}
    base |= {"norm.weight": random(out).to(model["dtype"]), "up.bias": random(out).to(model["dtype"])}
    base["steps"] = torch.arange(3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(base, folder / "base.st", metadata={"format": "pt"})
        adapters = []
        for index, each in enumerate(model["adapters"]):
            rank, dtype = each["rank"], each["dtype"]
            tensors = {}
            for layer in ("up", "gate") if each["both"] else ("up",):
                tensors[f"{layer}.lora_A.weight"] = random(rank, into).to(dtype)
                tensors[f"{layer}.lora_B.weight"] = (0.1 * each["scale"] * random(out, rank)).to(dtype)
            extra = {"modules_to_save": ["norm"]} if model["saved"] and index == 0 else {}
            if extra:
                tensors["norm.weight"] = random(out)
            adapters.append((write_adapter(folder / str(index), tensors, rank, **extra), each["weight"]))
        if model["other"]:
            other = write_transform(folder / "other", model["other"], out, into, random)
            adapters.append((other, None))
        one, two, three = map(surgery.Resources, model["jobs"])
        try:
            surgery.merge(folder / "base.st", adapters, folder / "m.st", undo=folder / "u.st", resources=one)
        except surgery.SurgeryError as error:
            assert "changes nothing" in str(error) or "range of its stored dtype" in str(error)  # noqa: PT017
            return
        surgery.merge(folder / "base.st", adapters[::-1], folder / "n.st", undo=folder / "v.st", resources=two)
        assert (folder / "m.st").read_bytes() == (folder / "n.st").read_bytes()
        assert (folder / "u.st").read_bytes() == (folder / "v.st").read_bytes()
        again = {"undo": folder / "u.st", "resources": three}
        report = surgery.unmerge(folder / "m.st", adapters[::-1], folder / "b.st", **again)
        assert report.bit_exact is True
        assert (folder / "b.st").read_bytes() == (folder / "base.st").read_bytes()


def test_a_thousand_cycles_change_nothing(tmp_path: Path) -> None:
    """merge --undo, unmerge --undo, each time from what the last one left, with two adapters in turn: the file and
    its metadata never change by a byte, though without the undo file the first cycle would change it."""
    generator = torch.Generator().manual_seed(0)
    base, merged, undo = (tmp_path / f"{name}.st" for name in ("base", "m", "u"))
    weight = torch.randn(16, 16, generator=generator).mul(0.1).bfloat16()
    save_file({"up.weight": weight, "norm.weight": torch.ones(4)}, base, metadata={"format": "pt"})
    before = base.read_bytes()
    adapters = []
    for index in range(2):
        lora = {"lora_A": torch.randn(2, 16, generator=generator), "lora_B": torch.randn(16, 2, generator=generator)}
        tensors = {f"up.{role}.weight": factor for role, factor in lora.items()}
        adapters.append(write_adapter(tmp_path / str(index), tensors, 2))
    surgery.merge(base, adapters[0], merged)
    assert surgery.unmerge(merged, adapters[0], tmp_path / "b.st").bit_exact is False
    one = surgery.Resources(1)
    for cycle in range(1000):
        surgery.merge(base, adapters[cycle % 2], merged, undo=undo, force=True, resources=one)
        surgery.unmerge(merged, adapters[cycle % 2], base, undo=undo, force=True, resources=one)
        assert base.read_bytes() == before, cycle
