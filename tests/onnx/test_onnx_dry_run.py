"""--dry-run of the verbs that read or time graphs: it refuses what the run refuses, in the same words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from scene import lora

import surgery

Change = Callable[[Path, list[str]], list[str]]
VERBS = {
    "graph": "export-onnx {root}/merged --graph {root}/base-onnx/model.onnx -o {root}/out/model.onnx",
    "template": "export-onnx {root}/base --template {root}/base-onnx/model.onnx --adapter {root}/adapter "
    "-o {root}/out/model.onnx",
    "bench": "bench {root}/base-onnx/model.onnx {root}/merged-onnx/model.onnx --seconds 4 --margin 0.9 --shape 1x4 "
    "--record {root}/record.json --report {root}/page.html",
    "compare": "compare {root}/base --adapter {root}/adapter --seconds 0 --no-branch --shape 1x4 "
    "--record {root}/record.json -o {root}/out",
}


@pytest.fixture
def root(twins: Callable[[str], Any], tmp_path: Path) -> Path:
    """Two models, their graphs, and an adapter."""
    for name, exported in zip(("base", "merged"), twins("bert"), strict=True):
        shutil.copytree(exported.model, tmp_path / name)
        shutil.copytree(exported.onnx.parent, tmp_path / f"{name}-onnx")
    lora(tmp_path / "adapter", "encoder.layer.0.attention.self.query", 0)
    lora(tmp_path / "foreign", "transformer.blocks.7.attention", 2)
    return tmp_path


def writes(path: str, content: str = "precious") -> Change:
    """Something stands at a path."""

    def change(root: Path, words: list[str]) -> list[str]:
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(content)
        return words

    return change


def replaces(option: str, value: str) -> Change:
    """Another value of an option."""
    return lambda root, words: [
        value.format(root=root) if before == option else word
        for before, word in zip(["", *words[:-1]], words, strict=True)
    ]


def adds(*more: str) -> Change:
    """Further words."""
    return lambda root, words: [*words, *(word.format(root=root) for word in more)]


def other_payload(root: Path, words: list[str]) -> list[str]:
    """Another model's weights stand where these would go."""
    (root / "out").mkdir()
    save_file({"w": torch.zeros(2)}, root / "out" / "model.safetensors")
    return words


def onto_an_input(root: Path, words: list[str]) -> list[str]:
    """Not even --force replaces what is read."""
    option = "--record" if "--record" in words else "-o"
    return [*replaces(option, "{root}/base-onnx/model.onnx")(root, words), "--force"]


def tensor_missing(root: Path, words: list[str]) -> list[str]:
    """The graph needs what the checkpoint lacks."""
    save_file({"w": torch.zeros(2)}, root / "merged" / "model.safetensors")
    return words


MISTAKES: dict[str, dict[str, Change]] = {
    "graph": {
        "output exists": writes("out/model.onnx"),
        "other payload": other_payload,
        "suffix": replaces("-o", "{root}/out/model.txt"),
        "below a file": replaces("-o", "{root}/base/config.json/model.onnx"),
        "broken config": writes("merged/config.json", "{"),
        "config of another model": writes("merged/config.json", "{}"),
        "no graph": replaces("--graph", "{root}/nowhere.onnx"),
        "garbage graph": writes("base-onnx/model.onnx", "garbage"),
        "other dtype": adds("--dtype", "float16"),
        "tensor missing": tensor_missing,
        "garbage weights": writes("merged/model.safetensors", "garbage"),
        "adapter": adds("--adapter", "{root}/adapter"),
    },
    "template": {
        "output exists": writes("out/model.onnx"),
        "suffix": replaces("-o", "{root}/out/model.txt"),
        "onto an input": onto_an_input,
        "below a file": replaces("-o", "{root}/base/config.json/model.onnx"),
        "broken config": writes("base/config.json", "{"),
        "no template": replaces("--template", "{root}/nowhere.onnx"),
        "garbage template": writes("base-onnx/model.onnx", "garbage"),
        "other adapter": replaces("--adapter", "{root}/foreign"),
        "no adapter": replaces("--adapter", "{root}/nowhere"),
        "no base": adds("--base", "{root}/nowhere"),
        "garbage weights": writes("base/model.safetensors", "garbage"),
        "graph's weights are others": writes("base-onnx/model.safetensors", "garbage"),
    },
    "bench": {
        "record exists": writes("record.json"),
        "report exists": writes("page.html"),
        "report's suffix": replaces("--report", "{root}/page.pdf"),
        "record onto an input": onto_an_input,
        "record below a file": replaces("--record", "{root}/base/config.json/record.json"),
        "provider": adds("--provider", "abacus"),
        "margin": adds("--margin", "2"),
        "shape": adds("--shape", "0x4"),
        "seconds": adds("--seconds", "-1"),
        "no control": adds("--positive-control", "{root}/nowhere.onnx"),
        "garbage graph": writes("merged-onnx/model.onnx", "garbage"),
        "weights written anew": writes("merged-onnx/model.safetensors", "garbage"),
        "CUDA graph": adds("--cuda-graph"),
    },
    "compare": {
        "output full": writes("out/precious"),
        "output below a file": replaces("-o", "{root}/base/config.json/out"),
        "record exists": writes("record.json"),
        "record below a file": replaces("--record", "{root}/base/config.json/record.json"),
        "provider": adds("--provider", "abacus"),
        "margin": adds("--margin", "2"),
        "shape": adds("--shape", "0x4"),
        "broken config": writes("base/config.json", "{"),
        "no class": writes("base/config.json", "{}"),
        "garbage weights": writes("base/model.safetensors", "garbage"),
        "other adapter": replaces("--adapter", "{root}/foreign"),
        "no adapter": replaces("--adapter", "{root}/nowhere"),
        "one adapter twice": adds("--adapter", "{root}/adapter"),
    },
}
CASES = [(verb, name) for verb, mistakes in MISTAKES.items() for name in mistakes]


@pytest.mark.parametrize(("verb", "name"), CASES)
def test_whatever_the_run_refuses_the_dry_run_refuses(
    root: Path, cli: Callable[..., Result], verb: str, name: str
) -> None:
    """With the same exit code and words; --json holds one document in both, the same; nothing is written."""
    words = MISTAKES[verb][name](root, VERBS[verb].format(root=root).split())
    before = snapshot(root)
    real, dry = cli(*words), cli(*words, "--dry-run")
    assert real.exit_code == 1, real.output
    assert (dry.exit_code, dry.stderr) == (real.exit_code, real.stderr)
    documents = [json.loads(cli(*words, "--json", *more).stdout) for more in ((), ("--dry-run",))]
    assert documents[0] == documents[1]
    assert documents[0].keys() == {"operation", "error"}
    assert snapshot(root) == before


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_shows_the_plan_and_writes_nothing(root: Path, cli: Callable[..., Result], verb: str) -> None:
    """As a table, and as one JSON document with what is read and written; the run itself then writes just that."""
    words, before = VERBS[verb].format(root=root).split(), snapshot(root)
    shown, printed = cli(*words, "--dry-run"), cli(*words, "--dry-run", "--json")
    assert shown.exit_code == 0, shown.output
    assert "nothing written" in shown.stdout
    plan = json.loads(printed.stdout)
    assert plan["operation"] == words[0]
    assert plan["bytes_read"] > (root / "base" / "model.safetensors").stat().st_size // 2
    assert plan["steps"]
    assert snapshot(root) == before
    done = cli(*words, "--json")
    assert done.exit_code == 0, done.output
    made = {path for path in root.iterdir() if path.name not in {name.partition("/")[0] for name in before}}
    assert made == {root / Path(each).relative_to(root).parts[0] for each in plan["outputs"]}
    if verb in ("graph", "template"):
        assert {str(path) for path in (root / "out").iterdir()} == set(plan["outputs"])
        assert plan["bytes_written"] > 0


def test_a_record_has_no_plan(root: Path, cli: Callable[..., Result]) -> None:
    """--replay measures nothing."""
    for verb in ("bench", "compare"):
        assert cli(verb, "--replay", root / "record.json", "--dry-run").exit_code == 2


def test_jobs_are_public(root: Path) -> None:
    """Plans can be looked at from Python; a job that is not run leaves nothing."""
    graphs = (root / "base-onnx" / "model.onnx", root / "merged-onnx" / "model.onnx")
    before = snapshot(root)
    jobs = (
        surgery.prepare_export_onnx(root / "merged", root / "out" / "model.onnx", graph=graphs[0]),
        surgery.prepare_reweigh(graphs[0], root / "merged", root / "out" / "model.onnx", base=root / "base"),
        surgery.prepare_bench(*graphs, shapes=[(1, 4)]),
        surgery.prepare_prove(*graphs),
        surgery.prepare_diff(root / "base", root / "merged"),
    )
    for job in jobs:
        with job:
            assert job.summary.inputs
            assert job.summary.bytes_read > 0
    assert snapshot(root) == before


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Every file and folder, and what is in it."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
