"""The plan of an operation: every input, output, dtype and shape, before anything is done.

Plans are frozen and picklable, so that another engine can run them elsewhere. This module knows paths only through
references, and knows no threads and no method's mathematics.
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
    """What happened to a tensor. In the ledger, every tensor of every input has exactly one fate."""

    LOW_RANK = "low_rank"  # its change became factors
    MERGED = "merged"  # a delta was added to it
    UNMERGED = "unmerged"  # a delta was subtracted from it
    WIDENED = "widened"  # it got more neurons, or what these need
    GRAFTED = "grafted"  # it belongs to an adapter and fits no weight: kept for the graph
    FULL = "full"  # it was carried, replaced or restored whole
    CONVERTED = "converted"  # it was copied in another dtype or form
    COPIED = "copied"  # it was copied byte for byte
    IDENTICAL = "identical"  # it is the same in both inputs: nothing to carry
    REMOVED = "removed"  # it belonged to the adapter, or to a dtype that the result no longer has
    UNUSED = "unused"  # it is in the file, but the graph does not need it
    REFUSED = "refused"  # it was left behind, because the user said so


@dataclass(frozen=True)
class Outcome:
    """The result of one step.

    Attributes:
        tensors: one tensor for each declared output of the step, in order; None leaves that output out.
        fates: the ledger's entries, by tensor name.
        figures: what the step measured, by the operation's own keys.
        asides: one tensor for each of the step's declared asides, in order; None leaves it out.
    """

    tensors: tuple[torch.Tensor | None, ...]
    fates: Mapping[str, Fate]
    figures: Mapping[str, Any] = field(default_factory=dict)
    asides: tuple[torch.Tensor | None, ...] = ()


Source = Callable[[int, int], "torch.Tensor"]  # (first element, count) → flat elements, valid until the next call
Sink = Callable[[int, "torch.Tensor"], None]  # (first element, elements in C order)


class Op(Protocol):
    """The work of one step: tensors in, an Outcome out. An Op is picklable and has no state."""

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Runs on the CPU tensors of the step's inputs, which it may overwrite."""


@runtime_checkable
class TakesOver(Protocol):
    """The work of a step that copies its only input unchanged: its bytes are copied and no tensor is made."""

    def taken(self, digest: str) -> Outcome:
        """The outcome, without tensors, for a payload with this hash."""


@runtime_checkable
class Streams(Protocol):
    """An Op that can read its first input and write its only output in pieces, so that neither is in memory as a
    whole."""

    def streamed(self, source: Source, rest: tuple[torch.Tensor, ...], sink: Sink) -> Outcome:
        """The outcome, whose only tensors are asides. `rest` holds the other inputs as a whole."""


@runtime_checkable
class Compares(Protocol):
    """An Op whose inputs come in pairs and that need not load them if each pair is equal."""

    def unchanged(self) -> Outcome | None:
        """The outcome for equal pairs; None if the inputs do not all come in pairs."""


@dataclass(frozen=True)
class Step:
    """One unit of work.

    Attributes:
        name: the tensor or module that the step works on.
        inputs: tensors to read, in the order in which the op takes them.
        outputs: tensors that the step may write, in the order in which the op returns them.
        op: the work.
        workspace: bytes needed in addition to inputs and outputs.
        shrinks: whether outputs may have fewer bytes than declared.
        asides: tensors that the step may write to a second output. Their sizes are upper bounds, and their memory
            counts as workspace.
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
        """The plan as a table for users, one row per step: op, name, inputs, outputs."""
        return [
            (
                type(step.op).__name__.lower(),
                step.name,
                ", ".join(f"{ref.spec.dtype} {shape_text(ref.spec.shape)}" for ref in step.inputs),
                ", ".join(f"{spec.dtype} {shape_text(spec.shape)}" for spec in step.outputs),
            )
            for step in self.steps
        ]


def no_fates() -> dict[str, int]:
    """An empty ledger, which lists every fate with a count of 0."""
    return {fate.value: 0 for fate in Fate}


def ledger(outcomes: tuple[Outcome, ...]) -> dict[str, int]:
    """The number of tensors by fate; every fate is listed."""
    counts = no_fates()
    for outcome in outcomes:
        for fate in outcome.fates.values():
            counts[fate.value] += 1
    return counts
