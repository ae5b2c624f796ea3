"""How much of a delta is stored: in the report, in words, and as a condition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from lora_by_hand import lora, up
from miniature import weights
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import VerificationFailed
from surgery.exact.survival import Watch

NAME = "layers.0.up.weight"


def scaled_up(scale: float) -> dict[str, torch.Tensor]:
    """The factors of `up`, one of them scaled."""
    return {name: tensor * (scale if "lora_B" in name else 1) for name, tensor in up().items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-5, 1e-3, 0.1])
def test_it_is_the_share_and_the_direction(tmp_path: Path, dtype: torch.dtype, scale: float) -> None:
    """Against float64 norms of what the file holds."""
    base = weights(dtype=dtype)
    save_file(base, tmp_path / "base.st")
    factors = scaled_up(scale)
    adapter = lora(tmp_path / "a", factors)
    report = surgery.merge(tmp_path / "base.st", adapter, tmp_path / "m.st")
    a, b = (factors[f"layers.0.up.lora_{role}.weight"].double() for role in "AB")
    delta = (2 * b @ a).flatten()
    stored = (load_file(tmp_path / "m.st")[NAME].double() - base[NAME].double()).flatten()
    assert set(report.surviving) == {NAME}
    found = report.surviving[NAME]
    assert found.survived == pytest.approx(float(stored.norm() / delta.norm()), rel=1e-4)
    assert found.cosine == pytest.approx(float(stored @ delta / (stored.norm() * delta.norm())), rel=1e-4)


def test_a_transforming_method_is_measured_too(tmp_path: Path) -> None:
    """DoRA: ΔW is what it makes of W0 before rounding, less W0; and its bytes are those it had without measuring."""
    base = weights(dtype=torch.bfloat16)
    save_file(base, tmp_path / "base.st")
    factors = scaled_up(1e-3)
    w0 = base[NAME].double()
    a, b = (factors[f"layers.0.up.lora_{role}.weight"].double() for role in "AB")
    magnitude = w0.norm(dim=1).float()
    adapter = lora(tmp_path / "a", factors | {"layers.0.up.lora_magnitude_vector.weight": magnitude}, use_dora=True)
    report = surgery.merge(tmp_path / "base.st", adapter, tmp_path / "m.st")
    turned = w0 + 2 * b @ a
    delta = magnitude.double()[:, None] * turned / turned.norm(dim=1, keepdim=True) - w0
    stored = load_file(tmp_path / "m.st")[NAME].double() - w0
    assert report.surviving[NAME].survived == pytest.approx(float(stored.norm() / delta.norm()), rel=1e-4)


def test_threads_do_not_show(tmp_path: Path) -> None:
    """Equal to the last bit, for any threads and memory, and whatever torch does inside an operation."""
    save_file(weights(dtype=torch.bfloat16), tmp_path / "base.st")
    adapter = lora(tmp_path / "a", scaled_up(1e-3))
    found = []
    for index, (jobs, memory) in enumerate([(1, 1 << 30), (4, 1), (2, 1 << 30)]):
        out = tmp_path / f"{index}.st"
        report = surgery.merge(tmp_path / "base.st", adapter, out, resources=surgery.Resources(jobs, memory))
        found.append(report.surviving)
    assert found[0] == found[1] == found[2]


def test_the_least_is_named_and_warned_of(
    tmp_path: Path, cli: Callable[..., Result], cli_json: Callable[..., dict[str, Any]]
) -> None:
    """A delta far below a unit in the last place: next to nothing of it is stored."""
    save_file(weights(dtype=torch.bfloat16), tmp_path / "base.st")
    faint = lora(tmp_path / "a", scaled_up(2e-6))
    result = cli("merge", tmp_path / "base.st", faint, "-o", tmp_path / "m.st")
    assert result.exit_code == 0, result.stderr
    assert "survives rounding" in result.stdout
    assert f"survives in {NAME}" in " ".join(result.stdout.split())
    strong = lora(tmp_path / "b", scaled_up(1.0))
    assert "warning" not in cli("merge", tmp_path / "base.st", strong, "-o", tmp_path / "n.st").stdout
    document = cli_json("merge", tmp_path / "base.st", strong, "-o", tmp_path / "o.st")
    assert set(document["surviving"][NAME]) == {"survived", "cosine"}


def test_a_condition_that_is_not_met_writes_nothing(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Exit code 3, the tensor and the figure; met, it changes nothing; float32 keeps what bfloat16 loses."""
    save_file(weights(dtype=torch.bfloat16), tmp_path / "base.st")
    faint = lora(tmp_path / "a", scaled_up(2e-6))
    arguments = ("merge", tmp_path / "base.st", faint, "--min-surviving", "0.5", "-o")
    result = cli(*arguments, tmp_path / "m.st", "--undo", tmp_path / "u.st", "--json")
    assert result.exit_code == 3
    assert NAME in json.loads(result.stdout)["error"]["where"]
    assert not (tmp_path / "m.st").exists()
    assert not (tmp_path / "u.st").exists()
    with pytest.raises(VerificationFailed, match="1 of 1 merged tensors"):
        surgery.merge(tmp_path / "base.st", faint, tmp_path / "m.st", min_surviving=0.5)
    assert cli(*arguments, tmp_path / "n.st", "--dtype", "float32").exit_code == 0


def test_nothing_asked_and_nothing_stored() -> None:
    """Zero over zero is all of it; a change that vanishes is none of it; squares below float32's range are no zero."""
    start = torch.ones(3, 5000)
    watch = Watch()
    watch(start, torch.zeros(3, 5000), start)
    assert (watch.surviving.survived, watch.surviving.cosine) == (1.0, 1.0)
    assert not watch.asks
    watch(start, torch.full((3, 5000), 1e-30), start)
    assert (watch.surviving.survived, watch.surviving.cosine) == (0.0, 0.0)
    assert watch.asks
    small = Watch()
    small(torch.zeros(3, 5000), torch.full((3, 5000), 1e-30), torch.full((3, 5000), 1e-30))
    assert small.surviving.survived == pytest.approx(1)
    assert small.is_finite
    small(start, torch.zeros(3, 5000), torch.full((3, 5000), torch.inf))
    assert not small.is_finite
