"""The measurements of the steps of merge, unmerge and verify."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from surgery.exact.survival import Surviving
from surgery.pipeline.ops import Hashed
from surgery.receipts.receipt import Original


@dataclass(frozen=True, kw_only=True)
class MergeFigures(Hashed):
    """The figures of a step of merge: hashes of the base's tensors before and of the output's after.

    Attributes:
        changed: whether merging changed anything besides the dtype.
        surviving: how much of the delta is stored, by name.
        originals: tensors that the receipt keeps, by name.
        lost: names of replaced tensors that the receipt does not keep.
    """

    changed: bool = False
    surviving: Mapping[str, Surviving] = field(default_factory=dict)
    originals: Mapping[str, Original] = field(default_factory=dict)
    lost: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class UnmergeFigures(Hashed):
    """The figures of a step of unmerge. `uncertain`: for each tensor that may differ from the base's, the number of
    elements that rounding can have changed."""

    uncertain: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Compared:
    """The figures of a step of verify: the verdict on each tensor, by name."""

    verdicts: Mapping[str, str]
