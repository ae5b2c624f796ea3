"""The plan of an operation, made before any work: every input, output, dtype and shape.

Plans are frozen and picklable, so that another engine can run them elsewhere. A plan knows paths only through
references, and no thread or method's mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from formats.spec import TensorRef, TensorSpec, shape_text

if TYPE_CHECKING:
    import torch


class Fate(StrEnum):
    """What became of a tensor. Every input tensor has exactly one fate in the ledger."""

    LOW_RANK = "low_rank"  # its change became factors
    MERGED = "merged"  # a delta was added to it
    UNMERGED = "unmerged"  # a delta was subtracted from it
    WIDENED = "widened"  # it got more neurons, or the biases for them
    GRAFTED = "grafted"  # an adapter's tensor that no weight can hold; stored next to the model, for the graph
    FULL = "full"  # carried, replaced or restored whole
    CONVERTED = "converted"  # copied in another dtype or form
    COPIED = "copied"  # copied byte for byte
    IDENTICAL = "identical"  # equal in both inputs, so not needed in the adapter
    REMOVED = "removed"  # belonged to the adapter, or to a dtype that the result does not use
    UNUSED = "unused"  # in the file, but the graph does not need it
    REFUSED = "refused"  # left out because the user asked for it


@dataclass(frozen=True)
class Outcome:
    """The result of one step.

    Attributes:
        tensors: one tensor for each declared output of the step, in order; None leaves that output out.
        fates: the ledger's entries, by tensor name.
        figures: measurements, as a frozen dataclass that the ops of a verb share; None if there are none.
        asides: one for each aside that the step declares; None leaves it out.
    """

    tensors: tuple[torch.Tensor | None, ...]
    fates: Mapping[str, Fate]
    figures: Any = None
    asides: tuple[torch.Tensor | None, ...] = ()


Source = Callable[
    [int, int], "torch.Tensor"
]  # (first element, count) → these elements, flat, valid until the next call
Sink = Callable[[int, "torch.Tensor"], None]  # (first element, elements in C order)


class Op(Protocol):
    """The work of one step: tensors in, an Outcome out. An Op is picklable and has no state."""

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Runs on the CPU tensors of the step's inputs, which it may overwrite."""


@dataclass(frozen=True)
class Elsewhere:
    """Work that a job does without the engine; it is in the plan only for display.

    Attributes:
        does: the work, as one verb.
    """

    does: str

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Raises AssertionError."""
        raise AssertionError(f"to {self.does} is not the engine's work")


@runtime_checkable
class TakesOver(Protocol):
    """The work of a step that copies its only input: bytes are copied and no tensor is made."""

    def taken(self, digest: str) -> Outcome:
        """The outcome, without tensors, for a payload with this hash."""


@runtime_checkable
class Streams(Protocol):
    """An Op that can also read its first input and write its only output in pieces; neither is in memory as a whole."""

    def streamed(self, source: Source, rest: tuple[torch.Tensor, ...], sink: Sink) -> Outcome:
        """The outcome, without tensors except asides. `rest`: the other inputs, whole."""


@runtime_checkable
class Compares(Protocol):
    """An Op whose inputs come in pairs. If all pairs are equal, its outcome is known without loading them."""

    def unchanged(self) -> Outcome | None:
        """The outcome for equal pairs; None if the inputs do not all come in pairs."""


@dataclass(frozen=True)
class Step:
    """One unit of work.

    Attributes:
        name: the tensor or module that it handles.
        inputs: tensors to read, in the order the op takes them.
        outputs: tensors it may write, in the order the op returns them.
        op: the work.
        workspace: bytes needed in addition to inputs and outputs.
        shrinks: whether outputs may be smaller than declared.
        asides: tensors it may write to a second output, always upper bounds; their memory counts as workspace.
    """

    name: str
    inputs: tuple[TensorRef, ...]
    outputs: tuple[TensorSpec, ...]
    op: Op | TakesOver
    workspace: int = 0
    shrinks: bool = False
    asides: tuple[TensorSpec, ...] = ()

    @property
    def volume(self) -> int:
        """Bytes to read and to write."""
        return sum(ref.spec.nbytes for ref in self.inputs) + sum(spec.nbytes for spec in self.outputs)

    @property
    def nbytes(self) -> int:
        """Bytes in memory while the step runs."""
        if isinstance(self.op, Streams):
            return sum(ref.spec.nbytes for ref in self.inputs[1:]) + self.workspace
        return sum(ref.spec.nbytes for ref in self.inputs) + sum(spec.nbytes for spec in self.outputs) + self.workspace


@dataclass(frozen=True)
class Plan:
    """A whole operation: its steps, the metadata of its output, and notes for the user."""

    operation: str
    steps: tuple[Step, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Every tensor that may be written."""
        return tuple(spec for step in self.steps for spec in step.outputs)

    @property
    def asides(self) -> tuple[TensorSpec, ...]:
        """Every tensor that may be written to the second output."""
        return tuple(spec for step in self.steps for spec in step.asides)

    @property
    def shrinks(self) -> bool:
        """Whether any output may be smaller than declared."""
        return any(step.shrinks for step in self.steps)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The plan for display: op, step, inputs and outputs, one row for each step."""
        return [
            (
                step.op.does if isinstance(step.op, Elsewhere) else type(step.op).__name__.lower(),
                step.name,
                ", ".join(f"{ref.spec.dtype} {shape_text(ref.spec.shape)}" for ref in step.inputs),
                ", ".join(f"{spec.dtype} {shape_text(spec.shape)}" for spec in step.outputs),
            )
            for step in self.steps
        ]


def no_fates() -> dict[str, int]:
    """An empty ledger, with every fate at 0."""
    return {fate.value: 0 for fate in Fate}


def ledger(outcomes: tuple[Outcome, ...]) -> dict[str, int]:
    """The number of tensors by fate; every fate is listed."""
    counts = no_fates()
    for outcome in outcomes:
        for fate in outcome.fates.values():
            counts[fate.value] += 1
    return counts
