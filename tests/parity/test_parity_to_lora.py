"""convert --to lora: every method of peft as a plain LoRA, which peft loads, against the exact SVD of its ΔW."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from recasting import deltas, matrix
from safetensors.torch import load_file
from test_parity_methods import CASES, made_by_peft

import surgery
from formats.errors import AdapterFormatError, ReportedError
from surgery.errors import NothingToDo

pytestmark = pytest.mark.filterwarnings("ignore")
# They change biases, or replace tensors.
NO_FACTORS: dict[str, tuple[type[ReportedError], str]] = {
    "beft": (AdapterFormatError, "changes no weight"),
    "glora by bias": (NothingToDo, "changes no weight"),
    "ln_tuning": (AdapterFormatError, "changes no weight"),
    "trainable_tokens": (AdapterFormatError, "changes no weight"),
}
METHODS = [name for name in CASES if name not in NO_FACTORS]
# Those whose ΔW has a rank of its own below 8, or is a product of Kronecker's: no more is made up.
THIN = {"adalora": 4, "delora": 3, "lokr": 8, "vera": 4, "vblora": 2, "unilora": 2}


@pytest.mark.parametrize("name", METHODS)
def test_at_full_rank_it_merges_to_the_same_weights(tmp_path: Path, name: str) -> None:
    """Within 1e-6 of the largest weight, biases included; peft's outputs with it are the merged model's."""
    made_by_peft(tmp_path, CASES[name])
    base, adapter = tmp_path / "base.st", tmp_path / "adapter"
    report = surgery.to_lora(adapter, tmp_path / "lora", rank=64, base=base)
    assert {module.name.partition(".")[0] for module in report.modules} == set(CASES[name].targets)
    assert all(module.exact and module.residual < 1e-6 for module in report.modules)
    surgery.merge(base, adapter, tmp_path / "merged.st")
    surgery.merge(base, tmp_path / "lora", tmp_path / "lowered.st")
    expected, found = load_file(tmp_path / "merged.st"), load_file(tmp_path / "lowered.st")
    for key, tensor in expected.items():
        assert (found[key] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), key
    model, merged = CASES[name].build().eval(), CASES[name].build().eval()
    model.load_state_dict(load_file(base))
    merged.load_state_dict(expected)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    torch.manual_seed(5)
    x = torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(adapted(x), merged(x), atol=1e-4, rtol=1e-4)
    if name in THIN:
        assert max(module.rank for module in report.modules) == THIN[name]


@pytest.mark.parametrize("name", METHODS)
def test_at_a_low_rank_it_is_the_optimum(tmp_path: Path, name: str) -> None:
    """The residual exceeds that of the exact SVD by less than a thousandth, and is the one that is reported."""
    made_by_peft(tmp_path, CASES[name])
    report = surgery.to_lora(tmp_path / "adapter", tmp_path / "lora", rank=2, base=tmp_path / "base.st")
    before, after = deltas(tmp_path, tmp_path / "adapter"), deltas(tmp_path, tmp_path / "lora")
    total = left = 0.0
    for module in report.modules:
        dense = matrix(before[module.name])
        values = torch.linalg.svdvals(dense)
        optimum, norm = float(values[2:].norm()), float(values.norm())
        loss = float((dense - matrix(after[module.name])).norm())
        assert loss <= 1.001 * optimum + 1e-6 * norm
        assert module.residual == pytest.approx(loss / norm, rel=1e-4, abs=1e-6)
        assert module.delta_norm == pytest.approx(norm, rel=1e-6)
        total, left = total + norm**2, left + loss**2
    assert report.residual == pytest.approx((left / total) ** 0.5, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", NO_FACTORS)
def test_what_changes_no_weight_is_refused(tmp_path: Path, name: str) -> None:
    """There is nothing to factor."""
    made_by_peft(tmp_path, CASES[name])
    error, reason = NO_FACTORS[name]
    with pytest.raises(error, match=reason):
        surgery.to_lora(tmp_path / "adapter", tmp_path / "lora", rank=2, base=tmp_path / "base.st")
    assert not (tmp_path / "lora").exists()
