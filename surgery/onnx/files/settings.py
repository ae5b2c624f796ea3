"""The settings on which a graph depends besides its tensors: config.json's heads, activations, epsilons, windows.

They are stored in the graph, so that it can be used with other weights later without tracing: names and shapes alone
cannot distinguish four heads from eight. This module knows neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

SETTINGS, TIES = "surgery.config", "surgery.ties"  # keys of the graph's metadata
# Settings that do not affect the computation: where a model comes from, names of labels, how it was trained, and the
# dtype, which the tensors give.
_WITHOUT_EFFECT = (
    "_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "id2label",
    "label2id", "problem_type", "task_specific_params", "finetuning_task", "*dropout*", "initializer_*", "init_std",
    "gradient_checkpointing", "model_max_length", "return_dict", "output_attentions", "output_hidden_states",
    "tokenizer_class",
)  # fmt: skip


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, including its parts, without settings that do not affect the graph."""
    return {
        key: settings_of(value) if isinstance(value, Mapping) else value
        for key, value in sorted(config.items())
        if not any(fnmatchcase(key, pattern) for pattern in _WITHOUT_EFFECT)
    }


def as_text(value: Any) -> str:
    """JSON text that is always the same for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterable[str]:
    """The settings that differ, each as `name: ours, theirs`."""
    for key in sorted(ours.keys() | theirs.keys()):
        one, other = (json.dumps(each[key]) if key in each else "nothing" for each in (ours, theirs))
        if one != other:
            yield f"{key}: {one}, {other}"
