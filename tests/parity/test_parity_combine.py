"""combine and resize against peft: add_weighted_adapter where the definitions agree, and models that peft loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from recasting import adapter, deltas, matrix
from safetensors.torch import load_file
from tiny_models import build, logits, shift
from torch import nn

import surgery


class Layers(nn.Module):
    """Two linear layers, one wide and one tall."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(9, 12)
        self.down = nn.Linear(12, 7)


def by_peft(
    folder: Path, paths: list[Path], weights: list[float], build: Callable[[], nn.Module] = Layers, **how: object
) -> dict[str, torch.Tensor]:
    """ΔW of what peft makes of these adapters, by the weight's name."""
    model = build()
    model.load_state_dict(load_file(folder / "base.st"))
    adapted = peft.PeftModel.from_pretrained(model, paths[0], adapter_name="0")
    for number, path in enumerate(paths[1:], start=1):
        adapted.load_adapter(path, adapter_name=str(number))
    names = [str(number) for number in range(len(paths))]
    adapted.base_model.add_weighted_adapter(names, weights, "all", **how)
    return {
        f"{name.removeprefix('base_model.model.')}.weight": module.get_delta_weight("all").detach().double()
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize(
    ("theirs", "ours", "weights"),
    [
        ({"combination_type": "cat"}, {"how": "cat"}, (0.7, 0.3)),
        ({"combination_type": "svd", "svd_rank": 3}, {"how": "svd", "rank": 3}, (0.7, -0.3)),
        (
            {"combination_type": "ties_svd", "svd_rank": 7, "density": 0.4},
            {"how": "ties", "rank": 7, "density": 0.4},
            (1.0, 1.0),
        ),
        (
            {"combination_type": "magnitude_prune_svd", "svd_rank": 3, "density": 0.4},
            {"how": "magnitude-prune", "rank": 3, "density": 0.4},
            (0.7, -0.3),
        ),
        (
            {"combination_type": "dare_linear_svd", "svd_rank": 3, "density": 1.0},
            {"how": "dare", "rank": 3, "density": 1.0},
            (0.7, -0.3),
        ),
    ],
    ids=lambda value: value.get("combination_type", value.get("how")) if isinstance(value, dict) else None,
)
def test_agrees_with_add_weighted_adapter(tmp_path: Path, theirs: dict, ours: dict, weights: tuple) -> None:
    """Where peft works on the deltas, and not on A and B apart: the same ΔW."""
    settings = {"build": Layers, "target_modules": ["up", "down"]}
    paths = [adapter(tmp_path, name, seed, r=3 + seed, **settings) for seed, name in enumerate("ab")]
    expected = by_peft(tmp_path, paths, list(weights), **theirs)
    surgery.combine(list(zip(paths, weights, strict=True)), tmp_path / "c", dtype="float32", **ours)
    found = deltas(tmp_path, tmp_path / "c")
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-4, atol=1e-5 * float(matrix(delta).norm()))


@pytest.mark.parametrize(
    ("kind", "layers"), [("bert", "*.layer.*.dense.weight"), ("gpt2", "*.c_*.weight"), ("llama", "*_proj.weight")]
)
def test_peft_computes_what_the_merged_model_does(tmp_path: Path, kind: str, layers: str) -> None:
    """Of an extracted adapter resized, and of two combined: peft's logits are those of our merge."""
    base, folder = build(kind), tmp_path / "base"
    base.save_pretrained(folder)
    for seed, name in enumerate("ab", start=1):
        shift(build(kind), seed).save_pretrained(tmp_path / f"tuned-{name}")
        surgery.extract(folder, tmp_path / f"tuned-{name}", tmp_path / name, rank=4, include=[layers])
    surgery.resize(tmp_path / "a", tmp_path / "r", rank=surgery.EnergyRule(0.5))
    surgery.combine([tmp_path / "a", (tmp_path / "b", 0.5)], tmp_path / "c", how="svd", rank=3)
    for made in ("r", "c"):
        surgery.merge(folder, tmp_path / made, tmp_path / f"merged-{made}")
        merged = type(base).from_pretrained(tmp_path / f"merged-{made}").eval()
        adapted = peft.PeftModel.from_pretrained(type(base).from_pretrained(folder), tmp_path / made).eval()
        torch.testing.assert_close(logits(adapted), logits(merged), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(logits(merged), logits(base), atol=1e-4)
