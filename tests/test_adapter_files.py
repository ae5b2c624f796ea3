"""The benchmarks' adapters are what they are called, at any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from formats.open_files import OpenFiles
from surgery.model.base_model import BaseModel
from surgery.operations.latency.compare_plan import plan_adapter

BENCHMARKS = ROOT / "benchmarks"
# method, form, trained parameters of two layers, 32 wide
TOLD = {
    "LoRA": ("LoRA", "merged", 2 * 2 * 2 * 8 * 32),
    "Houlsby": ("Houlsby", "half-folded", 4 * (2 * 2 * 32 + 2 + 32)),
    "Houlsby, linear": ("Houlsby", "folded", 4 * (2 * 2 * 32 + 2 + 32)),
    "Pfeiffer": ("Pfeiffer", "branch", 2 * (2 * 2 * 32 + 2 + 32)),
    "parallel": ("parallel", "branch", 2 * (2 * 16 * 32 + 16 + 32)),
    "scaled parallel, gelu": ("scaled parallel", "widened", 2 * (2 * 16 * 32 + 16 + 32)),
    "compacter": ("compacter", "half-folded", 4**3 + 4 * (2 * (32 + 4) + 4 + 32)),
    "prefix": ("prefix", "constants", 30 * 32 + 512 * 33 + 128 * 513),
    "prompt": ("prompt", "constants", 10 * 32),
    "MAM": ("prefix + scaled parallel", "branch", 30 * 32 + 800 * 33 + 128 * 801 + 2 * (2 * 16 * 32 + 16 + 32)),
}


def test_they_are_what_they_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by surgery, which refuses a tensor too many, too few, or of another shape than the config's."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.chdir(tmp_path)
    import compare
    import half_fold

    model = half_fold.write_model(Path("model"), layers=2, width=32)
    found: dict[str, Any] = {}
    with OpenFiles() as files:
        base = BaseModel.open(model, files)
        for name, path in compare.adapters(model):
            planned = plan_adapter(base, name, path)
            found[name] = (planned.method, planned.form, planned.parameters)
    assert found == TOLD
