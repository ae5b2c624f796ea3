"""surgery.testing.check_dialect: ours and the guide's keep the laws, and each broken law is told by its name."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from safetensors.torch import save_file

from formats.adapter import Adapter, Told
from formats.checkpoint import Checkpoint
from formats.dialects import DIALECTS
from formats.dialects.dialect import Dialect
from formats.dialects.writing import Wanted, Written
from surgery.testing import check_dialect

sys.path.insert(0, str(ROOT / "examples" / "extending"))
from toyml import TOYML, Toyml

TOLD = {
    **dict.fromkeys(("kohya", "diffusers", "comfyui"), Told(component="unet")),
    "loralib": Told(alpha=8.0),  # of the LoRA that it is given
}


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_our_dialects_keep_the_laws(dialect: Dialect) -> None:
    """Each is written, read, and told from the others."""
    check_dialect(dialect, told=TOLD.get(dialect.name, Told()))


def test_the_guides_dialect_keeps_the_laws() -> None:
    """Without being installed."""
    check_dialect(TOYML)


@dataclass(frozen=True)
class Broken(Toyml):
    """toyml with one law broken."""

    law: str
    name: str = "toyml"

    def recognises(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> bool:
        """Everything, where that is the fault."""
        return self.law == "greedy" or super().recognises(checkpoint, config)

    def read(self, checkpoint: Checkpoint, *rest: Any) -> Adapter:
        """Without the first layer, where that is the fault."""
        adapter = super().read(checkpoint, *rest)
        return replace(adapter, modules=adapter.modules[1:]) if self.law == "forgets" else adapter

    def write(self, adapter: Adapter, metadata: Mapping[str, str], wanted: Wanted) -> Written:
        """With other factors, where that is the fault."""
        written = super().write(adapter, metadata, wanted)
        if self.law == "scales":
            pieces = tuple(replace(piece, factor=2.0) for piece in written.pieces)
            return replace(written, pieces=pieces)
        return written


LAWS = {
    "greedy": "a model is no adapter|recognises no other's file",
    "forgets": "the same ΔW",
    "scales": "the same ΔW",
}


@pytest.mark.parametrize("law", LAWS)
def test_a_broken_law_is_told(law: str) -> None:
    """With what and where."""
    with pytest.raises(AssertionError, match=LAWS[law]) as error:
        check_dialect(Broken(law))
    assert "where:" in str(error.value)


class Reader(Dialect):
    """toyml without the way back, and careless: it leaves what it does not know."""

    name = "reader"

    def recognises(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> bool:
        """By the metadata."""
        return "reader" in checkpoint.metadata

    def read(self, checkpoint: Checkpoint, *rest: Any) -> Adapter:
        """As toyml, and what toyml would refuse is left out in silence."""
        said = json.loads(checkpoint.metadata["reader"])
        kept = {key: spec for key, spec in checkpoint.specs.items() if key.partition(":")[0] in said}
        source = _Seen(checkpoint.ref, kept, {"toyml": checkpoint.metadata["reader"]})
        return TOYML.read(source, *rest)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Seen:
    ref: Any
    specs: Mapping[str, Any]
    metadata: Mapping[str, str]

    def tensor(self, name: str) -> Any:
        from formats.spec import TensorRef

        return TensorRef(self.ref, self.specs[name])


def test_what_is_lost_in_silence_is_told(tmp_path: Path) -> None:
    """Of a dialect that only reads, on a file of the caller's."""
    save_file({"q.weight": torch.zeros(12, 8), "k.weight": torch.zeros(12, 8)}, tmp_path / "base.st")
    said = {"q": {"method": "lora", "rank": 2, "alpha": 2.0, "roles": ["lora_A", "lora_B"]}}
    factors = {"q:lora_A": torch.ones(2, 8), "q:lora_B": torch.ones(12, 2)}
    save_file(factors, tmp_path / "a.st", metadata={"reader": json.dumps(said)})
    with pytest.raises(AssertionError, match="nothing in a file is lost"):
        check_dialect(Reader(), tmp_path / "a.st", tmp_path / "base.st")
    with pytest.raises(AssertionError, match="only reads is checked on a file"):
        check_dialect(Reader())
