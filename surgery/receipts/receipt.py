"""Receipts: records of how an output was made, with hashes and content digests.

A receipt is stored in the output's metadata. It names the operation and every input tensor's BLAKE3. It also keeps the
originals of small tensors that an adapter replaced, so that unmerge can restore what subtraction cannot. This module
knows no operation's mathematics.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from formats.adapter import Adapter
from formats.errors import CorruptFile
from formats.paths import open_checkpoint
from formats.spec import DType, TensorSpec
from formats.tensors import bytes_from_tensor, tensor_from_bytes
from surgery.exact.finite import check_finite
from surgery.hashes import HASH, tensor_hash
from surgery.pipeline.threads import torch_threads
from surgery.version import __version__

if TYPE_CHECKING:
    import torch

RECEIPT = "surgery.receipt"
TOOL = f"surgery {__version__}"
UNKNOWN = "0" * 64  # placeholder for a hash, so that the header's length is known from the start
ORIGINALS_LIMIT = 8 << 20  # bytes of replaced tensors that a receipt keeps


def fingerprint(adapter: Adapter) -> tuple[str, dict[str, str]]:
    """The adapter's content digest, and the BLAKE3 of each of its tensors that takes part, by name.

    The digest also covers scalings and targets: the same tensors with another alpha are another adapter. Reads the
    adapter's payload. Raises NotFinite for NaN or Inf.
    """
    hashes: dict[str, str] = {}
    with ExitStack() as stack, torch_threads(1):
        files = {ref.checkpoint for ref in adapter.tensors}
        opened = {file: stack.enter_context(open_checkpoint(file.path)) for file in files}
        for ref in adapter.tensors:
            tensor = opened[ref.checkpoint].read(ref.name)
            if tensor.is_floating_point():
                check_finite(tensor, f"{ref.name} of {ref.checkpoint.path}")
            hashes[ref.name] = tensor_hash(tensor)
    parts: list[list[Any]] = [
        [
            *(module.target, module.method, module.kind.value, module.scaling, role, hashes[ref.name]),
            *(module.transposed, *sorted(module.settings.items())),
        ]
        for module in adapter.modules
        for role, ref in sorted(module.factors.items())
    ]
    parts += [[full.target, "full", list(full.rows), hashes[full.source.name]] for full in adapter.replacements]
    lines = sorted(json.dumps(part) for part in parts)
    return blake3("\n".join(lines).encode()).hexdigest(), hashes


@dataclass(frozen=True)
class Original:
    """A replaced tensor, kept so that it can be restored. `data` is its payload in base64."""

    dtype: str
    shape: list[int]
    data: str

    @classmethod
    def of(cls, tensor: torch.Tensor, spec: TensorSpec) -> Original:
        """Keeps a copy of a tensor."""
        data = base64.b64encode(bytes_from_tensor(tensor).tobytes()).decode()
        return cls(spec.dtype.label, list(spec.shape), data)

    @classmethod
    def unknown(cls, spec: TensorSpec) -> Original:
        """A placeholder as long as the original will be."""
        return cls(spec.dtype.label, list(spec.shape), "A" * (4 * ((spec.nbytes + 2) // 3)))

    def spec(self, name: str) -> TensorSpec:
        """The original tensor's spec."""
        return TensorSpec(name, DType[self.dtype], tuple(self.shape))

    def tensor(self, name: str) -> torch.Tensor:
        """The original tensor."""
        payload = np.frombuffer(bytearray(base64.b64decode(self.data)), dtype=np.uint8)
        return tensor_from_bytes(payload, self.spec(name))


@dataclass(frozen=True)
class MergedAdapter:
    """One adapter of a merge.

    Attributes:
        digest: its content digest, which covers scalings.
        weight: the factor with which it was merged.
        tensors: BLAKE3 of each of its tensors that took part, by name.
    """

    digest: str
    weight: float
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class Receipt:
    """The record of one merge or fold.

    Attributes:
        operation: "merge", or "fold", which cannot be undone.
        tool: name and version of the program that did it.
        adapters: all adapters that were merged at once, sorted by digest.
        base_tensors: BLAKE3 of the payload of each of the base's tensors, by name.
        added: tensors that unmerge leaves out, because the base did not have them, or has them under another name too.
        originals: base tensors that were replaced, kept whole.
        lost: base tensors that were replaced and too large to keep.
        base_metadata: the base's own metadata, including an earlier receipt.
        renamed: the base's name of each tensor that it has under another name.
        dtype: dtype in which all weights were stored; empty if each kept its own.
        dtypes: original dtypes of the base's tensors that were stored in another dtype, by name.
        scaled: for float8 weights of the base that were merged into or dequantised: the name of their scales, and the
            rows and columns of a block.
        config: the base's config.json, if the output's differs in more than the size of the vocabulary.
    """

    operation: str
    tool: str
    adapters: tuple[MergedAdapter, ...]
    base_tensors: Mapping[str, str]
    added: tuple[str, ...] = ()
    originals: Mapping[str, Original] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    base_metadata: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    dtype: str = ""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    scaled: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)
    config: str = ""

    def metadata(self) -> dict[str, str]:
        """The output's metadata: the base's own with this receipt."""
        return {**self.base_metadata, RECEIPT: self.text}

    @property
    def text(self) -> str:
        """The receipt as JSON, as it is stored."""
        return json.dumps({"hash": HASH, **asdict(self)}, sort_keys=True, separators=(",", ":"))

    @property
    def digests(self) -> tuple[str, ...]:
        """The content digests of the adapters."""
        return tuple(merged.digest for merged in self.adapters)

    @classmethod
    def read(cls, metadata: Mapping[str, str], where: object) -> Receipt | None:
        """The receipt in a file's metadata; None if there is none. Raises CorruptFile if it cannot be read."""
        return cls.parse(metadata[RECEIPT], where) if RECEIPT in metadata else None

    @classmethod
    def parse(cls, text: str, where: object) -> Receipt:
        """Parses a receipt's JSON. Raises CorruptFile if it cannot be read."""
        try:
            document: dict[str, Any] = json.loads(text)
            if (found := document.pop("hash", "none")) != HASH:
                raise ValueError(f"hash {found}")
            document["adapters"] = tuple(MergedAdapter(**merged) for merged in document["adapters"])
            document["originals"] = {name: Original(**kept) for name, kept in document["originals"].items()}
            document["added"], document["lost"] = tuple(document["added"]), tuple(document["lost"])
            return cls(**document)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFile(
                "the file's receipt is not one of ours",
                where=where,
                found=f"{type(error).__name__}: {error}",
                then="it may come from another version of surgery: use that version",
            ) from error

    def chain(self, where: object) -> list[Receipt]:
        """This receipt and the earlier ones that it contains, the latest first."""
        earlier = Receipt.read(self.base_metadata, where)
        return [self, *(earlier.chain(where) if earlier else ())]
