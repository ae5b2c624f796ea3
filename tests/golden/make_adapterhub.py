"""Makes tests/golden/adapterhub/: a tiny BERT and GPT-2, LoRA of both as AdapterHub's adapters saves it, and the
weights that it merges. Run it in an environment of its own: adapters 1.3.0 needs transformers 4.57.
"""

from __future__ import annotations

from pathlib import Path

import adapters
import torch
from adapters import LoRAConfig
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

FOLDER = Path(__file__).parent / "adapterhub"
BERT = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


def main() -> None:
    """Writes the files."""
    torch.manual_seed(0)
    models = {
        "bert": BertModel(BertConfig(**BERT, vocab_size=16, max_position_embeddings=8)),
        "gpt2": GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8)),
    }
    settings = {
        "bert": LoRAConfig(r=2, alpha=3, intermediate_lora=True, output_lora=True),
        "gpt2": LoRAConfig(r=2, alpha=3, intermediate_lora=True, attn_matrices=["q", "v"]),
    }
    for name, model in models.items():
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, folder / "base.st")
        adapters.init(model)
        model.add_adapter("style", config=settings[name])
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".loras." in key:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
        model.save_adapter(str(folder / "adapter"), "style", use_safetensors=True)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        model.merge_adapter("style")
        after = model.state_dict()
        changed = {key: after[key].contiguous() for key in before if not torch.equal(before[key], after[key])}
        save_file(changed, folder / "merged.st")


if __name__ == "__main__":
    main()
