"""Finds the config from which peft rebuilds factors of LoHa or LoKr with the right shapes.

In peft the shapes follow from a few settings. Tested against peft itself. This module does no mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from formats.adapter import Adapter, AdapterModule
from formats.dialects.peft_writing import commonest, pattern_of, target_names
from formats.dialects.writing import cannot
from formats.layers import LayerKind, ancestors, owner
from formats.spec import TensorSpec

_SAME = {"rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True, "inference_mode": True, "task_type": None}


def kronecker_config(method: str, adapter: Adapter, base: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """The adapter_config.json of an adapter whose layers all have LoHa, or all LoKr.

    Raises:
        AdapterFormatError: no settings make peft build a layer's factors in these shapes.
    """
    for module in adapter.modules:
        if module.kind not in (LayerKind.LINEAR, LayerKind.CONV):
            raise cannot("peft", "layers that are neither linear nor a convolution", module)
    if method == "lokr":
        settings, ranks = _lokr_settings(adapter, base)
    else:
        settings, ranks = {}, {owner(module.target): module.rank for module in adapter.modules}
    alphas = {owner(module.target): module.scaling * ranks[owner(module.target)] for module in adapter.modules}
    cores = {"hada_t1", "lokr_t2"}
    several = [module for module in adapter.modules if len(base[module.target].shape) > 2 and _has_kernel(module, base)]
    effective = {bool(cores & module.factors.keys()) for module in several if "lokr_w2" not in module.factors}
    if len(effective) > 1:
        raise cannot("peft", "a core on some convolutions and not on others", several[0])
    holders = {owner(name) for name in base}
    rank, alpha = commonest(ranks.values()), commonest(alphas.values())
    return {
        "peft_type": method.upper(),
        **_SAME,
        "r": rank,
        "alpha": alpha,
        "rank_pattern": pattern_of(ranks, rank),
        "alpha_pattern": pattern_of(alphas, alpha),
        "target_modules": target_names(sorted(ranks), frozenset(holders.union(*map(ancestors, holders)))),
        "use_effective_conv2d": effective == {True},
        **settings,
    }


def _has_kernel(module: AdapterModule, base: Mapping[str, TensorSpec]) -> bool:
    return math.prod(base[module.target].shape[2:]) > 1


@dataclass(frozen=True)
class _Split:
    """How one layer's LoKr is split: w1 (a, c) and w2 (b, d), each whole or a product of two factors."""

    module: AdapterModule
    first: tuple[int, int]
    second: tuple[int, int]
    whole: tuple[bool, bool]

    @classmethod
    def of(cls, module: AdapterModule, weight: TensorSpec) -> _Split:
        shapes = {role: ref.spec.shape for role, ref in module.factors.items()}
        whole = ("lokr_w1" in shapes, "lokr_w2" in shapes)
        first = shapes["lokr_w1"] if whole[0] else (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
        out, into = weight.shape[:2]
        return cls(module, (first[0], first[1]), (out // first[0], into // first[1]), whole)

    def rank(self, both: bool) -> int | None:
        """The rank with which peft splits the layer in this way; None if there is none."""
        least = max(self.second) / 2  # from this rank on, peft keeps w2 whole
        low = max(self.first) / 2  # and w1, even with decompose_both
        rank = self.module.rank
        if all(self.whole):
            rank = math.ceil(max(least, low if both else 0, 1))
        fits = self.whole == (not (both and rank < low), rank >= least)
        return rank if fits else None


def _lokr_settings(adapter: Adapter, base: Mapping[str, TensorSpec]) -> tuple[dict[str, Any], dict[str, int]]:
    splits = [_Split.of(module, base[module.target]) for module in adapter.modules]
    factors = [-1, *sorted({side for split in splits for side in (*split.first, *split.second)})]
    for both, factor in ((both, factor) for both in (False, True) for factor in factors):
        ranks = {owner(split.module.target): rank for split in splits if (rank := split.rank(both)) is not None}
        if len(ranks) == len(splits) and all(_builds(split, factor) for split in splits):
            return {"decompose_both": both, "decompose_factor": factor}, ranks
    raise cannot(
        "peft", "LoKr's factors in these sizes: it splits weights by one rule for all layers", splits[0].module
    )


def _builds(split: _Split, factor: int) -> bool:
    """Whether peft's rule splits both sides of the weight in this way."""
    sides = zip(split.first, split.second, strict=True)
    return all(_factorization(one * other, factor) == (one, other) for one, other in sides)


def _factorization(dimension: int, factor: int) -> tuple[int, int]:
    """peft.tuners.lokr.layer.factorization: splits a dimension into two divisors, the first near `factor`, or both near
    the square root."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    divisors = [each for each in range(1, dimension + 1) if dimension % each == 0]
    first, second = 1, dimension
    for each in divisors[1:]:
        if first >= second or each + dimension // each > first + second or each > limit:
            break
        first, second = each, dimension // each
    return min(first, second), max(first, second)
