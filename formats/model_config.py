"""The config.json beside a model's weights. Knows nothing of what it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def model_config(path: str | Path) -> Mapping[str, Any]:
    """The config.json of a model's folder, or beside its file; empty where there is none, or none that is an object."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
