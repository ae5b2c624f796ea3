from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_the_table_is_made_of_checked_graphs(tmp_path: Path) -> None:
    """On a tiny model: five graphs, merged the base's byte for byte and equal to the branch, each with a verdict."""
    command = [sys.executable, BENCHMARKS / "lora_table1.py", "--quick", "--work", tmp_path, "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    measured = [row for row in rows if row[:3] == ["1", "×", "16"]]
    assert [row[3] for row in measured] == ["base", "LoRA,", "LoRA", "AdapterL", "AdapterH"]
    assert all(row[-1] in ("equivalent", "slower", "faster", "inconclusive") for row in measured[1:])
    own = {row[0] for row in rows if row[-3:-1] == ["its", "own"]}
    assert own == {"LoRA", "AdapterL", "AdapterH"}
    assert sum(row[-3:-1] == ["the", "base's"] for row in rows) == 2


def test_the_adapters_have_the_papers_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """11 million parameters on GPT-2 medium, LoRA's rank-4 factors 0.4 (and as many zeros)."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import adapted_gpt2 as made

    config = made.Size().config()
    with torch.device("meta"):
        models = [made.transformers.GPT2LMHeadModel, made.GPT2WithAdapterL, made.GPT2WithAdapterH, made.GPT2WithBranch]
        base, *others = (model(config).num_parameters() for model in models)
    assert [count - base for count in others] == [11_089_152, 11_064_576, 2 * 393_216]
