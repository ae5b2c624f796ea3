"""Steps that every verb has: a tensor copied byte for byte, and one that is left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.pipeline.plan import Fate, Outcome

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Copy:
    """A tensor taken over byte for byte."""

    name: str

    def taken(self, digest: str) -> Outcome:
        """Of both ends."""
        return Outcome((), {self.name: Fate.COPIED}, {"base": {self.name: digest}, "hashes": {self.name: digest}})


@dataclass(frozen=True)
class Drop:
    """A tensor that the adapter had added."""

    name: str

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Leaves it out."""
        return Outcome((), {self.name: Fate.REMOVED})
