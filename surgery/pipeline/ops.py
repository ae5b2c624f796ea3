"""Ops that all verbs share: copying a tensor byte for byte, dropping one, and hashing tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from formats.spec import TensorSpec
from surgery.hashes import content_digest
from surgery.pipeline.plan import Fate, Outcome

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Hashed:
    """The figures of a step that hashes its inputs and outputs: BLAKE3 of payloads, by tensor name."""

    before: Mapping[str, str] = field(default_factory=dict)
    after: Mapping[str, str] = field(default_factory=dict)


def hashes_before(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """BLAKE3 of every tensor that the steps read and hashed, by name."""
    return _gathered(each.figures.before for each in outcomes if isinstance(each.figures, Hashed))


def hashes_after(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """BLAKE3 of every tensor that the steps wrote and hashed, by name."""
    return _gathered(each.figures.after for each in outcomes if isinstance(each.figures, Hashed))


def _gathered(found: Iterable[Mapping[str, str]]) -> dict[str, str]:
    return {name: digest for hashes in found for name, digest in hashes.items()}


def output_digest(specs: Iterable[TensorSpec], outcomes: Iterable[Outcome]) -> str:
    """The content digest of the steps' outputs with these specs, in any order."""
    hashes = hashes_after(outcomes)
    return content_digest((spec, hashes[spec.name]) for spec in specs)


@dataclass(frozen=True)
class Copy:
    """Copies a tensor byte for byte."""

    name: str

    def taken(self, digest: str) -> Outcome:
        """The outcome for a payload with this hash."""
        return Outcome((), {self.name: Fate.COPIED}, Hashed({self.name: digest}, {self.name: digest}))


@dataclass(frozen=True)
class Drop:
    """Drops a tensor that the adapter had added."""

    name: str

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Leaves it out."""
        return Outcome((), {self.name: Fate.REMOVED})
