"""The laws of merge and unmerge for every method of peft: the base comes back bit for bit, and threads do not show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_parity_methods import CASES, made_by_peft
from torch import nn

import surgery
from surgery.errors import NotFinite, NothingToDo

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCALES = (1e-8, 1e-2, 1.0, 10.0)  # of the factors that peft made: changes from next to none to larger than W0


def stored_as(source: Path, target: Path, dtype: torch.dtype, scale: float = 1.0) -> None:
    """The floating-point tensors of a file in another dtype, times a factor."""
    tensors = {
        name: (tensor.double() * scale).to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(source).items()
    }
    save_file(tensors, target)


@pytest.mark.parametrize("name", CASES)
def test_undo_restores_the_base_whatever_the_method(tmp_path: Path, name: str) -> None:
    """For dtypes of base and adapter that take turns, from tiny to huge; the same bytes for 1, 2 and 4 threads and
    any budget, of the output and of the undo file."""
    made_by_peft(tmp_path, CASES[name])
    file = tmp_path / "adapter/adapter_model.safetensors"
    file.rename(tmp_path / "factors.st")
    merged = 0
    for turn, scale in enumerate(SCALES):
        case = list(CASES).index(name) + turn
        base = tmp_path / f"base{turn}.st"
        stored_as(tmp_path / "base.st", base, DTYPES[case % 3])
        stored_as(tmp_path / "factors.st", file, DTYPES[case // 3 % 3], scale)
        outputs, undos = set(), set()
        try:
            for jobs, memory in ((1, 1 << 30), (2, 1), (4, 1 << 12)):
                m, u = tmp_path / f"m{turn}{jobs}.st", tmp_path / f"u{turn}{jobs}.st"
                resources = surgery.Resources(jobs, memory)
                surgery.merge(base, tmp_path / "adapter", m, undo=u, resources=resources)
                outputs.add(m.read_bytes())
                undos.add(u.read_bytes())
        except (NothingToDo, NotFinite):  # too little for the dtype, or too much
            assert scale != 1
            continue
        assert len(outputs) == len(undos) == 1
        back = tmp_path / f"b{turn}.st"
        surgery.unmerge(m, tmp_path / "adapter", back, undo=u, resources=surgery.Resources(3))
        assert back.read_bytes() == base.read_bytes()
        merged += 1
    assert merged


@pytest.mark.parametrize("name", ["boft", "hira", "hra", "ia3", "oft", "road 2"])
def test_an_undone_product_leaves_little_to_store(tmp_path: Path, name: str) -> None:
    """Its inverse predicts most of the base: the undo file holds a small part of the weight's bytes, though these
    are large turns."""
    feedforward = {"feedforward_modules": ["wide"]} if name == "ia3" else {}
    case = replace(CASES[name], build=Wide, targets=("wide",), settings=CASES[name].settings | feedforward)
    made_by_peft(tmp_path, case)
    stored_as(tmp_path / "base.st", tmp_path / "half.st", torch.bfloat16)
    report = surgery.merge(tmp_path / "half.st", tmp_path / "adapter", tmp_path / "m.st", undo=tmp_path / "u.st")
    assert report.undo is not None
    assert report.undo.share < 0.15
    surgery.unmerge(tmp_path / "m.st", tmp_path / "adapter", tmp_path / "b.st", undo=tmp_path / "u.st")
    assert (tmp_path / "b.st").read_bytes() == (tmp_path / "half.st").read_bytes()


class Wide(nn.Module):
    """One layer whose loops torch divides among threads: they do so from 32 768 elements on."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(320, 256)


WIDE = ("boft", "fourierft", "gralora", "hra", "loha", "lokr", "oft", "peanut", "randlora", "road 2", "vera", "waveft")


@pytest.mark.parametrize("name", WIDE)
def test_threads_inside_torch_do_not_show(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a weight so large that torch divides its loops: 1, 2 or 4 threads, one file or shards, both ways."""
    made_by_peft(tmp_path, replace(CASES[name], build=Wide, targets=("wide",)))
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "base.st").rename(base / "model.safetensors")
    outputs = set()
    monkeypatch.setattr("surgery.pipeline.engine.cores", lambda: 4)
    for jobs, shard in ((1, None), (2, 1 << 18), (4, 1 << 20)):  # 4, 2 and 1 threads within a step
        m, b, u = tmp_path / f"m{jobs}", tmp_path / f"b{jobs}", tmp_path / f"u{jobs}.st"
        resources = surgery.Resources(jobs)
        merged = surgery.merge(base, tmp_path / "adapter", m, undo=u, max_shard_size=shard, resources=resources)
        back = surgery.unmerge(m, tmp_path / "adapter", b, undo=u, resources=resources)
        assert back.digest == merged.base_digest
        outputs.add((merged.digest, u.read_bytes()))
    assert len(outputs) == 1
