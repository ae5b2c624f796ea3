"""Makes tests/golden/bottleneck/: tiny models and, of each, adapters that are no change of a weight, as the library
adapters saves them, with random tensors and what the adapted model gives; in weights/ its VeRA and DoRA, in heads/
adapters with a head beside them, in refused/ what no fold can express. In an environment of its own, since adapters
1.3.0 needs transformers 4.57:

    python3 -m venv golden-venv
    golden-venv/bin/pip install adapters==1.3.0 torch==2.13.0
    golden-venv/bin/python tests/golden/make_bottleneck.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import adapters
import torch
import transformers as hf
from adapters import (
    AdapterPlusConfig,
    BertAdapterModel,
    CompacterConfig,
    CompacterPlusPlusConfig,
    DoRAConfig,
    DoubleSeqBnConfig,
    DvoRAConfig,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    RobertaAdapterModel,
    SeqBnConfig,
    SeqBnInvConfig,
    UniPELTConfig,
    VeraConfig,
    ViTAdapterModel,
)
from adapters.composition import Fuse, Parallel, Stack
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).resolve().parent / "bottleneck"
HIDDEN = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {**HIDDEN, "vocab_size": 16, "max_position_embeddings": 16}
# Eager, since with torch's attention and no mask the library puts a prefix under a causal mask that begins with it: the
# first token attends to the first key of the prefix alone, and none to itself.
EAGER = {"attn_implementation": "eager"}
MODELS = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**WORDS)),
    "gpt2": lambda: hf.GPT2Model(hf.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=16, n_positions=16, **EAGER)),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(dim=8, hidden_dim=12, n_heads=2, n_layers=2, vocab_size=16, max_position_embeddings=16)
    ),
    "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**WORDS, num_key_value_heads=1, **EAGER)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**WORDS)),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**HIDDEN, image_size=4, patch_size=2)),
}
HEADS = {
    "bert": hf.BertForSequenceClassification,
    "gpt2": hf.GPT2LMHeadModel,
    "llama": hf.LlamaForCausalLM,
    "roberta": hf.RobertaForSequenceClassification,
    "vit": hf.ViTForImageClassification,
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
# Of models whose layers are BERT's one for each thing that can become of an adapter.
FEW = ("double_seq_bn", "double_seq_bn_linear", "par_bn_gelu", "prefix_tuning", "prompt_tuning", "seq_bn")
CHOSEN = {"distilbert": FEW, "roberta": FEW}
PROMPTLESS = ("gpt2", "llama")  # the library has no prompts of decoders
REFUSED = {
    "adapter_plus": AdapterPlusConfig(reduction_factor=2, stochastic_depth=0.0),
    "double_seq_bn_gated": DoubleSeqBnConfig(reduction_factor=2, use_gating=True),
    "loreft": LoReftConfig(r=2),
    "prefix_tuning_gated": PrefixTuningConfig(flat=True, prefix_length=3, use_gating=True),
    "seq_bn_inv": SeqBnInvConfig(reduction_factor=2, inv_adapter_reduction_factor=2),
    "unipelt": UniPELTConfig(
        PrefixTuningConfig(flat=True, prefix_length=3, use_gating=True),
        SeqBnConfig(reduction_factor=2, use_gating=True),
    ),
}
# VeRA's and DoRA's: of layers of one shape, since VeRA's have the same matrices; the library has no DoRA of Conv1D.
MLP = {"intermediate_lora": True, "output_lora": True}
WEIGHTS = {
    "bert_vera": VeraConfig(r=2, alpha=3),
    "bert_dora": DoRAConfig(r=2, alpha=3, **MLP),
    "bert_dvora": DvoRAConfig(r=2, alpha=5),
    "gpt2_vera": VeraConfig(r=2, alpha=3, selfattn_lora=False, intermediate_lora=True),
    "llama_vera": VeraConfig(r=2, alpha=2, selfattn_lora=False, output_lora=True),
    "llama_dora": DoRAConfig(r=2, alpha=2, **MLP),
}
INPUT_IDS = torch.tensor([[1, 5, 2, 9, 7]])


def main() -> None:
    """Writes the files."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name in MODELS:
        torch.manual_seed(0)
        model = MODELS[name]()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        folder = FOLDER / name
        folder.mkdir(parents=True)
        save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, folder / "base.st")
        model.config.to_json_file(folder / "base.json")
        for config in CHOSEN.get(name, CONFIGS):
            if config != "prompt_tuning" or name not in PROMPTLESS:
                adapted(name, config)
    for case, config in WEIGHTS.items():
        save(FOLDER / "weights" / case, case.partition("_")[0], config, headless=False)
    refused()
    headed()


def adapted(name: str, config: str) -> None:
    """One adapter of a model, and what the adapted model gives."""
    # A prefix is held by the model and by every layer, which safetensors does not save.
    safe = not {"prefix", "mam"} & set(config.split("_"))
    save(FOLDER / name / config, name, CONFIGS[config], headless="compacter" not in config, safe=safe)


def save(folder: Path, name: str, config: object, *, headless: bool, safe: bool = True) -> None:
    """An adapter, and what the adapted model gives.

    Matrices that layers share (compacters', VeRA's) are saved only where their keys have a model's name before them,
    from a model with a head.
    """
    model = MODELS[name]() if headless else HEADS[name](MODELS[name]().config)
    model.base_model.load_state_dict(load_file(FOLDER / name / "base.st"), strict=headless)
    adapters.init(model.eval())
    model.add_adapter("style", config=config, set_active=True)
    random(model)
    folder.parent.mkdir(exist_ok=True)
    model.save_adapter(str(folder), "style", with_head=False, use_safetensors=safe)
    given = {"pixel_values": torch.randn(1, 3, 4, 4)} if name == "vit" else {"input_ids": INPUT_IDS}
    with torch.no_grad():
        hidden = model.base_model(**given).last_hidden_state
        model.set_active_adapters(None)
        plain = model.base_model(**given).last_hidden_state
    assert hidden.shape != plain.shape or not torch.allclose(hidden, plain, atol=1e-2), folder
    save_file({**given, "last_hidden_state": hidden}, folder / "outputs.st")


def random(model: torch.nn.Module) -> None:
    """Tensors of the adapter, none of which could be taken for what it begins with."""
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".style." in key:
                parameter.copy_(0.5 * torch.randn_like(parameter))


def bert() -> torch.nn.Module:
    """The golden BERT, ready for adapters."""
    model = MODELS["bert"]().eval()
    model.load_state_dict(load_file(FOLDER / "bert" / "base.st"))
    adapters.init(model)
    return model


def refused() -> None:
    """What depends on the input, or on other adapters, or is no bottleneck: of BERT."""
    folder = FOLDER / "refused"
    folder.mkdir()
    for config, made in REFUSED.items():
        model = bert()
        model.add_adapter("style", config=made, set_active=True)
        random(model)
        model.save_adapter(str(folder / config), "style", with_head=False)
    model = bert()
    for name in ("one", "two"):
        model.add_adapter(name, config=SeqBnConfig(reduction_factor=8, leave_out=[1]))
    model.add_adapter_fusion(["one", "two"])
    (folder / "fusion").mkdir()
    model.save_adapter_fusion(str(folder / "fusion"), Fuse("one", "two"))
    for name, setup in {"stack": Stack("one", "two"), "parallel": Parallel("one", "two")}.items():
        model.save_adapter_setup(str(folder / name), setup)


def headed() -> None:
    """Adapters that were trained with a head: of transformers' own class, and of the library's classes."""
    (FOLDER / "heads").mkdir()
    flexible = {"bert": BertAdapterModel, "roberta": RobertaAdapterModel, "vit": ViTAdapterModel}
    small = DoubleSeqBnConfig(reduction_factor=4, non_linearity="linear", leave_out=[1])
    lora = LoRAConfig(r=1, alpha=2, leave_out=[1], attn_matrices=["q"])
    for case, (name, config, build) in {
        "bert_static": ("bert", small, None),
        "bert_static_lora": ("bert", lora, None),
        "bert_classification": ("bert", small, ("add_classification_head", {"layers": 1, "use_pooler": True})),
        "bert_classification_two": ("bert", small, ("add_classification_head", {"layers": 2})),
        "bert_tagging": ("bert", lora, ("add_tagging_head", {"layers": 1})),
        "roberta_classification": ("roberta", small, ("add_classification_head", {"layers": 2})),
        "vit_image": ("vit", small, ("add_image_classification_head", {"layers": 1})),
    }.items():
        folder = FOLDER / "heads" / case
        with_head = HEADS[name].config_class(**{**MODELS[name]().config.to_dict(), "num_labels": 3})
        model = (HEADS[name] if build is None else flexible[name])(with_head).eval()
        model.base_model.load_state_dict(load_file(FOLDER / name / "base.st"), strict=False)
        if build is None:
            adapters.init(model)
        model.add_adapter("style", config=config, set_active=True)
        if build is not None:
            getattr(model, build[0])("style", num_labels=3, **build[1])
        random(model)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.startswith("classifier"):
                    parameter.copy_(0.5 * torch.randn_like(parameter))
        model.save_adapter(str(folder), "style", with_head=True, use_safetensors=case != "bert_static")
        given = {"pixel_values": torch.randn(1, 3, 4, 4)} if name == "vit" else {"input_ids": INPUT_IDS}
        with torch.no_grad():
            save_file({**given, "logits": model(**given).logits}, folder / "outputs.st")


if __name__ == "__main__":
    main()
