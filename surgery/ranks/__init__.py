"""Ranks: the rules that choose them, and what a budget buys. The rules are public as `surgery.ranks`."""

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
