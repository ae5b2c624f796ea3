"""kill -9 at random moments of merge and unmerge, as the benchmark does it, a few times."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from places import ROOT

KILL = ROOT / "benchmarks" / "kill.py"


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="unnamed files are Linux's")
def test_a_kill_leaves_whole_outputs_or_none() -> None:
    """Files and folders, with an undo file and without, over an older output: inputs untouched, nothing broken."""
    done = subprocess.run([sys.executable, KILL, "--small", "--kills", "14"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
