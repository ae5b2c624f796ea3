"""What a graph depends on besides its tensors: config.json's heads, activations, epsilons, windows.

They stand in the graph itself, so that weights can later be put under it without tracing: names and shapes alone do not
tell four heads from eight. Knows neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

SETTINGS, TIES = "surgery.config", "surgery.ties"  # keys of the graph's metadata
# What does not change what is computed: where a model comes from, what its labels are called, how it was trained, and
# the dtype, which the tensors tell.
_WITHOUT_EFFECT = (
    "_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "id2label",
    "label2id", "problem_type", "task_specific_params", "finetuning_task", "*dropout*", "initializer_*", "init_std",
    "gradient_checkpointing", "model_max_length", "return_dict", "output_attentions", "output_hidden_states",
    "tokenizer_class",
)  # fmt: skip


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what has no effect on the graph, parts of the model included."""
    return {
        key: settings_of(value) if isinstance(value, Mapping) else value
        for key, value in sorted(config.items())
        if not any(fnmatchcase(key, pattern) for pattern in _WITHOUT_EFFECT)
    }


def as_text(value: Any) -> str:
    """JSON, the same for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterable[str]:
    """The settings that are not the same, each as `name: ours, theirs`."""
    for key in sorted(ours.keys() | theirs.keys()):
        one, other = (json.dumps(each[key]) if key in each else "nothing" for each in (ours, theirs))
        if one != other:
            yield f"{key}: {one}, {other}"
