"""Makes tests/golden/adapterhub/. Run it in an environment of its own, with PYTHONPATH=.: adapters 1.3.0 needs
transformers 4.57; beside it only what surgery itself needs.

bert, gpt2: tiny models, LoRA and (IA)³ of both as the library saves them, and the weights that it merges; of (IA)³ also
what the adapted model gives, since the library's merge forgets the bias. written: adapters that surgery wrote, and the
weights that the library merges after loading them, by which it has to find every tensor and no other.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import adapters
import torch
import transformers as hf
from adapters import IA3Config, LoRAConfig
from safetensors.torch import load_file, save_file

import surgery

FOLDER = Path(__file__).resolve().parent / "adapterhub"
BERT = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 16}
LONG = {**BERT, "max_position_embeddings": 8}
GPT2 = {"n_embd": 8, "n_head": 2, "vocab_size": 16, "n_positions": 8}
# The models that written adapters are for.
MODELS = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**LONG, num_hidden_layers=3)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, n_layer=2)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LONG, num_hidden_layers=2, num_key_value_heads=1)),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(dim=8, hidden_dim=12, n_heads=2, n_layers=2, vocab_size=16, max_position_embeddings=8)
    ),
    "vit": lambda: hf.ViTModel(
        hf.ViTConfig(
            hidden_size=8, intermediate_size=12, num_attention_heads=2, num_hidden_layers=1, image_size=4, patch_size=2
        )
    ),
}
BERT_RANKS = {
    "encoder.layer.0.attention.self.query": 2,
    "encoder.layer.2.attention.self.query": 3,
    "encoder.layer.2.attention.self.value": 2,
    "encoder.layer.2.output.dense": 1,
}
# What they are made of: the model, and the rank of each layer in peft's form, or (IA)³ of these layers.
LORA = {
    "bert-peft": ("bert", BERT_RANKS),
    "bert-kohya": ("bert", dict.fromkeys(BERT_RANKS, 2)),
    "gpt2-peft": ("gpt2", {"transformer.h.1.attn.c_attn": 2, "transformer.h.1.mlp.c_proj": 3}),
    "llama-peft": ("llama", {"model.layers.1.self_attn.k_proj": 2, "model.layers.1.mlp.down_proj": 2}),
    "distilbert-peft": (
        "distilbert",
        {
            "transformer.layer.1.attention.v_lin": 2,
            "transformer.layer.1.ffn.lin1": 2,
            "transformer.layer.0.ffn.lin2": 2,
        },
    ),
    "vit-peft": (
        "vit",
        {"encoder.layer.0.attention.attention.key": 2, "encoder.layer.0.intermediate.dense": 2},
    ),
}
SCALED = {
    "bert-ia3": ("bert", ["encoder.layer.0.attention.self.key", "encoder.layer.1.intermediate.dense"]),
    "gpt2-ia3": ("gpt2", ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"]),
}


def main() -> None:
    """Writes the files."""
    torch.manual_seed(0)
    models = {
        "bert": hf.BertModel(hf.BertConfig(**LONG, num_hidden_layers=1)),
        "gpt2": hf.GPT2Model(hf.GPT2Config(**GPT2, n_layer=1)),
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
        save_file(merged(model, "style"), folder / "merged.st")
    for name, config in {
        "bert": IA3Config(alpha=2, output_lora=True),
        "gpt2": IA3Config(alpha=2),  # of key and value: the library scales the query's outputs by alpha too
    }.items():
        build = {"bert": hf.BertModel, "gpt2": hf.GPT2Model}[name]
        scaled(FOLDER / name, build(models[name].config).eval(), config)
    written()


def merged(model: torch.nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """The tensors that the library's merge changes."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.merge_adapter(adapter)
    after = model.state_dict()
    return {key: after[key].contiguous() for key in before if not torch.equal(before[key], after[key])}


def scaled(folder: Path, model: torch.nn.Module, config: IA3Config) -> None:
    """(IA)³ of a model with the weights that are there already."""
    base = load_file(folder / "base.st")
    model.load_state_dict(base)
    adapters.init(model)
    model.add_adapter("style", config=config, set_active=True)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".loras." in key:
                parameter.copy_(0.5 + torch.rand_like(parameter))
            elif key.endswith(".bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    state = model.state_dict()
    save_file({key: state[key].clone() for key in base}, folder / "ia3.st")
    model.save_adapter(str(folder / "ia3"), "style", use_safetensors=True)
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        hidden = model(ids).last_hidden_state
    save_file({"input_ids": ids, "last_hidden_state": hidden}, folder / "ia3-outputs.st")
    save_file(merged(model, "style"), folder / "ia3-merged.st")


def written() -> None:
    """Adapters in other dialects, what surgery makes of them, and what the library makes of that."""
    folder = FOLDER / "written"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.chdir(folder)  # the config names the base's path
    for name, build in MODELS.items():
        torch.manual_seed(1)
        save_file(
            {key: tensor.clone() for key, tensor in build().state_dict().items() if key != "lm_head.weight"},
            f"{name}.st",
        )
    torch.manual_seed(2)
    for case, (base, ranks) in LORA.items():
        lora(Path(case) / "source", load_file(f"{base}.st"), ranks)
    for case, (base, layers) in SCALED.items():
        ia3(Path(case) / "source", load_file(f"{base}.st"), layers)
    part = surgery.Told(component="text_encoder")
    surgery.convert("bert-kohya/source", "bert-kohya/source.safetensors", "kohya", base="bert.st", told=part)
    shutil.rmtree("bert-kohya/source")
    told = {"bert-kohya": part, "gpt2-loralib": surgery.Told(alpha=5, enable_lora=(True, False, True))}
    fused(Path("gpt2-loralib"), "transformer.h.0.attn.c_attn")
    for case in sorted(path.name for path in Path().iterdir() if path.is_dir()):
        base = case.partition("-")[0]
        source = next(Path(case).glob("source*"))
        said = told.get(case, surgery.Told())
        surgery.convert(source, Path(case) / "adapter", "adapterhub", base=f"{base}.st", told=said)
        save_file(loaded(base, Path(case) / "adapter"), Path(case) / "merged.st")


def loaded(base: str, adapter: Path) -> dict[str, torch.Tensor]:
    """What the library merges of an adapter that it has loaded."""
    model = MODELS[base]()
    model.load_state_dict(load_file(f"{base}.st"), strict=False)
    adapters.init(model)
    name = model.load_adapter(str(adapter), use_safetensors=True)
    prefix = f"{model.base_model_prefix}."
    found = {key.removeprefix(prefix): tensor for key, tensor in model.state_dict().items() if f".loras.{name}." in key}
    given = {key.removeprefix(prefix): tensor for key, tensor in load_file(adapter / "adapter.safetensors").items()}
    assert found.keys() == given.keys(), found.keys() ^ given.keys()
    assert all(torch.equal(tensor, given[key]) for key, tensor in found.items())
    return merged(model, name)


def lora(folder: Path, base: Mapping[str, torch.Tensor], ranks: Mapping[str, int]) -> None:
    """LoRA in peft's form, with an alpha of its own for the last layer."""
    folder.mkdir(parents=True)
    tensors = {}
    for module, rank in ranks.items():
        weight = base[f"{module}.weight"]
        out, into = weight.shape[:: -1 if ".h." in f".{module}" else 1]
        tensors[f"base_model.model.{module}.lora_A.weight"] = 0.3 * torch.randn(rank, into)
        tensors[f"base_model.model.{module}.lora_B.weight"] = 0.3 * torch.randn(out, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": list(ranks), "fan_in_fan_out": False,
        "rank_pattern": dict(ranks), "alpha_pattern": {list(ranks)[-1]: 5},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def ia3(folder: Path, base: Mapping[str, torch.Tensor], layers: list[str]) -> None:
    """(IA)³ in peft's form."""
    folder.mkdir(parents=True)
    tensors = {f"base_model.model.{layer}.ia3_l": 0.5 + torch.rand(len(base[f"{layer}.bias"]), 1) for layer in layers}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "IA3", "target_modules": layers, "feedforward_modules": [], "fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def fused(folder: Path, layer: str) -> None:
    """loralib's, of query and value of a fused layer of width 8."""
    folder.mkdir()
    tensors = {f"{layer}.lora_A": 0.3 * torch.randn(4, 8), f"{layer}.lora_B": 0.3 * torch.randn(16, 2)}
    save_file(tensors, folder / "source.safetensors")


if __name__ == "__main__":
    main()
