"""Makes tests/golden/diffusers/: a tiny UNet and text encoder, LoRA of both as diffusers saves it, its own conversion
to kohya's names, and the weights that diffusers fuses. Run it in an environment of its own, with diffusers 0.42.1
beside torch, transformers and peft: diffusers is no dependency of the tests. With a file's name it loads that instead,
and tells whether diffusers fuses the same weights.

Also makes unet-names.json, the layers of a small SDXL UNet by the original checkpoint's names and by those that
diffusers' own conversion of checkpoints gives them, and a file with kohya's names of SDXL's layers beside what
diffusers' loader makes of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

FOLDER = Path(__file__).parent / "diffusers"


def tiny_unet() -> UNet2DConditionModel:
    """The UNet, with random weights."""
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip


def plain(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's own weights by their own names."""
    state = model.state_dict().items()
    return {key.replace(".base_layer", ""): tensor.clone() for key, tensor in state if "lora_" not in key}


def check(path: str) -> None:
    """Loads a file's LoRA with diffusers and compares what it fuses with what it fused of its own file."""
    unet = tiny_unet()
    unet.load_state_dict(load_file(FOLDER / "unet.st"))
    state, _, metadata = StableDiffusionPipeline.lora_state_dict(
        path, unet_config=unet.config, return_lora_metadata=True
    )
    StableDiffusionPipeline.load_lora_into_unet(state, _, unet, metadata=metadata)
    unet.fuse_lora()
    unet.unload_lora()
    expected, found = load_file(FOLDER / "unet-fused.st"), unet.state_dict()
    worst = max(float((found[key] - tensor).abs().max()) for key, tensor in expected.items())
    print(f"{path}: {len(expected)} weights, the largest difference {worst:.1e}")


def tiny_sdxl() -> UNet2DConditionModel:
    """A UNet of SDXL's kind: blocks without attention on one side, a second embedding, linear projections."""
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=2, norm_num_groups=2, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32,
    )  # fmt: skip


def original_layers() -> list[str]:
    """That UNet's layers in the original's names, as its blocks are built: two layers, then a step down or up."""
    residual = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
    inside = [f"attn{n}.{each}" for n in (1, 2) for each in ("to_q", "to_k", "to_v", "to_out.0")]
    inside += ["norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"]
    crossed = ["norm", "proj_in", "proj_out", *(f"transformer_blocks.0.{each}" for each in inside)]
    blocks = {"input_blocks.3.0": ["op"], "output_blocks.2.2": ["conv"]}
    for head in (*(f"input_blocks.{n}" for n in (1, 2, 4, 5)), *(f"output_blocks.{n}" for n in range(6))):
        skip = ["skip_connection"] if head.startswith("output") or head == "input_blocks.4" else []
        blocks[f"{head}.0"] = residual + skip
    for head in ("input_blocks.4", "input_blocks.5", "middle_block", *(f"output_blocks.{n}" for n in range(3))):
        blocks[f"{head}.1"] = crossed
    blocks |= {"middle_block.0": residual, "middle_block.2": residual}
    single = "input_blocks.0.0 out.0 out.2 time_embed.0 time_embed.2 label_emb.0.0 label_emb.0.2"
    return single.split() + [f"{block}.{layer}" for block, layers in blocks.items() for layer in layers]


def write_names() -> None:
    """Writes the names of layers, and kohya's file of some of them."""
    unet, layers = tiny_sdxl(), original_layers()
    head = "model.diffusion_model."
    numbered = {
        f"{head}{layer}.{each}": torch.tensor([float(number)])
        for number, layer in enumerate(layers)
        for each in ("weight", "bias")
    }
    theirs = convert_ldm_unet_checkpoint(numbered, dict(unet.config))
    names = {layers[int(tensor)]: key.rpartition(".")[0] for key, tensor in theirs.items()}
    weights = {key: tensor for key, tensor in unet.state_dict().items() if key.endswith(".weight")}
    assert {f"{name}.weight" for name in names.values()} == set(weights)
    (FOLDER / "unet-names.json").write_text(json.dumps(names, indent=0, sort_keys=True) + "\n")
    lora = {}
    for layer, name in sorted(names.items()):
        out, into, *kernel = (*weights[f"{name}.weight"].shape, 1)[: max(2, weights[f"{name}.weight"].dim())]
        if "norm" in name or not any(each in layer for each in ("to_q", "to_out", "proj_in", "layers", "emb", "op")):
            continue
        key = f"lora_unet_{layer.replace('.', '_')}"
        lora[f"{key}.lora_down.weight"] = 0.3 * torch.randn(2, into, *kernel)
        lora[f"{key}.lora_up.weight"] = 0.3 * torch.randn(out, 2, *(1 for _ in kernel))
        lora[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(lora, FOLDER / "sdxl-kohya.st")
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(dict(lora), unet_config=unet.config)
    assert set(alphas.values()) == {1.0}
    state = convert_unet_state_dict_to_peft(state)  # today's names
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, FOLDER / "sdxl-loaded.st")


def main() -> None:
    """Writes the files."""
    torch.manual_seed(0)
    unet = tiny_unet()
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=16, max_position_embeddings=4, **size))
    FOLDER.mkdir(exist_ok=True)
    models = {"unet": unet, "text_encoder": text}
    for name, model in models.items():
        save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, FOLDER / f"{name}.st")
    unet.add_adapter(
        LoraConfig(
            r=2, lora_alpha=3, target_modules=["to_q", "to_k", "to_out.0", "conv1"],
            rank_pattern={"attn2.to_q": 1}, alpha_pattern={"attn2.to_q": 4, "resnets.0.conv1": 5},
        )
    )  # fmt: skip
    text.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
    states = {}
    with torch.no_grad():
        for name, model in models.items():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
            states[name] = get_peft_model_state_dict(model)
    StableDiffusionPipeline.save_lora_weights(
        FOLDER,
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=convert_state_dict_to_diffusers(states["text_encoder"]),  # the older names
        **_collate_lora_metadata(models),
    )
    prefixed = {f"unet.{key}": tensor for key, tensor in states["unet"].items()}
    save_file({k: t.contiguous() for k, t in convert_state_dict_to_kohya(prefixed).items()}, FOLDER / "kohya.st")
    for name, model in models.items():
        before = plain(model)
        for layer in [module for module in model.modules() if hasattr(module, "merge") and hasattr(module, "lora_A")]:
            layer.merge()
        after = plain(model)
        changed = {key: t.contiguous() for key, t in after.items() if not torch.equal(t, before[key])}
        save_file(changed, FOLDER / f"{name}-fused.st")
    write_names()


if __name__ == "__main__":
    check(sys.argv[1]) if sys.argv[1:] else main()
