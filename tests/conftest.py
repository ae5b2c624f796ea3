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
from miniature import perturbed, weights
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


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """base.st and tuned.st of the miniature, every float tensor changed."""
    base, tuned = tmp_path / "base.st", tmp_path / "tuned.st"
    save_file(weights(), base, metadata={"format": "pt"})
    save_file(perturbed(weights()), tuned, metadata={"format": "pt"})
    return base, tuned
