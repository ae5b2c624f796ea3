"""Against llama.cpp itself: its model with our adapter is the model that peft merged."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_models import made
from llama_cpp import log_probabilities, save_model

import surgery

PROMPT = [1, 5, 9, 17, 4, 22]


@pytest.mark.parametrize("kind", ["ranks", "rsLoRA", "embedding", "Conv1D"])
def test_llama_cpp_runs_what_we_write(tmp_path: Path, kind: str) -> None:
    """Queries and keys in pairs, grouped ones too; scalings of their own; an embedding by rows; GPT-2's Conv1D."""
    merged = made(tmp_path, kind).eval()
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    save_model(base, tmp_path / "base.gguf")
    surgery.convert(tmp_path / "peft", tmp_path / "a.gguf", "gguf", base=tmp_path / "base")
    for adapter, model in ((None, base), (tmp_path / "a.gguf", merged)):
        with torch.no_grad():
            expected = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
        found = log_probabilities(tmp_path / "base.gguf", adapter, PROMPT)
        # llama.cpp looks GELU up in a table of float16
        np.testing.assert_allclose(found, expected.numpy(), atol=5e-4 if kind == "Conv1D" else 1e-5)
    with torch.no_grad():
        others = base(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    assert (others - expected).abs().max() > 0.02


def test_llama_cpp_aborts_on_what_we_refuse(tmp_path: Path) -> None:
    """Factors of an embedding that is the head too: it multiplies the head's input with them."""
    made(tmp_path, "Conv1D")
    save_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "base.gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gpt2")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    for end, rows in (("a", 30), ("b", 16)):
        writer.add_tensor(f"token_embd.weight.lora_{end}", np.ones((rows, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AssertionError, match="GGML_ASSERT"):
        log_probabilities(tmp_path / "base.gguf", tmp_path / "a.gguf", PROMPT)
