"""Which name of a tied tensor is kept in a file that holds every tensor once.

transformers' save_pretrained writes a tied weight only under the name that the others are tied to, and from_pretrained
ties them again where config.json says so. Without config.json a dropped name could not be restored, so all names stay.
Knows names only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_EMBEDDING = re.compile(r"(^|[._])(w[tp]e|shared|tok\w*|\w*embed\w*)([._]|$)")
_OUTPUT = re.compile(r"out|unembed|head|predict")


def kept_once(shared: Iterable[Sequence[str]], config: Mapping[str, Any]) -> dict[str, str]:
    """The names to leave out, each with the name that it is tied to.

    Args:
        shared: groups of names that stand for one tensor.
        config: the model's config.json. Its `tie_word_embeddings` defaults to true, as in transformers. If there is no
            config, pass an empty one: then nothing is left out.

    The name of the input embedding is kept. If there are several, the shortest is kept: in T5, encoder.embed_tokens and
    lm_head are tied to shared. A group without an embedding keeps all its names, because `tie_word_embeddings` is not
    what ties it.
    """
    tied = config.get("tie_word_embeddings", True) is True and ("architectures" in config or "model_type" in config)
    left: dict[str, str] = {}
    for names in shared if tied else ():
        inputs = [name for name in names if _EMBEDDING.search(name) and not _OUTPUT.search(name)]
        embeddings = sorted(inputs, key=lambda name: (len(name), name))
        if embeddings:
            left |= {name: embeddings[0] for name in names if name != embeddings[0]}
    return left
