"""Compares Houlsby's bottlenecks half-folded with the same as branches, and both with the model without them.

    python benchmarks/half_fold.py                       # BERT-base's shape, bottlenecks of 64, batch 1: ten minutes
    python benchmarks/half_fold.py --layers 2 --width 32 # does it work?

Model and adapter are generated. Before anything is timed each graph is compared with torch, by export-onnx itself. The
times are `surgery bench`'s: paired, with a control of the reference against itself; each record is kept whole.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import surgery

INNER = 64  # the bottlenecks' own width
RESULTS = Path(__file__).parent / "results"
_CONFIG = Path(__file__).parent.parent / "tests/golden/bottleneck/bert/double_seq_bn/adapter_config.json"


def write_model(folder: Path, layers: int, width: int) -> Path:
    """A BERT of random weights."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    heads = max(1, width // 64)
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width
    )
    BertModel(config).save_pretrained(folder)
    return folder


def write_adapter(folder: Path, layers: int, width: int, inner: int) -> Path:
    """Bottlenecks of random weights, behind every attention and every MLP, as the library adapters saves them."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for number in range(layers):
        for place in ("attention.output", "output"):
            path = f"encoder.layer.{number}.{place}.adapters.style"
            for name, shape in (("adapter_down.0", (inner, width)), ("adapter_up", (width, inner))):
                tensors[f"{path}.{name}.weight"] = 0.02 * torch.randn(shape, generator=generator)
                tensors[f"{path}.{name}.bias"] = 0.02 * torch.randn(shape[0], generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter.safetensors")
    config = json.loads(_CONFIG.read_text())
    config["hidden_size"] = width
    config["config"]["reduction_factor"] = width / inner
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    """Exports, times, prints, and keeps the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--seconds", type=float, default=200.0, help="for each comparison")
    parser.add_argument("--keep", action="store_true", help="put the records into results/")
    options = parser.parse_args()
    inner = min(INNER, options.width // 2)
    with tempfile.TemporaryDirectory(prefix="surgery-half-fold-") as temporary:
        root = Path(temporary)
        model = write_model(root / "model", options.layers, options.width)
        adapter = write_adapter(root / "adapter", options.layers, options.width, inner)
        how: dict[str, dict[str, Any]] = {
            "base": {},
            "branch": {"adapters": [adapter], "adapters_as": "branch"},
            "half-folded": {"adapters": [adapter], "adapters_as": "half-folded"},
        }
        exported = {name: surgery.export_onnx(model, root / name / "model.onnx", **each) for name, each in how.items()}
        nodes = {name: report.nodes_run for name, report in exported.items()}
        table = Table("graph", "against", "nodes", "latency ratio", "interval", "verdict")
        for reference, graphs in (("base", ("branch", "half-folded")), ("branch", ("half-folded",))):
            day = datetime.datetime.now(datetime.UTC).date()
            record = RESULTS / f"{day}-half-fold-{options.provider}-{reference}.json" if options.keep else None
            report = surgery.bench(
                root / reference / "model.onnx",
                *(root / name / "model.onnx" for name in graphs),
                shapes=((1, options.sequence),),
                provider=options.provider,
                seconds=options.seconds,
                record=record,
                force=True,
            )
            for name, found in zip(graphs, report.comparisons, strict=True):
                low, high = found.interval
                ratio, interval = f"{found.ratio:.3f}", f"{low:.3f}–{high:.3f}"
                table.add_row(name, reference, f"{nodes[name]} : {nodes[reference]}", ratio, interval, found.verdict)
        Console().print(table)


if __name__ == "__main__":
    main()
