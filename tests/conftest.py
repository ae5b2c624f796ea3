"""Small real models and the runner every test shares."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

os.environ["HF_HUB_OFFLINE"] = "1"

torch.set_num_threads(1)  # the tests run small matrices; threads would only wait for each other

from surgery.cli import main  # noqa: E402


@pytest.fixture
def cli() -> Callable[..., Result]:
    """Runs the command line in this process."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def cli_json(cli: Callable[..., Result]) -> Callable[..., dict[str, Any]]:
    """Runs the command line with --json and gives back its document."""

    def run(*arguments: object) -> dict[str, Any]:
        result = cli(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return run


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


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """base.st and tuned.st of the miniature, every float tensor changed."""
    base, tuned = tmp_path / "base.st", tmp_path / "tuned.st"
    save_file(weights(), base, metadata={"format": "pt"})
    save_file(perturbed(weights()), tuned, metadata={"format": "pt"})
    return base, tuned
