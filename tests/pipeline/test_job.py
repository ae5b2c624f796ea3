"""Jobs as the library hands them out: looked at, run once, or closed."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from scene import make_scene

import surgery
from surgery.errors import SurgeryError, Unsupported


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything the verbs work on, made once."""
    return make_scene(tmp_path_factory.mktemp("scene"))


def test_a_plan_is_looked_at_before_it_is_run(scene: Path, tmp_path: Path) -> None:
    """Inputs, outputs and bytes are known; nothing is written until the job runs."""
    job = surgery.prepare_merge(scene / "base", scene / "adapter", tmp_path / "out")
    said = job.summary
    assert said.operation == "merge"
    assert said.inputs == (str(scene / "base"), str(scene / "adapter"))
    assert said.outputs == (str(tmp_path / "out"),)
    weights = sum(path.stat().st_size for path in (scene / "base").glob("*.safetensors"))
    assert 0.9 * weights < said.bytes_written <= said.bytes_read <= weights + 1000
    assert not (tmp_path / "out").exists()
    report = job.run()
    assert report.output == str(tmp_path / "out")
    assert report.digest == surgery.merge(scene / "base", scene / "adapter", tmp_path / "again").digest


def test_a_job_runs_once(scene: Path, tmp_path: Path) -> None:
    """Its files are closed then; closed without a run it does not run either."""
    job = surgery.prepare_merge(scene / "base", scene / "adapter", tmp_path / "out")
    job.run()
    with surgery.prepare_merge(scene / "base", scene / "adapter", tmp_path / "other") as closed:
        pass
    for used in (job, closed):
        with pytest.raises(SurgeryError, match="already been run or closed"):
            used.run()
    assert not (tmp_path / "other").exists()


def test_resources_are_checked_while_preparing(scene: Path, tmp_path: Path) -> None:
    """A device that is not there is refused before anything is run."""
    with pytest.raises(Unsupported, match="abacus"):
        surgery.prepare_merge(
            scene / "base", scene / "adapter", tmp_path / "out", resources=surgery.Resources(device="abacus")
        )


PREPARED = sorted(name for name in surgery.__all__ if name.startswith("prepare_"))


@pytest.mark.parametrize("name", PREPARED)
def test_a_verb_is_what_prepares_it_run_at_once(name: str) -> None:
    """The same parameters, and a docstring that says what it does."""
    prepare, verb = getattr(surgery, name), getattr(surgery, name.removeprefix("prepare_"))
    assert inspect.signature(prepare).parameters == inspect.signature(verb).parameters
    assert prepare.__doc__.startswith("Prepares a job that ")
    assert not verb.__doc__.startswith("Prepares")
    assert verb.__name__ == name.removeprefix("prepare_")
