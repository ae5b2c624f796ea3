"""A kill, a full disk, a Ctrl-C: inputs untouched, the output whole or absent, nothing beside it."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

MODEL = {f"layers.{index}.up.weight": torch.randn(512, 512) for index in range(24)}
SURGERY = [sys.executable, "-c", "from surgery.cli import run; run()"]


@pytest.fixture
def big_pair(tmp_path: Path) -> tuple[Path, Path]:
    """A pair whose extraction takes a moment."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    save_file(MODEL, inputs / "base.st")
    save_file({name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in MODEL.items()}, inputs / "tuned.st")
    return inputs / "base.st", inputs / "tuned.st"


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="unnamed files are Linux's")
def test_kill_9_leaves_inputs_untouched_and_no_output(big_pair: tuple[Path, Path], tmp_path: Path) -> None:
    """At several moments of extract and merge: afterwards the folder holds a whole output or nothing at all."""
    out = tmp_path / "out"
    out.mkdir()
    before = digests(tmp_path / "in")
    whole = 0
    for index in range(10):
        target = out / f"{index}.st"
        arguments = ["extract", "--rank", "64", *map(str, big_pair), "-o", str(target)]
        process = subprocess.Popen([*SURGERY, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _wait_until_writing(process, out)
        time.sleep(0.03 * index)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert {path.name for path in out.iterdir()} <= {f"{past}.st" for past in range(index + 1)}
        if target.exists():
            whole += 1
            assert len(load_file(target)) == 2 * len(MODEL)
    assert digests(tmp_path / "in") == before
    assert whole < 10


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="unnamed files are Linux's")
def test_kill_9_leaves_no_output_without_its_undo_file(big_pair: tuple[Path, Path], tmp_path: Path) -> None:
    """At several moments of merge --undo: an output has an undo file, and nothing is half-written."""
    import surgery

    base, tuned = big_pair
    surgery.extract(base, tuned, tmp_path / "adapter", rank=2)
    before = digests(tmp_path / "in")
    for index in range(8):
        out = tmp_path / str(index)
        out.mkdir()
        arguments = [
            "merge",
            str(base),
            str(tmp_path / "adapter"),
            "-o",
            str(out / "m.st"),
            "--undo",
            str(out / "u.st"),
        ]
        process = subprocess.Popen([*SURGERY, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _wait_until_writing(process, out)
        time.sleep(0.08 * index)
        process.send_signal(signal.SIGKILL)
        process.wait()
        names = {path.name for path in out.iterdir()}
        assert names in ({"m.st", "u.st"}, {"u.st"}, set())
        if "m.st" in names:
            assert surgery.unmerge(out / "m.st", tmp_path / "adapter", out / "b.st", undo=out / "u.st").bit_exact
    assert digests(tmp_path / "in") == before


def _wait_until_writing(process: subprocess.Popen[bytes], out: Path) -> None:
    """Until the process holds an unnamed file in the output's folder, or has ended."""
    descriptors = Path(f"/proc/{process.pid}/fd")
    while process.poll() is None:
        try:
            if any(str(out) in os.readlink(descriptor) for descriptor in descriptors.iterdir()):
                return
        except OSError:
            pass
        time.sleep(0.005)


@pytest.mark.parametrize("verb", ["extract", "merge"])
def test_a_full_disk_is_one_clear_error(big_pair: tuple[Path, Path], tmp_path: Path, verb: str) -> None:
    """A limit on file sizes stands for the full disk: the space is reserved first, so it fails before the work."""
    import surgery

    base, tuned = big_pair
    arguments = {"extract": ["extract", "--rank", "64", str(base), str(tuned)]}
    if verb == "merge":
        surgery.extract(base, tuned, tmp_path / "adapter", rank=2)
        arguments["merge"] = ["merge", str(base), str(tmp_path / "adapter")]
    out = tmp_path / "out"
    out.mkdir()
    before = digests(tmp_path / "in")
    program = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        "from surgery.cli import run; run()"
    )
    command = [sys.executable, "-c", program, *arguments[verb], "-o", str(out / "result.st")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(out.iterdir()) == []
    assert digests(tmp_path / "in") == before


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """An interrupt ends the run without output and without a traceback."""
    base, tuned, out = tmp_path / "base.st", tmp_path / "tuned.st", tmp_path / "out"
    out.mkdir()
    wide = {f"layers.{index}.up.weight": torch.randn(1536, 1536) for index in range(6)}  # seconds each, at this rank
    save_file(wide, base)
    save_file({name: tensor + torch.randn_like(tensor) for name, tensor in wide.items()}, tuned)
    arguments = ["extract", "--rank", "1000", str(base), str(tuned), "-o", str(out / "result.st"), "--jobs", "1"]
    # Whoever runs the tests in the background has SIGINT ignored, and children inherit that.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    command = [sys.executable, "-c", listen + SURGERY[-1], *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _wait_until_writing(process, out)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0, errors
    assert "Traceback" not in errors
    assert list(out.iterdir()) == []
