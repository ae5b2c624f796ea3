"""The benchmarks of latency against the base, on tiny models: they check their graphs and say of each a verdict."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both keep their graphs; GPT-2's are the same."""
    return tmp_path_factory.mktemp("graphs")


def _rows(program: str, work: Path) -> list[list[str]]:
    """The words of each line that a benchmark prints."""
    command = [sys.executable, BENCHMARKS / program, "--quick", "--work", work, "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_the_table_is_made_of_checked_graphs(work: Path) -> None:
    """On a tiny model: five graphs, merged the base's byte for byte and equal to the branch, each with a verdict."""
    rows = _rows("lora_table1.py", work)
    measured = [row for row in rows if row[:3] == ["1", "×", "16"]]
    assert [row[3] for row in measured] == ["base", "LoRA,", "LoRA", "AdapterL", "AdapterH"]
    assert all(row[-1] in ("equivalent", "slower", "faster", "inconclusive") for row in measured[1:])
    own = {row[0] for row in rows if row[-3:-1] == ["its", "own"]}
    assert own == {"LoRA", "AdapterL", "AdapterH"}
    assert sum(row[-3:-1] == ["the", "base's"] for row in rows) == 2


def test_every_claim_gets_its_verdict(work: Path) -> None:
    """On tiny models: three of a BERT, three of GPT-2's graphs, and for each a line that says whether it was met."""
    rows = _rows("latency.py", work)
    claims = [row for row in rows if row[:1] in (["minilm"], ["gpt2-medium"])]
    assert [" ".join(row[1:3]) for row in claims] == [
        *("LoRA, merged", "LoRA, merged", "LoRA as"),
        *("LoRA, merged", "LoRA as", "AdapterH 1%"),
    ]
    assert sum(row[:1] == ["target:"] for row in rows) == len(claims)
    assert sum("the base's" in " ".join(row) for row in rows) == 4


def test_the_adapters_have_the_papers_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """11 million parameters on GPT-2 medium, LoRA's rank-4 factors 0.4 (and as many zeros)."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import adapted_gpt2 as made

    config = made.Size().config()
    with torch.device("meta"):
        models = [made.transformers.GPT2LMHeadModel, made.GPT2WithAdapterL, made.GPT2WithAdapterH, made.GPT2WithBranch]
        base, *others = (model(config).num_parameters() for model in models)
    assert [count - base for count in others] == [11_089_152, 11_064_576, 2 * 393_216]
