"""What PEFT merges and saves itself is verified as that merge, within its rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models as models
import torch
from test_parity_peft import made_by_peft

import surgery


@pytest.mark.parametrize("kind", models.CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.filterwarnings("ignore")
def test_a_file_that_peft_merged_is_within_its_rounding(
    tmp_path: Path, kind: str, dtype: torch.dtype, variant: dict[str, bool]
) -> None:
    """Saved by transformers, without a receipt; the base is not taken for it."""
    adapter = made_by_peft(tmp_path, kind, dtype=dtype, **variant)
    adapter.to(dtype)  # 16-bit factors make peft round the product, and DoRA's norms, too
    adapter.save_pretrained(tmp_path / "adapter")
    adapter.merge_and_unload().save_pretrained(tmp_path / "by-peft")
    report = surgery.verify(tmp_path / "by-peft", tmp_path / "base", tmp_path / "adapter")
    assert report.agrees, report.differing
    assert len(report.rounded) + report.ledger["exact"] == sum(report.ledger.values())
    assert not surgery.verify(tmp_path / "base", tmp_path / "base", tmp_path / "adapter").agrees
