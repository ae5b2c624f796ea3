"""A kill before any one step of a commit: the output is whole or absent, and what stood there is there until then."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys
from pathlib import Path
from formats import staging
kind, target, step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
steps = 0
def watched(work):
    def counted(*arguments, **named):
        global steps
        if steps == step:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1
        return work(*arguments, **named)
    return counted
for name in ("open", "fsync", "link", "rename", "replace", "mkdir", "unlink", "rmdir"):
    setattr(os, name, watched(getattr(os, name)))
exchanged = getattr(staging, "_exchanged")
staging._exchanged = watched(exchanged) if "exchange" in kind else lambda one, other: False
with staging.Staging(target, folder="folder" in kind, force="over" in kind) as output:
    for name in ("one", "two") if "folder" in kind else ("",):
        staging.write_at(output.create(name, 3), b"new", 0)
"""
KINDS = ("file", "file over", "folder", "folder over", "folder over, exchange")


def content(path: Path) -> object:
    """What stands at a path."""
    if path.is_dir():
        return {each.name: each.read_text() for each in path.iterdir()}
    return path.read_text() if path.exists() else None


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="unnamed files are Linux's")
@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_before_any_step_leaves_the_output_whole_or_absent(tmp_path: Path, kind: str) -> None:
    """Every call that could change the disk, in turn. Replacing a folder, too, is one step where the system has one."""
    new: object = {"one": "new", "two": "new"} if "folder" in kind else "new"
    old: object = ({"one": "old"} if "folder" in kind else "old") if "over" in kind else None
    seen = []
    for step in itertools.count():
        place = tmp_path / str(step)
        place.mkdir()
        target = place / "out"
        if isinstance(old, dict):
            target.mkdir()
            (target / "one").write_text("old")
        elif old:
            target.write_text("old")
        done = subprocess.run([sys.executable, "-c", PROGRAM, kind, str(target), str(step)])
        assert all(path == target or path.name.startswith(".out.") for path in place.iterdir())
        found = content(target)
        if done.returncode == 0:
            assert found == new
            assert [path.name for path in place.iterdir()] == ["out"]
            break
        assert done.returncode == -9
        assert found in ((old, new) if kind != "folder over" else (old, new, None))
        seen.append(found)
    assert seen == sorted(seen, key=lambda found: (found == new, found != old))
    assert len(seen) >= 5
