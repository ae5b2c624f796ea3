"""Records in an output how it was made: hashes, content digests, receipts.

A receipt is stored in the output's metadata. It holds the operation, the BLAKE3 of every input tensor, and the
originals of small tensors that an adapter replaced: unmerge restores these, since subtraction cannot.
Knows no operation's mathematics.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from formats.adapter import Adapter
from formats.errors import CorruptFile
from formats.open_files import OpenFiles
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
UNKNOWN = "0" * 64  # placeholder for a hash that is not known yet, so that the header's length is known from the start
ORIGINALS_LIMIT = 8 << 20  # bytes of replaced tensors that a receipt keeps


def fingerprint(adapter: Adapter, files: OpenFiles) -> tuple[str, dict[str, str]]:
    """The adapter's content digest, and the BLAKE3 of each of its tensors that is used, by name.

    The digest also covers scalings and targets: the same tensors with another alpha are another adapter. Reads the
    adapter's payload. Raises NotFinite.
    """
    hashes: dict[str, str] = {}
    with torch_threads(1):
        for ref in adapter.tensors:
            tensor = files.of(ref.checkpoint).read(ref.name)
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
    """A replaced tensor, kept so that unmerge can restore it. `data` is its payload in base64."""

    dtype: str
    shape: list[int]
    data: str

    @classmethod
    def of(cls, tensor: torch.Tensor, spec: TensorSpec) -> Original:
        """Encodes a tensor."""
        data = base64.b64encode(bytes_from_tensor(tensor).tobytes()).decode()
        return cls(spec.dtype.label, list(spec.shape), data)

    @classmethod
    def unknown(cls, spec: TensorSpec) -> Original:
        """A placeholder as long as the encoded original."""
        return cls(spec.dtype.label, list(spec.shape), "A" * (4 * ((spec.nbytes + 2) // 3)))

    def spec(self, name: str) -> TensorSpec:
        """The spec of the original tensor."""
        return TensorSpec(name, DType[self.dtype], tuple(self.shape))

    def tensor(self, name: str) -> torch.Tensor:
        """The original tensor."""
        payload = np.frombuffer(bytearray(base64.b64decode(self.data)), dtype=np.uint8)
        return tensor_from_bytes(payload, self.spec(name))


@dataclass(frozen=True)
class MergedAdapter:
    """One adapter of a merge: its content digest, scalings included; the weight with which it was merged; the BLAKE3
    of each of its tensors that was used, by name."""

    digest: str
    weight: float
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class Receipt:
    """The record of one merge or fold.

    Attributes:
        operation: "merge", or "fold", which cannot be undone.
        tool: name and version of the program that wrote the output.
        adapters: the adapters merged in this operation, ordered by digest.
        base_tensors: BLAKE3 of the payload of every base tensor, by name.
        added: tensors that unmerge drops: the base lacks them, or stores them under another name too.
        originals: base tensors that were replaced and are kept in full.
        lost: base tensors that were replaced and are too large to keep.
        base_metadata: the base's metadata, including an earlier receipt.
        renamed: output name → base name, for tensors stored under another name.
        dtype: the dtype in which all weights were stored; empty if each kept its own.
        dtypes: the base dtype of every tensor that was stored in another dtype, by name.
        scaled: float8 base weights that were merged into or dequantised → name of the scales, block size.
        config: the base's config.json, if the output's differs in more than the vocabulary's size.
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
        """The output's metadata: the base's metadata with this receipt."""
        return {**self.base_metadata, RECEIPT: self.text}

    @property
    def text(self) -> str:
        """The receipt as JSON."""
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
        """Parses a receipt. Raises CorruptFile if it cannot be read."""
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
                "the file's receipt cannot be read",
                where=where,
                found=f"{type(error).__name__}: {error}",
                then="use the version of surgery that wrote the file",
            ) from error

    def chain(self, where: object) -> list[Receipt]:
        """This receipt and the earlier ones stored in it, latest first."""
        earlier = Receipt.read(self.base_metadata, where)
        return [self, *(earlier.chain(where) if earlier else ())]
