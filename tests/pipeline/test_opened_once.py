"""Every header and config of base and adapter is opened once per verb, as the system sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scene import VERBS, make_scene, words_of

PROGRAM = """
import collections, json, os, sys
root, words = sys.argv[1], sys.argv[2:]
seen = collections.Counter()

def audit(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if path.startswith(root + os.sep) and os.path.isfile(path):
            seen[os.path.relpath(path, root)] += 1

import torch
from surgery.cli import main
sys.addaudithook(audit)
try:
    main(words)
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(seen), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything the verbs work on, made once."""
    return make_scene(tmp_path_factory.mktemp("scene").resolve())


@pytest.mark.parametrize("verb", VERBS)
def test_each_header_is_opened_once(scene: Path, tmp_path: Path, verb: str) -> None:
    """Weights, indexes and configs of every input; the output is elsewhere."""
    words = words_of(verb, scene, tmp_path / VERBS[verb].output)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(scene), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    opened = json.loads(done.stderr.splitlines()[-1])
    assert opened
    assert {name: count for name, count in opened.items() if count > 1} == {}
