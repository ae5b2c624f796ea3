"""A model in miniature, as bare tensors."""

from __future__ import annotations

import torch


def perturbed(tensors: dict[str, torch.Tensor], scale: float = 0.02, seed: int = 1) -> dict[str, torch.Tensor]:
    """A tuned twin: every floating-point tensor moved a little."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.float() + scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A model in miniature: two linear layers with biases, an embedding, a norm, a buffer."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul(0.1).to(dtype)

    return {
        "embed.token_embeddings.weight": random(50, 16),
        "layers.0.up.weight": random(48, 16),
        "layers.0.up.bias": random(48),
        "layers.0.down.weight": random(16, 48),
        "layers.0.down.bias": random(16),
        "layers.0.norm.weight": random(16),
        "layers.0.norm.bias": random(16),
        "layers.0.steps": torch.arange(5),
    }
