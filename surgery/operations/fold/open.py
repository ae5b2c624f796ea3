"""Opens the adapters that fold takes, if they are more than a change of weights, and computes their fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

from blake3 import blake3

from formats.checkpoint import Checkpoint
from formats.dialects import AdapterFile, open_adapter_file
from formats.dialects.adapterhub_beside import Part, lies_beside, read_beside
from formats.dialects.adapterhub_heads import open_head, read_head
from formats.open_files import OpenFiles
from surgery.errors import NotMergeable
from surgery.exact.finite import check_finite
from surgery.hashes import content_digest, tensor_hash
from surgery.model.base_model import BaseModel
from surgery.operations.merge.adapters import refuse_grafted
from surgery.receipts.receipt import MergedAdapter

# Files of compositions of adapters; the input decides how they are weighed.
_COMPOSED = {
    "adapter_fusion_config.json": "AdapterFusion attends over its adapters, so their weights depend on the input",
    "adapter_setup.json": "this is a composition (stack, fuse, parallel …) of adapters, not a single adapter",
}


def refuse_composed(adapter: Path) -> None:
    """Raises NotMergeable for a composition of adapters, whose folder may hold no file that can be opened."""
    for name, reason in _COMPOSED.items():
        if (adapter / name).exists():
            raise NotMergeable(reason, where=adapter / name, then="fold its adapters one by one")


def open_single(adapter: Path, files: OpenFiles) -> AdapterFile:
    """Opens a single adapter of any kind. Raises as `refuse_composed`, `open_adapter_file`."""
    refuse_composed(adapter)
    return open_adapter_file(adapter, files)


def open_parts(model: BaseModel, adapter: AdapterFile) -> tuple[Part, ...] | None:
    """The parts that an adapter adds besides changes of weights; None if it only changes weights.

    Raises:
        NotMergeable: the model has parts of an earlier adapter in its graph.
        FormatError: as `read_beside`.
    """
    refuse_grafted(model.path)
    if adapter.config is None or not lies_beside(adapter.config):
        return None
    parts = read_beside(adapter.checkpoint, adapter.config, model.specs)
    head = read_head(adapter.path, model.specs, model.config, adapter.files)
    return parts if head is None else (*parts, head)


def fingerprint_beside(adapter: AdapterFile) -> MergedAdapter:
    """The record of an adapter that is not a change of weights. Its digest covers its config too. Reads its payload.

    Raises NotFinite.
    """
    checkpoint = adapter.checkpoint
    hashes = {name: _hash(checkpoint, name) for name in checkpoint.specs}
    content = content_digest((spec, hashes[name]) for name, spec in checkpoint.specs.items())
    head = open_head(adapter.path, adapter.files)
    if head is not None:
        own = {name: _hash(head[0], name) for name in head[0].specs}
        hashes |= {f"head {name}": each for name, each in own.items()}
        content += content_digest((spec, own[name]) for name, spec in head[0].specs.items())
    said = json.dumps([content, adapter.config], sort_keys=True)
    return MergedAdapter(blake3(said.encode()).hexdigest(), 1.0, hashes)


def _hash(checkpoint: Checkpoint, name: str) -> str:
    tensor = checkpoint.read(name)
    if tensor.is_floating_point():
        check_finite(tensor, f"{name} of {checkpoint.ref.path}")
    return tensor_hash(tensor)
