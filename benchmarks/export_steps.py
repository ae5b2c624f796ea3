"""What benchmarks/export.py runs in processes of their own: the model, the peer's export, and the check of the answers.

python benchmarks/export_steps.py generate FOLDER LAYERS WIDTH    base/ and a LoRA for it, adapter/
python benchmarks/export_steps.py torch MODEL OUT.onnx            torch.onnx.export + save; its seconds as JSON
python benchmarks/export_steps.py check MODEL A.onnx B.onnx …     each against torch on the same tokens, as JSON
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

RANK = 8
VOCABULARY, POSITIONS = 50_257, 1024
SHAPE = (2, 24)  # batch and sequence of the check


def generate(folder: Path, layers: int, width: int) -> None:
    """A GPT-2 with random weights, and a LoRA of its attention."""
    import torch
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    heads = width // 64
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=VOCABULARY, n_positions=POSITIONS)
    GPT2LMHeadModel(config).save_pretrained(folder / "base", max_shard_size="100GB")
    tensors = {}
    for layer in range(layers):
        stem = f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_"
        tensors[f"{stem}A.weight"] = torch.randn(RANK, width) * 0.02
        tensors[f"{stem}B.weight"] = torch.randn(3 * width, RANK) * 0.02
    (folder / "adapter").mkdir()
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["c_attn"], "fan_in_fan_out": True,
    }  # fmt: skip
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(said))


def export(model: str, out: Path) -> dict[str, Any]:
    """torch's exporter as its users call it; loading the model is not in the seconds."""
    import torch
    from transformers import GPT2LMHeadModel

    module = GPT2LMHeadModel.from_pretrained(model, attn_implementation="eager").eval()
    module.config.use_cache = False
    tokens = torch.ones(2, 8, dtype=torch.int64)
    dynamic = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    names = ("input_ids", "attention_mask")
    out.parent.mkdir(parents=True, exist_ok=True)
    example = {name: tokens.clone() for name in names}  # one tensor twice would be one input
    begin = time.perf_counter()
    program = torch.onnx.export(
        module, (), kwargs=example, dynamic_shapes=dict.fromkeys(names, dynamic), dynamo=True,
        opset_version=20, verbose=False,
    )  # fmt: skip
    assert program is not None
    program.save(str(out), external_data=True)
    return {"seconds": time.perf_counter() - begin}


def check(model: str, graphs: list[str]) -> list[dict[str, Any]]:
    """The largest difference of each graph's logits from torch's, against the largest logit."""
    import numpy as np
    import onnxruntime
    import torch
    from transformers import GPT2LMHeadModel

    ids = np.random.default_rng(0).integers(0, VOCABULARY, SHAPE)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    module = GPT2LMHeadModel.from_pretrained(model).eval()
    with torch.no_grad():
        expected = module(**{name: torch.from_numpy(array) for name, array in feed.items()}).logits.numpy()
    del module
    rows = []
    for graph in graphs:
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        found = session.run(None, feed)[0]  # the logits come first
        size = sum(each.stat().st_size for each in Path(graph).parent.iterdir())
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        rows.append({"export": graph, "bytes": size, "difference from torch": error})
        del session
    return rows


def main() -> None:
    step, *words = sys.argv[1:]
    if step == "generate":
        generate(Path(words[0]), int(words[1]), int(words[2]))
    elif step == "torch":
        said = export(words[0], Path(words[1]))
        print(json.dumps(said | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
    else:
        print(json.dumps(check(words[0], words[1:])))


if __name__ == "__main__":
    main()
