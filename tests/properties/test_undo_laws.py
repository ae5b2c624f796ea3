"""unmerge --undo ∘ merge --undo is the identity on files, whatever the adapters: hypothesis makes them up."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import surgery

LORA = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 8),
        "scale": st.sampled_from([1e-6, 1e-3, 1e-2, 1.0, 30.0]),
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
        "dora": st.booleans(),
        "saved": st.booleans(),
    }
)


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], rank: int, **settings: object) -> Path:
    """An adapter as peft writes it."""
    folder.mkdir()
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@given(MODELS)
@settings(max_examples=100, deadline=None)
def test_undo_restores_the_base_bit_for_bit(model: dict[str, object]) -> None:
    """One to three adapters at once, from tiny to larger than W0, any dtypes, with tensors in full, with DoRA."""
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
        if model["dora"]:
            dora = {
                "turned.lora_A.weight": random(2, into),
                "turned.lora_B.weight": random(out, 2),
                "turned.lora_magnitude_vector": random(out),
            }
            adapters.append((write_adapter(folder / "dora", dora, 2, use_dora=True, target_modules=["turned"]), None))
        try:
            surgery.merge(folder / "base.st", adapters, folder / "m.st", undo=folder / "u.st")
        except surgery.SurgeryError as error:
            assert "changes nothing" in str(error) or "range of its stored dtype" in str(error)  # noqa: PT017
            return
        report = surgery.unmerge(folder / "m.st", adapters[::-1], folder / "b.st", undo=folder / "u.st")
        assert report.bit_exact is True
        assert (folder / "b.st").read_bytes() == (folder / "base.st").read_bytes()
