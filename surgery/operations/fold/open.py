"""What fold opens: the parts of an adapter that is more than a change of weights, and their fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

from blake3 import blake3

from formats.checkpoint import Checkpoint
from formats.dialects import open_adapter_file
from formats.dialects.adapterhub_beside import Part, lies_beside, read_beside
from formats.dialects.adapterhub_heads import open_head, read_head
from surgery.errors import NotMergeable
from surgery.exact.finite import check_finite
from surgery.hashes import content_digest, tensor_hash
from surgery.model.config import model_config
from surgery.operations.merge.adapters import refuse_grafted
from surgery.receipts.receipt import MergedAdapter

# Files beside, or in place of, a single adapter: compositions, whose result depends on how the input weighs them.
_COMPOSED = {
    "adapter_fusion_config.json": "AdapterFusion attends over its adapters: their weights depend on the input",
    "adapter_setup.json": "a composition (stack, fuse, parallel …) of adapters is no single one",
}


def open_parts(model: str | Path, adapter: str | Path, base: Checkpoint) -> tuple[Part, ...] | None:
    """What an adapter adds beside the base's weights; None for one that is a change of weights.

    Raises:
        NotMergeable: a composition of adapters, or a model that has parts of an earlier adapter in its graph.
        FormatError: as `read_beside`.
    """
    for name, reason in _COMPOSED.items():
        if (Path(adapter) / name).exists():
            raise NotMergeable(reason, where=Path(adapter) / name, then="fold the adapters it consists of, one by one")
    refuse_grafted(model)
    checkpoint, config = open_adapter_file(adapter)
    with checkpoint:
        if config is None or not lies_beside(config):
            return None
        parts = read_beside(checkpoint, config, base.specs)
    head = read_head(Path(adapter), base.specs, model_config(model))
    return parts if head is None else (*parts, head)


def fingerprint_beside(adapter: str | Path) -> MergedAdapter:
    """The record of an adapter that is no change of weights: its digest covers its config too. Reads its payload.

    Raises NotFinite.
    """
    checkpoint, config = open_adapter_file(adapter)
    hashes: dict[str, str] = {}
    with checkpoint:
        hashes |= {name: _hash(checkpoint, name) for name in checkpoint.specs}
        content = content_digest((spec, hashes[name]) for name, spec in checkpoint.specs.items())
    head = open_head(Path(adapter))
    if head is not None:
        with head[0] as tensors:
            own = {name: _hash(tensors, name) for name in tensors.specs}
            hashes |= {f"head {name}": each for name, each in own.items()}
            content += content_digest((spec, own[name]) for name, spec in tensors.specs.items())
    said = json.dumps([content, config], sort_keys=True)
    return MergedAdapter(blake3(said.encode()).hexdigest(), 1.0, hashes)


def _hash(checkpoint: Checkpoint, name: str) -> str:
    tensor = checkpoint.read(name)
    if tensor.is_floating_point():
        check_finite(tensor, f"{name} of {checkpoint.ref.path}")
    return tensor_hash(tensor)
