"""Makes tests/golden/bottleneck/: a tiny BERT and GPT-2 and, of both, adapters that are no change of a weight, as the
library adapters saves them, with random tensors and what the adapted model gives. Run it in an environment of its own:
adapters 1.3.0 needs transformers 4.57.
"""

from __future__ import annotations

from pathlib import Path

import adapters
import torch
import transformers as hf
from adapters import (
    CompacterConfig,
    CompacterPlusPlusConfig,
    DoubleSeqBnConfig,
    MAMConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
)
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).resolve().parent / "bottleneck"
HIDDEN = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**HIDDEN, vocab_size=16, max_position_embeddings=16)),
    # Eager, since with torch's attention and no mask the library puts a prefix under a causal mask that begins with it:
    # the first token attends to the first key of the prefix alone, and none to itself.
    "gpt2": lambda: hf.GPT2Model(
        hf.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=16, n_positions=16, attn_implementation="eager")
    ),
}
HEADS = {
    "bert": lambda: hf.BertForSequenceClassification(MODELS["bert"]().config),
    "gpt2": lambda: hf.GPT2LMHeadModel(MODELS["gpt2"]().config),
}
CONFIGS = {
    "double_seq_bn": DoubleSeqBnConfig(reduction_factor=2),
    "double_seq_bn_linear": DoubleSeqBnConfig(reduction_factor={"0": 4, "default": 2}, non_linearity="linear"),
    "seq_bn": SeqBnConfig(reduction_factor=2),
    "par_bn": ParBnConfig(reduction_factor=2),
    "scaled_par_bn": ParBnConfig(reduction_factor=2, scaling="learned"),
    "par_bn_gelu": ParBnConfig(reduction_factor=2, scaling="learned", non_linearity="gelu", leave_out=[1]),
    "par_bn_linear": ParBnConfig(reduction_factor={"0": 4, "default": 2}, scaling="channel", non_linearity="linear"),
    "compacter": CompacterConfig(reduction_factor=2, phm_dim=4),
    "compacter++": CompacterPlusPlusConfig(reduction_factor=2, phm_dim=2, leave_out=[0]),
    "compacter_linear": CompacterConfig(reduction_factor=2, phm_dim=4, non_linearity="linear"),
    "mam": MAMConfig(PrefixTuningConfig(prefix_length=3, bottleneck_size=6), ParBnConfig(reduction_factor=2)),
    "prefix_tuning": PrefixTuningConfig(prefix_length=3, bottleneck_size=6),
    "prefix_tuning_flat": PrefixTuningConfig(flat=True, prefix_length=3),
    "prompt_tuning": PromptTuningConfig(prompt_length=3),
}
INPUT_IDS = torch.tensor([[1, 5, 2, 9, 7]])


def main() -> None:
    """Writes the files."""
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, folder / "base.st")
        for config in CONFIGS:
            if (name, config) != ("gpt2", "prompt_tuning"):  # the library has no prompts of GPT-2
                adapted(name, config)


def adapted(name: str, config: str) -> None:
    """One adapter of a model, and what the adapted model gives."""
    folder = FOLDER / name / config
    # The rule that a compacter's projections share is saved only where its key has a model's name before it.
    model = (HEADS if "compacter" in config else MODELS)[name]().eval()
    model.base_model.load_state_dict(load_file(FOLDER / name / "base.st"))
    adapters.init(model)
    model.add_adapter("style", config=CONFIGS[config], set_active=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".style." in key:
                parameter.copy_(0.5 * torch.randn_like(parameter))
    # A prefix is held by the model and by every layer, which safetensors does not save.
    model.save_adapter(
        str(folder), "style", with_head=False, use_safetensors=not {"prefix", "mam"} & set(config.split("_"))
    )
    with torch.no_grad():
        hidden = model.base_model(INPUT_IDS).last_hidden_state
        model.set_active_adapters(None)
        plain = model.base_model(INPUT_IDS).last_hidden_state
    assert hidden.shape != plain.shape or not torch.allclose(hidden, plain, atol=1e-2), config
    save_file({"input_ids": INPUT_IDS, "last_hidden_state": hidden}, folder / "outputs.st")


if __name__ == "__main__":
    main()
