"""Copies of the process: what comes back, what happens when one is lost, and the same bytes as with threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import surgery
from formats.errors import ShapeMismatch
from surgery.errors import WorkerLost
from surgery.pipeline import engine
from surgery.pipeline.engine import Resources
from surgery.pipeline.workers import can_fork, forked

pytestmark = pytest.mark.skipif(not can_fork(), reason="copies of a process are Linux's")


def work(number: int) -> tuple[int, int]:
    """The square of a number and who found it; errors for some."""
    if number == 7:
        raise ShapeMismatch("it does not fit", where="seven", expected="6", found="7")
    if number == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number, os.getpid()


def test_copies_share_the_work_and_end_with_it() -> None:
    """Each call is answered, by processes other than this one, which are gone afterwards."""
    with forked(2, work) as call, ThreadPoolExecutor(2) as pool:
        found = list(pool.map(call, range(6)))
    assert [square for square, _ in found] == [0, 1, 4, 9, 16, 25]
    others = {pid for _, pid in found} - {os.getpid()}
    assert others
    assert not any(Path(f"/proc/{pid}").exists() for pid in others)


def test_an_error_comes_back_as_it_was() -> None:
    """With all that it tells a person; the copy goes on."""
    with forked(1, work) as call:
        with pytest.raises(ShapeMismatch, match="it does not fit") as caught:
            call(7)
        assert caught.value.details == {"where": "seven", "expected": "6", "found": "7"}
        assert call(2)[0] == 4


def test_a_lost_copy_is_an_error() -> None:
    """One that the system killed, as where memory ran out, is told, with what to do."""
    with forked(1, work) as call, pytest.raises(WorkerLost, match="ended during its work") as caught:
        call(9)
    assert caught.value.details["found"] == "exit code -9"
    assert "--jobs" in caught.value.details["next"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, a tuned copy of it, and another base in shards."""
    torch.manual_seed(0)
    base = {f"layers.{n}.up.weight": (0.02 * torch.randn(96, 64)).bfloat16() for n in range(6)}
    base |= {f"layers.{n}.norm.weight": torch.ones(64).bfloat16() for n in range(6)}
    tuned = {name: tensor + 0.01 * torch.randn(tensor.shape).bfloat16() for name, tensor in base.items()}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base/model.safetensors")
    save_file(tuned, tmp_path / "tuned.st")
    (tmp_path / "base/config.json").write_text("{}")
    surgery.extract(tmp_path / "base", tmp_path / "tuned.st", tmp_path / "adapter", rank=1)
    surgery.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "sharded", max_shard_size=30_000)
    return tmp_path


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(each.relative_to(path)): each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}


@pytest.mark.parametrize("base", ["base", "sharded"])
def test_copies_write_what_threads_write(folder: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    """extract, merge with an undo file, and unmerge: byte for byte, in one file and in shards."""
    monkeypatch.setattr(engine, "_WORTH_COPIES", 0)
    made = {}
    for processes in (False, True):
        out, how = folder / f"{base}-{processes}", Resources(2, processes=processes)
        out.mkdir()
        surgery.extract(folder / "base", folder / "tuned.st", out / "adapter", rank=2, resources=how)
        surgery.merge(folder / base, out / "adapter", out / "merged", undo=out / "undo.st", resources=how)
        surgery.unmerge(out / "merged", out / "adapter", out / "again", undo=out / "undo.st", resources=how)
        made[processes] = contents(out)
    assert made[True] == made[False]
    assert len(made[True]) > 5


def test_the_command_line_uses_copies(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cli_json: Callable[..., dict[str, Any]]
) -> None:
    """And a container that only one process can write is left to threads."""
    used: list[int] = []
    monkeypatch.setattr(engine, "_WORTH_COPIES", 0)
    monkeypatch.setattr(engine, "forked", lambda count, work: used.append(count) or forked(count, work))
    cli_json("diff", folder / "base", folder / "tuned.st", "--jobs", 2)
    assert used == [2]
    cli_json("convert", folder / "base", "-o", folder / "model.bin", "--jobs", 2)
    cli_json("diff", folder / "base", folder / "tuned.st", "--jobs", 1)
    assert used == [2]


def test_copies_do_not_outlive_a_kill(tmp_path: Path) -> None:
    """Whoever kills the process with -9 has killed them too."""
    code = (
        "import os, sys, threading, time\n"
        "from surgery.pipeline.workers import forked\n"
        "with forked(2, lambda number: os.write(1, b'%d\\n' % os.getpid()) and time.sleep(60)) as call:\n"
        "    for number in range(2):\n"
        "        threading.Thread(target=call, args=(number,)).start()\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    copies = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while time.monotonic() < end and any(_runs(pid) for pid in copies):
        time.sleep(0.02)
    assert not any(_runs(pid) for pid in copies)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
