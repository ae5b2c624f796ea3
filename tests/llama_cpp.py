"""llama.cpp itself, as the xllamacpp package ships it: tiny models as its own files, and what it makes of a prompt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf_models import as_llama_cpp_stores
from torch import nn

# In a process of its own: where llama.cpp is not content, it aborts.
_PROGRAM = """
import json, sys
import xllamacpp as llama

model, adapter, prompt = json.load(sys.stdin)
params = llama.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = model, 64, 1
params.n_gpu_layers, params.warmup, params.fit_params, params.verbosity = 0, False, False, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
if adapter:
    params.lora_adapters = [llama.CommonAdapterLoraInfo(adapter, 1.0)]
asked = {"prompt": prompt, "n_predict": 1, "n_probs": 30, "temperature": -1.0}
answer = llama.Server(params).handle_completions(asked)
answer = answer if isinstance(answer, dict) else json.loads(answer)
top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print("ANSWER", json.dumps({each["id"]: each["logprob"] for each in top}))
"""


def log_probabilities(model: Path, adapter: Path | None, prompt: list[int]) -> list[float]:
    """llama.cpp's for each token after the prompt."""
    asked = json.dumps([str(model), adapter and str(adapter), prompt])
    command, settings = [sys.executable, "-c", _PROGRAM], {**os.environ, "GGML_NO_BACKTRACE": "1"}
    done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=120, env=settings)
    answers = [line.removeprefix("ANSWER ") for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert answers, done.stderr[-2000:]
    found = json.loads(answers[0])
    return [found[str(token)] for token in range(len(found))]


def save_model(model: nn.Module, path: Path) -> None:
    """A tiny Llama or GPT-2 as llama.cpp's conversion stores it, with a vocabulary of no meaning."""
    config = model.config
    is_llama = config.model_type == "llama"
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if is_llama:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    else:
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    words = ["<unk>", "<s>", "</s>", *(f"word{number}" for number in range(config.vocab_size - 3))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3] + [1] * (len(words) - 3))
    writer.add_add_bos_token(False)
    kind = gguf.MODEL_ARCH.LLAMA if is_llama else gguf.MODEL_ARCH.GPT2
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = as_llama_cpp_stores(name, tensor)
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            value = value.T
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
