"""Compares Houlsby's bottlenecks half-folded with the same as branches, and both with the model without them.

    python benchmarks/half_fold.py                            # BERT-base's shape, bottlenecks of 64, 1 × 128: 10 min
    python benchmarks/half_fold.py --layers 6 --width 384 --sequence 8 --sequence 16 --sequence 32     # MiniLM's shape
    python benchmarks/half_fold.py --layers 2 --width 32      # does it work?

Model and adapter are generated. Before anything is timed each graph is compared with torch, by export-onnx itself. The
times are `surgery bench`'s: paired, with a control of the reference against itself; each record is kept whole.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import report
import session
from adapter_files import BOTH, Maker
from report import Sheet

import surgery

INNER = 64  # the bottlenecks' own width
RESULTS = Path(__file__).parent / "results"


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


def main() -> None:
    """Exports, times, prints, and keeps the records and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--sequence", type=int, action="append", help="several times; each in a batch of 1 [128]")
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--threads", type=int, help="of each session [the runtime's choice]")
    parser.add_argument("--margin", type=float, default=0.01, help="the difference that does not matter [%(default)s]")
    parser.add_argument("--seconds", type=float, default=200.0, help="for each comparison [%(default)s]")
    parser.add_argument("--keep", action="store_true", help="put records and table into results/")
    options = parser.parse_args()
    inner = min(INNER, options.width // 2)
    sequences = options.sequence or [128]
    conditions = session.conditions({})
    alone = [f"{options.threads}-threads"] if options.threads else []
    size = f"{options.layers}x{options.width}"
    name = "-".join([conditions["date"], "half-fold", options.provider, size, *alone])
    rows, kept = list[tuple[str, ...]](), []
    with tempfile.TemporaryDirectory(prefix="surgery-half-fold-") as temporary, contextlib.chdir(temporary):
        model = write_model(Path("model"), options.layers, options.width)
        adapter = Maker.of(model).bottlenecks(Path("adapter"), "double_seq_bn", BOTH, inner)
        how: dict[str, dict[str, Any]] = {
            "base": {},
            "branch": {"adapters": [adapter], "adapters_as": "branch"},
            "half-folded": {"adapters": [adapter], "adapters_as": "half-folded"},
        }
        graphs = {each: f"{each}/model.onnx" for each in how}
        nodes = {each: surgery.export_onnx(model, graphs[each], **how[each]).graphs[0].nodes_run for each in how}
        for reference, others in (("base", ("branch", "half-folded")), ("branch", ("half-folded",))):
            kept.append(f"{name}-{reference}.json")
            found = surgery.bench(
                graphs[reference],
                *(graphs[each] for each in others),
                shapes=[(1, sequence) for sequence in sequences],
                margin=options.margin,
                provider=options.provider,
                threads=options.threads,
                seconds=options.seconds,
                record=kept[-1],
            )
            if options.keep:
                shutil.copy(kept[-1], RESULTS)
            for compared in found.comparisons:
                each = Path(compared.graph).parent.name
                shape = " × ".join(map(str, compared.shape))
                counts = f"{nodes[each]} : {nodes[reference]}"
                ratio, interval = f"{compared.ratio:.3f}", "{:.3f} – {:.3f}".format(*compared.interval)
                milliseconds = f"{1e3 * compared.latency_reference:.3g}"
                rows.append((shape, each, reference, milliseconds, counts, ratio, interval, compared.verdict))
    title = f"Houlsby's bottlenecks of {inner} in a BERT of {options.layers} layers, width {options.width}"
    heads = ("shape", "graph", "against", "that one, ms", "nodes run", "latency ratio", "interval", "verdict")
    sheets = [Sheet(title, heads, sorted(rows, key=lambda row: sequences.index(int(row[0].split()[-1]))))]
    remarks = [
        f"{conditions['date']}, commit {conditions['commit'] or 'unknown'}; {session.machine(conditions)}",
        f"{found.provider}, threads: {options.threads or 'its choice'}; a margin of {100 * found.margin:g} %; every "
        "graph was compared with torch before",
        ", ".join(f"{package} {version}" for package, version in found.versions.items()),
    ]
    report.show(sheets, remarks)
    if options.keep:
        settings = [
            f"--{each} {getattr(options, each)}" for each in ("layers", "width", "provider", "margin", "seconds")
        ]
        settings += [f"--threads {options.threads}"] if options.threads else []
        said = " ".join([*(f"--sequence {sequence}" for sequence in sequences), *settings])
        commands = {f"every block: {', '.join(kept)}": f"python benchmarks/half_fold.py {said} --keep"}
        (RESULTS / f"{name}.md").write_text(report.as_markdown(sheets, commands, remarks), encoding="utf-8")


if __name__ == "__main__":
    main()
