"""examples/gate.sh and gate.yml: the order of the steps, the exit codes, and one real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from places import ROOT

VERBS = ["extract", "merge", "verify", "export-onnx", "export-onnx", "prove", "bench"]


def _gate(tmp_path: Path, program: str, *arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs the script with `program` as the command surgery."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "surgery").write_text(f"#!/bin/sh\n{program}\n")
    (folder / "surgery").chmod(0o755)
    environment = {**os.environ, **settings, "PATH": f"{folder}:{os.environ['PATH']}"}
    words = ["sh", str(ROOT / "examples" / "gate.sh"), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)


@pytest.mark.parametrize(("failing", "code"), [("verify", 3), ("prove", 3), ("bench", 4), ("merge", 1), ("none", 0)])
def test_the_first_no_ends_it(tmp_path: Path, failing: str, code: int) -> None:
    """With that command's exit code; what comes after is not run."""
    done = _gate(tmp_path, f'echo "$1" >> said\nif [ "$1" = {failing} ]; then exit {code}; fi', "b", "t", "o")
    assert done.returncode == code
    stopped = VERBS.index(failing) + 1 if failing in VERBS else len(VERBS)
    assert (tmp_path / "said").read_text().split() == VERBS[:stopped]


def test_settings_reach_the_commands(tmp_path: Path) -> None:
    """Each by its name; paths with spaces stay whole."""
    settings = {"RANK": "4", "MARGIN": "0.02", "TIME": "9", "SHAPES": "1x8 2x4", "PROVIDER": "cuda"}
    done = _gate(tmp_path, 'for word; do printf "[%s]" "$word"; done; echo', "a base", "t", "o", **settings)
    lines = done.stdout.splitlines()
    assert lines[0] == "[extract][--rank][4][a base][t][-o][o/adapter]"
    assert lines[5] == "[prove][o/base-onnx/model.onnx][o/merged-onnx/model.onnx][--provider][cuda]"
    assert "[--shape][1x8][--shape][2x4][--provider][cuda][--margin][0.02][--seconds][9]" in lines[6]


def test_wrong_use(tmp_path: Path) -> None:
    """Three paths, or exit code 2."""
    assert _gate(tmp_path, "true", "b", "t").returncode == 2


def test_a_tiny_model_passes(tmp_path: Path) -> None:
    """The real commands on a tiny BERT; only whether bench can tell is left to the machine."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=64, max_position_embeddings=64))
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "tuned")
    command = f"exec '{Path(sys.executable).with_name('surgery')}' \"$@\""
    settings = {"RANK": "2", "MARGIN": "0.9", "TIME": "10", "SHAPES": "1x16"}
    done = _gate(tmp_path, command, "base", "tuned", "out", **settings)
    assert done.returncode in (0, 4), done.stderr
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert list(record["same_graph"].values()) == [True]
    assert record["comparisons"][0]["verdict"] in ("equivalent", "inconclusive")


def test_the_workflow_runs_the_script() -> None:
    """A workflow of one job that sets nothing but what the script knows."""
    text = (ROOT / "examples" / "gate.yml").read_text()
    (job,) = yaml.safe_load(text)["jobs"].values()
    script = (ROOT / "examples" / "gate.sh").read_text()
    assert all(f"${{{name}:-" in script for name in job["env"])
    assert any("gate.sh" in step.get("run", "") for step in job["steps"])
