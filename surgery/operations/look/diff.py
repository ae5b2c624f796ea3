"""diff: what changed between two models, and by how much. Names, shapes and dtypes come from headers, the rest from
one pass over both files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from formats.checkpoint import Checkpoint
from formats.open_files import OpenFiles
from formats.spec import TensorSpec
from surgery.pipeline.engine import Resources
from surgery.pipeline.job import Done, Header, Job, runs, step_by_step
from surgery.pipeline.plan import Fate, Outcome, Plan, Step
from surgery.report import Report, Stopwatch

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorChange:
    """One tensor that is not the same in both.

    Attributes:
        name: the tensor.
        how: "values", "dtype" (equal values stored otherwise), "shape", "added" or "removed".
        before, after: specs as text; None where it is not there.
        relative: ‖tuned − base‖ / ‖base‖; None where that means nothing.
        largest: max |tuned − base|.
    """

    name: str
    how: str
    before: str | None
    after: str | None
    relative: float | None = None
    largest: float | None = None


@dataclass(frozen=True, kw_only=True)
class DiffReport(Report):
    """What differs. The ledger counts tensors by how they differ, and those identical byte for byte."""

    base: str
    tuned: str
    changes: tuple[TensorChange, ...]


def prepare_diff(
    base: str | Path, tuned: str | Path, *, headers_only: bool = False, resources: Resources | None = None
) -> Job[DiffReport]:
    """Prepares a job that compares two checkpoints tensor by tensor.

    Args:
        base, tuned: a safetensors file or a folder each.
        headers_only: names, shapes and dtypes only; tensors alike in those count as identical.
        resources: workers, memory and device.

    Raises:
        FormatError: see formats.errors.
    """
    watch, files = Stopwatch(loading="torch"), OpenFiles()
    before, after = files.checkpoint(base), files.checkpoint(tuned)
    plan, told, identical = plan_diff(before, after, headers_only)

    def finish(done: Done) -> Callable[[Header], DiffReport]:
        measured = [outcome.figures.change for outcome in done.outcomes if isinstance(outcome.figures, Measured)]
        changes = (*told, *measured)
        same = identical + len(done.outcomes) - len(measured)
        return lambda header: DiffReport(
            **{**header, "ledger": {"identical": same} | Counter(change.how for change in changes)},
            base=str(base),
            tuned=str(tuned),
            changes=tuple(sorted(changes, key=lambda change: -(change.relative or 0.0))),
        )

    return step_by_step(plan, files=files, watch=watch, inputs=(base, tuned), finish=finish, resources=resources)


diff = runs(prepare_diff)


def plan_diff(before: Checkpoint, after: Checkpoint, headers_only: bool) -> tuple[Plan, tuple[TensorChange, ...], int]:
    """What is to be measured, what the headers tell already, and how many tensors are identical by them."""
    changes = [
        TensorChange(name, "removed", _text(spec), None)
        for name, spec in before.specs.items()
        if name not in after.specs
    ]
    changes += [
        TensorChange(name, "added", None, _text(spec)) for name, spec in after.specs.items() if name not in before.specs
    ]
    alike: list[Step] = []
    identical = 0
    for name in [name for name in after.specs if name in before.specs]:
        old, new = before.specs[name], after.specs[name]
        if old.shape != new.shape:
            changes.append(TensorChange(name, "shape", _text(old), _text(new)))
        elif headers_only and old.dtype is not new.dtype:
            changes.append(TensorChange(name, "dtype", _text(old), _text(new)))
        elif headers_only:
            identical += 1
        else:
            inputs = (before.tensor(name), after.tensor(name))
            alike.append(Step(name, inputs, (), Compare(old, new), workspace=16 * old.size))
    notes = tuple(dict.fromkeys((*before.notes, *after.notes)))
    return Plan("diff", tuple(alike), notes=notes), tuple(changes), identical


def _text(spec: TensorSpec) -> str:
    return f"{spec.dtype}{list(spec.shape)}"


@dataclass(frozen=True)
class Measured:
    """The figures of a comparison whose tensors are not equal."""

    change: TensorChange


@dataclass(frozen=True)
class Compare:
    """Measures the difference of two tensors of one shape."""

    before: TensorSpec
    after: TensorSpec

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Equal bytes are settled first; the rest is measured in float64."""
        import torch

        old, new = inputs
        name = self.before.name
        if old.dtype == new.dtype and torch.equal(old, new):
            return Outcome((), {name: Fate.IDENTICAL})
        wide = old.to(torch.float64)
        delta = new.to(torch.float64).sub_(wide)
        size, norm = float(wide.norm()), float(delta.norm())
        how = "values" if norm or norm != norm else "dtype"
        relative = norm / size if size else None
        change = TensorChange(name, how, _text(self.before), _text(self.after), relative, float(delta.abs().max()))
        return Outcome((), {name: Fate.FULL}, Measured(change))
