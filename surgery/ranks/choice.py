"""How an adapter's ranks are chosen and its factors are stored; shared by every verb that makes factors.

Pure: names in, rules out. Knows no tensor and no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from formats.spec import DType
from surgery.model.patterns import matching
from surgery.model.stored_dtype import dtype_named
from surgery.ranks.budget import Budget
from surgery.ranks.rules import Bounded, EnergyRule, FixedRank, RankRule


@dataclass(frozen=True)
class RankChoice:
    """The ranks of an adapter's factors, and their dtype.

    Attributes:
        rank: a rank for every weight, a rule that decides for each, or a budget for all together.
        overrides: pattern → rank, for the weights it matches, whatever rules the others; the last that matches wins.
        dtype: "float32", "float16" or "bfloat16"; None for each weight's own.
        seed: the seed for the randomised SVD.
    """

    rank: int | RankRule | Budget
    overrides: Mapping[str, int] = field(default_factory=dict)
    dtype: str | None = None
    seed: int = 0

    @property
    def budget(self) -> Budget | None:
        """The budget, if one rules: ranks are known only once all weights are measured."""
        return self.rank if isinstance(self.rank, Budget) else None

    @property
    def rule(self) -> RankRule:
        """The rule of every weight that no override names; under a budget it has room for whatever that comes to."""
        if isinstance(self.rank, Budget):
            return Bounded(EnergyRule(1.0), self.rank.minimum, self.rank.maximum)
        return FixedRank(self.rank) if isinstance(self.rank, int) else self.rank

    @property
    def stored(self) -> DType | None:
        """The factors' dtype; None for each weight's own. Raises UnsupportedDType."""
        return dtype_named(self.dtype, "factors")

    def overridden(self, names: Iterable[str]) -> dict[str, int]:
        """The ranks that overrides give to tensors. Raises UnknownTensor for a pattern that matches nothing."""
        known = list(names)
        ranks: dict[str, int] = {}
        for pattern, rank in self.overrides.items():
            ranks |= dict.fromkeys(matching(known, pattern), rank)
        return ranks

    def rules(self, names: Iterable[str], measured: Mapping[str, int] | None = None) -> dict[str, RankRule]:
        """Every tensor's rule.

        Args:
            names: the tensors.
            measured: the ranks that a budget came to.

        Raises:
            UnknownTensor: an override that matches nothing.
        """
        known, rule = list(names), self.rule
        ranks = self.overridden(known) | dict(measured or {})
        return {name: FixedRank(ranks[name]) if name in ranks else rule for name in known}

    def __str__(self) -> str:
        return str(self.budget or self.rule)
