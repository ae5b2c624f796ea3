"""The grafts file: what is written is read, and what contradicts itself is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from formats.errors import CorruptFile, NotACheckpoint
from formats.grafts import KEY, BranchGraft, Graft, Grafts, PrefixGraft, PromptGraft, Value, read_grafts, tensor_names
from formats.paths import open_checkpoint

BRANCH = BranchGraft(
    "layer.0.output.dense", 0, "output_adapter", Value.NORMED, Value.OUTPUT, "layer.0.output.LayerNorm", "relu",
    "a.down", "a.down_bias", "a.up", "a.up_bias",
)  # fmt: skip
PREFIX = PrefixGraft("layer.0.attention.output.dense", 0, False, "b.keys", "b.values")
PROMPT = PromptGraft(True, False, "c.embedding")
SHAPES = {
    "a.down": (2, 4), "a.down_bias": (2,), "a.up": (4, 2), "a.up_bias": (4,), "b.keys": (3, 4), "b.values": (3, 4),
    "c.embedding": (3, 4),
}  # fmt: skip


def written(path: Path, grafts: Grafts, **shapes: tuple[int, ...]) -> Path:
    """A file with these grafts; `shapes` replace those of tensors, by the last part of the name."""
    names = [name for site in grafts.sites for name in tensor_names(site).values()]
    sizes = {name: shapes.get(name.rpartition(".")[2], SHAPES[name]) for name in names}
    save_file({name: torch.zeros(size) for name, size in sizes.items()}, path, grafts.metadata())
    return path


@pytest.mark.parametrize("sites", [(), (BRANCH,), (PREFIX,), (BRANCH, PREFIX, PROMPT)])
def test_what_is_written_is_read(tmp_path: Path, sites: tuple[Graft, ...]) -> None:
    """Whatever the kinds."""
    grafts = Grafts("0" * 64, "1" * 64, sites)
    with open_checkpoint(written(tmp_path / "grafts.safetensors", grafts)) as checkpoint:
        assert read_grafts(checkpoint) == grafts


@pytest.mark.parametrize("shapes", [{"up": (4, 3)}, {"down": (8,)}, {"up_bias": (5,)}, {"keys": (2, 4)}])
def test_shapes_that_do_not_fit_are_refused(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Each other, or what they are for."""
    path = written(tmp_path / "grafts.st", Grafts("", "", (BRANCH, PREFIX)), **shapes)
    with open_checkpoint(path) as checkpoint, pytest.raises(CorruptFile, match="of its grafts is invalid"):
        read_grafts(checkpoint)


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"sites": [{"kind": "other"}]}, {"sites": []}, {"sites": 3}, {"layer": "0"}, {"reads": "h"}],
)
def test_a_description_that_is_not_ours_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """With what is wrong."""
    path = written(tmp_path / "grafts.st", Grafts("", "", (BRANCH,)))
    with open_checkpoint(path) as checkpoint:
        document = json.loads(checkpoint.metadata[KEY])
        tensors = {name: checkpoint.read(name) for name in checkpoint.specs}
    own = {key: value for key, value in change.items() if key not in document}
    document |= {key: value for key, value in change.items() if key in document}
    if own:
        document["sites"][0] |= own
    save_file(tensors, path, {KEY: json.dumps(document)})
    with open_checkpoint(path) as checkpoint, pytest.raises(CorruptFile, match="of its grafts is invalid"):
        read_grafts(checkpoint)


def test_another_file_is_no_grafts_file(tmp_path: Path) -> None:
    """A model, say."""
    save_file({"w": torch.zeros(2)}, tmp_path / "model.st")
    with open_checkpoint(tmp_path / "model.st") as checkpoint, pytest.raises(NotACheckpoint):
        read_grafts(checkpoint)
