"""Choosing ranks: by a rule for each weight, or by a size budget for all. The rules are public as `surgery.ranks`."""

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
