"""The wheel on its own: built, installed alone into an empty environment, run."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from places import ROOT


@pytest.fixture(scope="module")
def surgery_command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `surgery` of a fresh environment that holds the wheel and what it declares, nothing else."""
    work = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--outdir", work, ROOT)
    (wheel,) = work.glob("*.whl")
    venv.create(work / "env", with_pip=True)
    python = work / "env" / "bin" / "python"
    _run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt", wheel)
    return work / "env" / "bin" / "surgery"


def test_the_wheel_runs_alone(surgery_command: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Its version, and an extraction, away from the sources."""
    assert "surgery, version" in _run(surgery_command, "--version", cwd=tmp_path)
    report = _run(surgery_command, "extract", "--rank", "4", *pair, "--json", cwd=tmp_path)
    assert json.loads(report)["ledger"]["low_rank"] == 3
    assert (tmp_path / "tuned-lora-r4" / "adapter_config.json").exists()


def _run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout
