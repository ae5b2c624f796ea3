"""Tiny models of the architectures that store weights differently, with seeded weights."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

CLASSES = ("bert", "gpt2", "llama")


def build(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: object) -> torch.nn.Module:
    """A BERT classifier (biases everywhere), a GPT-2 (Conv1D, tied head) or a Llama (no biases, untied head)."""
    torch.manual_seed(seed)
    if kind == "bert":
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                max_position_embeddings=24, num_labels=3,
            )
        )  # fmt: skip
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=24)
        )
    else:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=48, max_position_embeddings=24, **settings,
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def shift(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Moves every parameter a little, as fine-tuning would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    """The model's output on fixed token ids."""
    ids = torch.randint(0, 60, (3, 11), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(input_ids=ids).logits


def load(kind: str, folder: Path) -> torch.nn.Module:
    """Loads a folder with the class of its kind."""
    auto = transformers.AutoModelForSequenceClassification if kind == "bert" else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()
