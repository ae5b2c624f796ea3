"""Reads the config.json in a model's folder. Does not interpret it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def model_config(path: str | Path) -> Mapping[str, Any]:
    """The config.json in a model's folder, or next to its file. Empty if it is missing, broken or not an object."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
