"""docs/extending.md: its two examples, installed as another distribution, and what becomes of broken plugins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT
from safetensors.torch import load_file, save_file

EXAMPLES = ROOT / "examples" / "extending"
POINTS = "[surgery.methods]\nrow_lora = row_lora:ROW_LORA\n\n[surgery.dialects]\ntoyml = toyml:TOYML\n"


def install(folder: Path, points: str = POINTS, name: str = "toy", **modules: str) -> Path:
    """A distribution as pip leaves it, with the examples and other modules; the folder goes on sys.path."""
    folder.mkdir(exist_ok=True)
    for example in EXAMPLES.glob("*.py"):
        (folder / example.name).write_text(example.read_text())
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    info = folder / f"{name}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(points)
    return folder


def surgery(site: Path | None, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with a folder of installed distributions."""
    path = os.pathsep.join([str(ROOT), *([str(site)] if site else [])])
    command = [sys.executable, "-c", "from surgery.cli import run; run()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})


def save_row_lora(folder: Path) -> torch.Tensor:
    """base.st, and an adapter of RowLoRA in toyml; its ΔW."""
    torch.manual_seed(0)
    save_file({"model.layers.0.q.weight": torch.randn(12, 8), "model.norm.weight": torch.ones(8)}, folder / "base.st")
    a, b, d = torch.randn(2, 8), torch.randn(12, 2), torch.randn(12)
    said = {"layers/0/q": {"method": "row_lora", "rank": 2, "alpha": 6.0, "roles": ["lora_A", "lora_B", "row_d"]}}
    factors = {"layers/0/q:lora_A": a, "layers/0/q:lora_B": b, "layers/0/q:row_d": d}
    save_file(factors, folder / "adapter.st", metadata={"toyml": json.dumps(said)})
    return 3 * d[:, None] * (b @ a)


def test_the_guide_shows_the_examples_as_they_are() -> None:
    """Each file in full, and the names of the two groups."""
    guide = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for example in EXAMPLES.glob("*.py"):
        assert f"```python\n{example.read_text(encoding='utf-8')}```" in guide, example.name
    assert "surgery.methods" in guide
    assert "surgery.dialects" in guide


def test_a_method_and_a_dialect_from_outside(tmp_path: Path) -> None:
    """inspect, merge, unmerge and convert from the command line, without a line of surgery changed."""
    site, delta = install(tmp_path / "site"), save_row_lora(tmp_path)
    base, adapter, merged = (tmp_path / name for name in ("base.st", "adapter.st", "merged.st"))
    assert "toyml" in surgery(site, "inspect", adapter).stdout
    done = surgery(site, "merge", base, adapter, "-o", merged, "--undo", tmp_path / "undo.st")
    assert done.returncode == 0, done.stderr
    before, after = (load_file(path)["model.layers.0.q.weight"] for path in (base, merged))
    torch.testing.assert_close(after, before + delta, atol=1e-5, rtol=1e-5)
    assert surgery(site, "verify", merged, "--base", base, "--adapter", adapter).returncode == 0
    done = surgery(site, "unmerge", merged, adapter, "-o", tmp_path / "back.st", "--undo", tmp_path / "undo.st")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back.st").read_bytes() == base.read_bytes()
    done = surgery(site, "convert", adapter, "--to", "lora", "--rank", "2", "--base", base, "-o", tmp_path / "lora")
    assert done.returncode == 0, done.stderr
    done = surgery(site, "convert", tmp_path / "lora", "--to", "toyml", "--base", base, "-o", tmp_path / "again.st")
    assert done.returncode == 0, done.stderr
    done = surgery(site, "merge", base, tmp_path / "again.st", "-o", tmp_path / "other.st")
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(load_file(tmp_path / "other.st")["model.layers.0.q.weight"], after, atol=1e-5, rtol=1e-5)


def test_without_the_distribution_both_are_unknown(tmp_path: Path) -> None:
    """The file is none that is read, and the dialect is no choice."""
    save_row_lora(tmp_path)
    done = surgery(None, "merge", tmp_path / "base.st", tmp_path / "adapter.st", "-o", tmp_path / "m.st")
    assert done.returncode == 1
    assert "not an adapter in a dialect we read" in done.stderr
    done = surgery(None, "convert", tmp_path / "adapter.st", "--to", "toyml", "-o", tmp_path / "m.st")
    assert done.returncode == 2
    assert "'toyml' is not one of" in done.stderr


BROKEN = {
    "raises": (
        "[surgery.dialects]\ntoyml = broken:TOYML\n",
        "raise ImportError('no module of mine')",
        "no module of mine",
    ),
    "exits": ("[surgery.dialects]\ntoyml = broken:TOYML\n", "raise SystemExit(7)", "SystemExit: 7"),
    "a class": ("[surgery.dialects]\ntoyml = toyml:Toyml\n", "", "the class Toyml"),
    "no dialect": ("[surgery.dialects]\ntoyml = broken:TOYML\n", "TOYML = object()", "is none"),
    "another name": ("[surgery.dialects]\ntoyml2 = toyml:TOYML\n", "", "another name than its entry point"),
    "ours": ("[surgery.dialects]\nkohya = toyml:TOYML\n", "", "has the name of one of surgery's own"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_dialect_is_named_with_its_distribution(tmp_path: Path, case: str) -> None:
    """Where it is the last hope, in the error; where it is in nobody's way, in a note at most; never a traceback."""
    points, module, reason = BROKEN[case]
    site = install(tmp_path / "site", points, broken=module)
    save_row_lora(tmp_path)
    done = surgery(site, "merge", tmp_path / "base.st", tmp_path / "adapter.st", "-o", tmp_path / "m.st")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    for said in ("toy 0.1", reason):
        assert said in " ".join(done.stderr.split())
    done = surgery(site, "inspect", tmp_path / "base.st")
    assert done.returncode == 0, done.stderr
    assert "toy 0.1" in done.stdout + done.stderr


def test_a_dialect_that_fails_on_others_files_is_named(tmp_path: Path) -> None:
    """In the note on a model, which is not its own."""
    module = "from toyml import Toyml\nclass T(Toyml):\n    def recognises(self, *_): return 1 / 0\nTOYML = T()\n"
    site = install(tmp_path / "site", "[surgery.dialects]\ntoyml = broken:TOYML\n", broken=module)
    save_row_lora(tmp_path)
    done = surgery(site, "inspect", tmp_path / "base.st")
    assert done.returncode == 0, done.stderr
    assert "the dialect toyml of the module broken fails to recognise" in " ".join((done.stdout + done.stderr).split())


def test_a_broken_method_is_named_with_its_distribution(tmp_path: Path) -> None:
    """When an adapter is of it; a broken one of another name is in nobody's way."""
    dialect = "[surgery.dialects]\ntoyml = toyml:TOYML\n"
    site = install(tmp_path / "site", f"[surgery.methods]\nrow_lora = broken:IT\n{dialect}", broken="1 / 0")
    save_row_lora(tmp_path)
    done = surgery(site, "merge", tmp_path / "base.st", tmp_path / "adapter.st", "-o", tmp_path / "m.st")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "the method row_lora of toy 0.1 cannot be imported" in " ".join(done.stderr.split())
    points = f"[surgery.methods]\nrow_lora = row_lora:ROW_LORA\nother = broken:IT\n{dialect}"
    site = install(tmp_path / "other", points, broken="1 / 0")
    done = surgery(site, "merge", tmp_path / "base.st", tmp_path / "adapter.st", "-o", tmp_path / "m.st")
    assert done.returncode == 0, done.stderr


def test_two_distributions_with_one_name_are_both_named(tmp_path: Path) -> None:
    """Nobody decides between them."""
    site = install(tmp_path / "site")
    install(site, name="twin")
    save_row_lora(tmp_path)
    done = surgery(site, "merge", tmp_path / "base.st", tmp_path / "adapter.st", "-o", tmp_path / "m.st")
    assert done.returncode == 1
    assert all(said in done.stderr for said in ("toy 0.1", "twin 0.1"))


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["merge", "--help"]], ids=" ".join)
def test_help_loads_no_plugin(tmp_path: Path, arguments: list[str]) -> None:
    """Nor does anything that needs none of another distribution's."""
    site = install(tmp_path / "site", "[surgery.dialects]\ntoyml = broken:IT\n", broken="raise SystemExit(7)")
    done = surgery(site, *arguments)
    assert done.returncode == 0, done.stderr
