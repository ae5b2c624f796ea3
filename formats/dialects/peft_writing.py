"""Writing peft's names and config. Tested against peft itself.

Gives the keys and the config for which peft rebuilds exactly the modules that were adapted; `peft` is the way back.
Knows no mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from formats.dialects.peft import PREFIX, first_match
from formats.layers import LayerKind


def factor_keys(module: str, kind: LayerKind) -> tuple[str, str]:
    """The keys of a module's lora_A and lora_B."""
    a, b = (
        ("lora_embedding_A", "lora_embedding_B") if kind is LayerKind.EMBEDDING else ("lora_A.weight", "lora_B.weight")
    )
    return f"{PREFIX}{module}.{a}", f"{PREFIX}{module}.{b}"


def full_key(tensor: str, *, adapted: bool) -> str:
    """The key of a tensor carried in full; `adapted` if its module's weight has factors of its own."""
    module, _, last = tensor.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{last}" if adapted else f"{PREFIX}{tensor}"


@dataclass(frozen=True)
class Extracted:
    """What a config must describe: every module's rank, what goes along in full, and how the base is built."""

    ranks: Mapping[str, int]  # adapted modules; the scaling is 1, so alpha is the rank
    saved: tuple[str, ...]  # modules carried in full
    biases: bool  # whether biases are carried in full
    transposed: bool  # whether adapted layers store (in, out)
    modules: frozenset[str]  # every module of the model
    rank: int
    base: str


def lora_config(extracted: Extracted) -> dict[str, Any]:
    """The adapter_config.json for which peft rebuilds exactly these modules."""
    targets = sorted(extracted.ranks)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": extracted.base,
        "inference_mode": True,
        "r": extracted.rank,
        "lora_alpha": extracted.rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": extracted.transposed,
        "bias": "all" if extracted.biases else "none",
        "target_modules": _targets(targets, extracted.modules),
        "modules_to_save": list(extracted.saved) or None,
        "rank_pattern": _rank_pattern(extracted),
        "init_lora_weights": True,
    }
    config["alpha_pattern"] = dict(config["rank_pattern"])
    return config


def _targets(targets: list[str], modules: frozenset[str]) -> list[str] | str:
    """Full names; a regular expression where a name is also the tail of a module that was not adapted."""
    stray = caught_by_tail(targets, modules)
    return "|".join(re.escape(target) for target in targets) if stray or not targets else targets


def caught_by_tail(names: Iterable[str], modules: Iterable[str]) -> set[str]:
    """Modules outside `names` whose dotted tail is one of them: peft, which matches tails, would take them too."""
    chosen = set(names)
    caught = set()
    for module in set(modules) - chosen:
        tail = module
        while "." in tail:
            tail = tail.partition(".")[2]
            if tail in chosen:
                caught.add(module)
    return caught


def _rank_pattern(extracted: Extracted) -> dict[str, int]:
    """Modules whose rank is not the common one, longest name first: peft takes the first pattern that matches a
    tail, so whoever would be caught by another's pattern gets one of its own before it."""
    pattern = {module: rank for module, rank in extracted.ranks.items() if rank != extracted.rank}
    caught = {
        module: rank
        for module, rank in extracted.ranks.items()
        if module not in pattern and first_match(pattern, module, rank) != rank
    }
    ordered = sorted((pattern | caught).items(), key=lambda item: (-len(item[0]), item[0]))
    return {re.escape(module): rank for module, rank in ordered}
