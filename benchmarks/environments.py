"""Environments of their own for peers whose pins do not go together with ours; made on first use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
MERGEKIT = ("torch==2.13.0", "mergekit==0.1.5")
LYCORIS = ("torch==2.13.0", "lycoris-lora==4.1.3")


def python_of(name: str, packages: tuple[str, ...]) -> Path:
    """The interpreter of the environment `.venv-NAME` beside this file, with the packages installed."""
    environment = HERE / f".venv-{name}"
    python = environment / "bin" / "python"
    done = environment / "installed"  # an installation that was interrupted is done again
    if not done.exists():
        print(f"installing {' '.join(packages)} into {environment.name}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        done.write_text(" ".join(packages) + "\n")
    return python
