"""diff: lists what changed between two models, and by how much. Names, shapes and dtypes come from headers; the rest
takes one pass over both files."""

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
    """One tensor that differs between the two models.

    Attributes:
        name: the tensor's name.
        how: "values", "dtype" (equal values in another dtype), "shape", "added" or "removed".
        before, after: dtype and shape as text; None if the model lacks the tensor.
        relative: ‖tuned − base‖ / ‖base‖; None where it is undefined.
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
    """The tensors that differ. The ledger counts tensors by how they differ, and the byte-identical ones."""

    base: str
    tuned: str
    changes: tuple[TensorChange, ...]


def prepare_diff(
    base: str | Path, tuned: str | Path, *, headers_only: bool = False, resources: Resources | None = None
) -> Job[DiffReport]:
    """Prepares a job that compares two checkpoints tensor by tensor.

    Args:
        base, tuned: a safetensors file or a folder each.
        headers_only: compare only names, shapes and dtypes; tensors that agree in these count as identical.
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
    """The plan of what to measure, the changes visible in headers, and how many tensors headers show as identical."""
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
    """The measured difference of two unequal tensors."""

    change: TensorChange


@dataclass(frozen=True)
class Compare:
    """Measures the difference of two tensors of one shape."""

    before: TensorSpec
    after: TensorSpec

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Compares bytes first; measures the difference in float64 only if they differ."""
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
