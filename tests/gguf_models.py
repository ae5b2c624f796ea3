"""Tiny models of classes that llama.cpp knows, adapters of them that peft made, and how llama.cpp applies one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import torch
import transformers
from torch import nn

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": LAYERS},
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj"]},
    "ranks": {
        "target_modules": LAYERS,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 7, "layers.1.self_attn.k_proj": 3},
    },
    "rsLoRA": {"target_modules": LAYERS, "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "Conv1D": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
}
HEADS, KV_HEADS = 4, 2
# The names of a Llama's weights in a GGUF file, as its conversion writes them.
NAMES = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
}


def llama(**settings: Any) -> nn.Module:
    """A Llama of two layers with grouped queries, heads of six rows each, and a head of its own."""
    given: dict[str, Any] = {
        "hidden_size": 24,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": 6,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "vocab_size": 30,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**given, **settings))


def gpt2() -> nn.Module:
    """A GPT-2 of one layer."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=64)
    )


def made(folder: Path, kind: str, **settings: Any) -> nn.Module:
    """Saves base/ and an adapter peft/ of a kind, every factor random; gives the model back as peft merges it."""
    torch.manual_seed(0)
    model = gpt2() if kind == "Conv1D" else llama()
    model.save_pretrained(folder / "base")
    given = {"r": 4, "lora_alpha": 6, **KINDS.get(kind, {}), **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**given))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "peft", save_embedding_layers=False)  # by factors alone
    return adapted.merge_and_unload()


def file_name(weight: str) -> str:
    """What a Llama's weight is called in a GGUF file."""
    module = weight.removesuffix(".weight")
    if module in NAMES:
        return f"{NAMES[module]}.weight"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's conversion does to the weight of queries and keys: LlamaModel.permute."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def as_llama_cpp_stores(weight: str, value: torch.Tensor) -> np.ndarray[Any, Any]:
    """A Llama's weight as llama.cpp has it."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(weight.split(".")[-2])
    return permuted(value.numpy(), heads) if heads else value.numpy()


def applied(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What llama.cpp adds to each weight: scale = alpha / rank, lora_b's (llama_adapter_lora_weight::get_scale), and
    for token_embd the rows of lora_a by token (build_inp_embd)."""
    reader = gguf.GGUFReader(path)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    found = {}
    for name, b in tensors.items():
        if name.endswith(".lora_b"):
            weight, a = name.removesuffix(".lora_b"), tensors[f"{name[:-1]}a"].astype(np.float64)
            product = a @ b.T if weight == "token_embd.weight" else b @ a
            found[weight] = alpha / b.shape[1] * product
    return found
