"""inspect: shows what a file or folder holds, from headers alone. Does not load torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.dialects import open_adapter_file, recognised
from formats.open_files import OpenFiles
from formats.paths import container_of
from formats.spec import TensorSpec
from surgery.pipeline.job import header
from surgery.pipeline.plan import Plan
from surgery.receipts.receipt import RECEIPT, Receipt
from surgery.report import Report, Stopwatch


@dataclass(frozen=True, kw_only=True)
class InspectReport(Report):
    """What a path holds. Nothing is written, so the ledger is empty.

    Attributes:
        path: the path as given.
        kind: "model" or "adapter".
        container: "safetensors" or "torch", with the number of shards if there are several: "safetensors, 3 shards".
        parameters: number of elements in all tensors.
        nbytes: size of the payload in bytes.
        dtypes: number of parameters by dtype.
        metadata: the container's metadata, without receipt and config.
        adapter: dialect and settings of an adapter; None for a model.
        merged: content digests of the adapters that were merged according to the receipts, latest first.
        tensors: every tensor, in the file's order.
    """

    path: str
    kind: str
    container: str
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    metadata: Mapping[str, str]
    adapter: Mapping[str, Any] | None
    merged: tuple[str, ...]
    tensors: tuple[TensorSpec, ...]


def inspect(path: str | Path) -> InspectReport:
    """Reads headers and config of a model or an adapter.

    Raises:
        PathNotFound, NotACheckpoint, CorruptFile: see formats.errors.
    """
    watch = Stopwatch()
    with OpenFiles() as files:
        file = open_adapter_file(path, files)
        checkpoint = file.checkpoint
        specs = tuple(checkpoint.specs.values())
        dtypes: dict[str, int] = {}
        for spec in specs:
            dtypes[spec.dtype.label] = dtypes.get(spec.dtype.label, 0) + spec.size
        dialect, errors = recognised(checkpoint, file.config)
        broken = tuple(f"{error.what}: {error.details.get('found')}" for error in errors)
        receipt = Receipt.read(checkpoint.metadata, path)
        return InspectReport(
            **{**header(Plan("inspect", (), notes=(*checkpoint.notes, *broken)), watch, None), "ledger": {}},
            path=str(path),
            kind="adapter" if dialect else "model",
            container=container_of(checkpoint),
            parameters=sum(spec.size for spec in specs),
            nbytes=sum(spec.nbytes for spec in specs),
            dtypes=dtypes,
            metadata={key: text for key, text in checkpoint.metadata.items() if key != RECEIPT and len(text) < 200},
            adapter={"dialect": dialect.name, **dialect.described(file.config)} if dialect else None,
            merged=tuple(digest for past in receipt.chain(path) for digest in past.digests) if receipt else (),
            tensors=specs,
        )
