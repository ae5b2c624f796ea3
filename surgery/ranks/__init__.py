"""Chooses ranks: rules for one weight, and budgets for all together. The rules are public as `surgery.ranks`."""

from surgery.ranks.rules import (
    Bounded,
    EnergyRule,
    FixedRank,
    QuantileRule,
    RankRule,
    RatioRule,
    ResidualRule,
    ThresholdRule,
    rank_rule,
)

__all__ = [
    "Bounded",
    "EnergyRule",
    "FixedRank",
    "QuantileRule",
    "RankRule",
    "RatioRule",
    "ResidualRule",
    "ThresholdRule",
    "rank_rule",
]
