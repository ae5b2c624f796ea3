"""BLAKE3 hashes of payloads and tensors, and content digests over them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from blake3 import blake3

from formats.spec import TensorSpec
from formats.tensors import Bytes, bytes_from_tensor

if TYPE_CHECKING:
    import torch


HASH = "blake3"  # the hash function of everything that a receipt names


def new_hash() -> blake3:
    """Returns a new BLAKE3 hasher (O'Connor et al., 2020), which is several times as fast as SHA-256."""
    return blake3()


def payload_hash(payload: Bytes) -> str:
    """BLAKE3 of a payload, in hex."""
    return blake3(payload.data).hexdigest()


def tensor_hash(tensor: torch.Tensor) -> str:
    """BLAKE3 of the tensor's payload as stored, in hex."""
    return payload_hash(bytes_from_tensor(tensor))


def content_digest(tensors: Iterable[tuple[TensorSpec, str]]) -> str:
    """Hashes (spec, payload hash) of all tensors; the digest does not depend on their sharding or order."""
    lines = sorted(json.dumps([spec.name, spec.dtype.label, list(spec.shape), payload]) for spec, payload in tensors)
    return blake3("\n".join(lines).encode()).hexdigest()
