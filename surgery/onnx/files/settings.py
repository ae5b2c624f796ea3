"""The settings that a graph depends on besides its tensors: config.json's heads, activations, epsilons, windows.

The graph stores them, so that it can later be used with other weights without tracing: names and shapes alone do not
distinguish four heads from eight. Needs neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

SETTINGS, TIES = "surgery.config", "surgery.ties"  # keys of the graph's metadata
# Settings with no effect on the computation: a model's origin, its label names, its training, and the dtype, which the
# tensors define.
_WITHOUT_EFFECT = (
    "_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "id2label",
    "label2id", "problem_type", "task_specific_params", "finetuning_task", "*dropout*", "initializer_*", "init_std",
    "gradient_checkpointing", "model_max_length", "return_dict", "output_attentions", "output_hidden_states",
    "tokenizer_class",
)  # fmt: skip


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without settings that have no effect on the graph, also for the parts of the model."""
    return {
        key: settings_of(value) if isinstance(value, Mapping) else value
        for key, value in sorted(config.items())
        if not any(fnmatchcase(key, pattern) for pattern in _WITHOUT_EFFECT)
    }


def as_text(value: Any) -> str:
    """The value as JSON; equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterable[str]:
    """The settings that differ, each as `name: ours, theirs`."""
    for key in sorted(ours.keys() | theirs.keys()):
        one, other = (json.dumps(each[key]) if key in each else "nothing" for each in (ours, theirs))
        if one != other:
            yield f"{key}: {one}, {other}"
