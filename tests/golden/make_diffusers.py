"""Makes tests/golden/diffusers/: a tiny UNet and text encoder, LoRA of both as diffusers saves it, its own conversion
to kohya's names, and the weights that diffusers fuses. Run it in an environment of its own, with diffusers 0.42.1
beside torch, transformers and peft: diffusers is no dependency of the tests. With a file's name it loads that instead,
and tells whether diffusers fuses the same weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
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


if __name__ == "__main__":
    check(sys.argv[1]) if sys.argv[1:] else main()
