"""From every dialect to every other, for every kind of adapter: docs/round-trips.md, run again."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from places import ROOT

_SPEC = importlib.util.spec_from_file_location("round_trips", ROOT / "docs" / "round_trips.py")
assert _SPEC is not None
assert _SPEC.loader is not None
round_trips = importlib.util.module_from_spec(_SPEC)
sys.modules["round_trips"] = round_trips
_SPEC.loader.exec_module(round_trips)
KINDS = {kind.label: kind for kind in round_trips.kinds()}
WRITTEN = round_trips.TARGET.read_text(encoding="utf-8")


@pytest.mark.parametrize("label", KINDS)
def test_what_is_written_is_what_happens(tmp_path: Path, label: str) -> None:
    """The same ΔW within 1e-6, or a refusal that says so; each cell as the file has it."""
    section = round_trips.section(KINDS[label], tmp_path)
    assert section in WRITTEN, section


def test_every_kind_has_a_table() -> None:
    """And there is no other."""
    assert WRITTEN.count("\n## ") == len(KINDS)
