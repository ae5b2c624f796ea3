"""The LoRA paper's Table 1 (Hu et al. 2021, arXiv 2106.09685): what do adapters add to one forward pass?

    python benchmarks/lora_table1.py --provider cuda --dtype float32                # the paper's shapes; a GPU
    python benchmarks/lora_table1.py --provider cuda --dtype float16 --cuda-graph
    python benchmarks/lora_table1.py                                                # a CPU: smaller shapes
    python benchmarks/lora_table1.py --quick                                        # a tiny model: does it work?

GPT-2 medium's shape with random weights, five graphs, and every one of the others against the base by `surgery bench`:
paired blocks, an interval, a verdict against a margin. Before that: each graph must compute what torch computes, the
merged one's file must be the base's byte for byte, and merged and branch must agree.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import report
import session
from report import Sheet

from formats.errors import ReportedError

if TYPE_CHECKING:
    from adapted_gpt2 import Built

    from surgery.onnx.timing.record import BenchReport, Comparison

Shape = tuple[int, int]
# milliseconds, and the slow-down in per cent, as printed; fine-tuning and merged LoRA are one row there
PAPER: dict[Shape, dict[str, tuple[float, float]]] = {
    (32, 512): {
        "base": (1449.4, 0.0),
        "LoRA, merged": (1449.4, 0.0),
        "AdapterL": (1482.0, 2.2),
        "AdapterH": (1492.2, 3.0),
    },
    (16, 256): {"base": (338.0, 0.0), "LoRA, merged": (338.0, 0.0), "AdapterL": (354.8, 5.0), "AdapterH": (366.3, 8.4)},
    (1, 128): {"base": (19.8, 0.0), "LoRA, merged": (19.8, 0.0), "AdapterL": (23.9, 20.7), "AdapterH": (25.8, 30.3)},
}
CPU_SHAPES: list[Shape] = [(1, 32), (1, 128)]
QUICK_SHAPES: list[Shape] = [(1, 16)]
_THEIRS = "theirs: one forward pass of GPT-2 medium on a Quadro RTX 8000, the mean of 100"


def main() -> None:
    options = parser().parse_args()
    with session.work_folder(options.work) as work:
        try:
            run(options, work)
        except (session.WrongAnswer, ReportedError) as error:
            sys.exit(f"lora_table1: {error}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--layers", type=int, default=24, help="of the model [%(default)s]")
    made.add_argument(
        "--shape",
        type=_shape,
        action="append",
        help="batch x length; several times [the paper's; 1x32 and 1x128 on a CPU]",
    )
    made.add_argument("--margin", type=float, default=0.02, help="the difference that does not matter [%(default)s]")
    made.add_argument("--seconds", type=float, default=600.0, help="for each graph and shape, at most [%(default)s]")
    session.add_latency_options(made)
    return made


def _shape(text: str) -> Shape:
    batch, _, length = text.partition("x")
    return int(batch), int(length)


def run(options: argparse.Namespace, work: Path) -> None:
    """Builds, checks, measures, tells."""
    from dataclasses import replace

    from adapted_gpt2 import TINY, Size, build

    from surgery.onnx.timing.record import to_json
    from surgery.pictures.latency_page import latency_poster

    size = TINY if options.quick else replace(Size(), layers=options.layers)
    print(f"building five graphs of {size.layers} layers", file=sys.stderr)
    folder = work / f"table1-{size.layers}x{size.width}-{options.dtype}"
    built = build(folder, size, options.dtype)
    shapes = options.shape or (
        QUICK_SHAPES if options.quick else CPU_SHAPES if options.provider == "cpu" else list(PAPER)
    )
    conditions = session.conditions({})
    unusual = [f"{size.layers}-layers"] if size != Size() else []
    graphs = ["cuda-graph"] if options.cuda_graph else []
    name = "-".join([conditions["date"], "lora-table1", options.provider, options.dtype, *graphs, *unusual])
    with contextlib.chdir(folder):  # where the record has its paths from
        answers = check(built, options.dtype)
        found = measure(built, shapes, options)
    remarks = said(options, size, found, conditions)
    sheets = [times(built, found), structure(built, found), report.answers("Answers", answers)]
    report.show(sheets, remarks)
    if options.quick:
        return
    command = shown(options, shapes)
    document = {
        "benchmark": "lora_table1",
        "command": command,
        **conditions,
        "versions": found.versions,
        "model": size,
        "graphs": built,
        "answers": answers,
        "table": [dict(zip(sheets[0].headings, row, strict=True)) for row in sheets[0].rows],
        "record": f"{name}.record.json",
    }
    page = report.as_markdown(sheets, {f"blocks and machine: {name}.record.json": command}, remarks)
    report.write(options.results, name, report.as_json(document), page)
    (options.results / f"{name}.record.json").write_text(to_json(found), encoding="utf-8")
    (options.results / f"{name}.svg").write_text(latency_poster(found), encoding="utf-8")


def shown(options: argparse.Namespace, shapes: Sequence[Shape]) -> str:
    """The command line that measures this again."""
    words = [
        f"--{name} {getattr(options, name)}" for name in ("provider", "dtype", "layers", "margin", "seconds", "seed")
    ]
    words += [f"--threads {options.threads}"] if options.threads else []
    words += ["--cuda-graph"] if options.cuda_graph else []
    words += [f"--shape {batch}x{length}" for batch, length in shapes]
    return " ".join(["python benchmarks/lora_table1.py", *words])


def measure(built: Sequence[Built], shapes: Sequence[Shape], options: argparse.Namespace) -> BenchReport:
    """All graphs against the first, shape by shape."""
    from surgery.operations.latency.bench import bench

    base, *others = (each.path for each in built)
    return bench(
        base,
        *others,
        shapes=shapes,
        margin=options.margin,
        seconds=session.QUICK_SECONDS if options.quick else options.seconds,
        **session.of_every_session(options),
    )


def check(built: Sequence[Built], dtype: str) -> list[dict[str, Any]]:
    """Largest differences on the same tokens, in relation to the largest output. Raises WrongAnswer."""
    import numpy as np
    import onnxruntime
    from adapted_gpt2 import BASE, BRANCH, MERGED

    from formats import DType
    from surgery.onnx.against_torch.model import tolerance

    by_name = {each.name: each for each in built}
    if by_name[MERGED].sha256 != by_name[BASE].sha256:
        raise session.WrongAnswer("the merged model's graph is not the base's, byte for byte")
    tokens = np.random.default_rng(0).integers(0, 100, (1, 16))  # (batch, length)
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    outputs = {}
    for name in (BASE, MERGED, BRANCH):
        running = onnxruntime.InferenceSession(by_name[name].path, providers=["CPUExecutionProvider"])
        outputs[name] = running.run(None, feeds)[0].astype(np.float64)  # (batch, length, vocabulary)
        del running
    scale = float(np.abs(outputs[MERGED]).max())
    apart = {name: float(np.abs(outputs[name] - outputs[MERGED]).max()) / scale for name in (BRANCH, BASE)}
    limit = 2 * tolerance(DType.F32 if dtype == "float32" else DType.F16, by_name[BRANCH].nodes_run)
    if not apart[BRANCH] <= limit < apart[BASE]:
        raise session.WrongAnswer(
            f"from merged, branch is {apart[BRANCH]:.2g} and base {apart[BASE]:.2g} away; limit {limit:.2g}"
        )
    return [{"difference from LoRA merged": name, "relative": f"{apart[name]:.1e}"} for name in apart]


def times(built: Sequence[Built], found: BenchReport) -> Sheet:
    """Theirs beside ours, a row for each shape and graph."""
    headings = ("shape", "graph", "their ms", "their slow-down", "our ms", "our slow-down", "interval", "verdict")
    names = {each.path: each.name for each in built}
    rows: list[tuple[str, ...]] = []
    for shape in dict.fromkeys(each.shape for each in found.comparisons):
        here = [each for each in found.comparisons if each.shape == shape]
        base = sorted(each.latency_reference for each in here)[len(here) // 2]
        rows.append((_by(shape), built[0].name, *_theirs(shape, built[0].name), f"{1e3 * base:.4g}", "", "", ""))
        rows += [(_by(shape), names[each.graph], *_theirs(shape, names[each.graph]), *_ours(each)) for each in here]
    return Sheet("The LoRA paper's Table 1: one forward pass", headings, rows)


def _by(shape: Shape) -> str:
    return f"{shape[0]} × {shape[1]}"


def _theirs(shape: Shape, name: str) -> tuple[str, str]:
    if name not in PAPER.get(shape, {}):
        return "–", "–"
    milliseconds, slower = PAPER[shape][name]
    return f"{milliseconds}", f"+{slower} %" if slower else ""


def _ours(comparison: Comparison) -> tuple[str, str, str, str]:
    low, high = (100 * (ratio - 1) for ratio in comparison.interval)
    ours = f"{100 * (comparison.ratio - 1):+.1f} %"
    return f"{1e3 * comparison.latency:.4g}", ours, f"{low:+.1f} … {high:+.1f} %", comparison.verdict


def structure(built: Sequence[Built], found: BenchReport) -> Sheet:
    """What was added to the graph; nodes as exported, and after ONNX Runtime's optimisation."""
    headings = (
        "graph",
        "parameters added",
        "nodes",
        "run on a CPU",
        "given to the provider",
        "graph's bytes",
        "from torch",
    )
    rows = [
        (
            each.name,
            f"{each.added:,}",
            str(each.nodes),
            str(each.nodes_run),
            ", ".join(f"{n} {name.removesuffix('ExecutionProvider')}" for name, n in found.assigned[each.path].items()),
            "the base's" if each.sha256 == built[0].sha256 else "its own",
            f"{each.error:.1e}",
        )
        for each in built
    ]
    return Sheet("The graphs", headings, rows)


def said(options: argparse.Namespace, size: Any, found: BenchReport, conditions: dict[str, Any]) -> list[str]:
    """What a reader must know beside the table."""
    shapes = {each.shape for each in found.comparisons}
    left_out = [_by(shape) for shape in PAPER if shape not in shapes]
    graphs = ", with CUDA graphs" if found.cuda_graph else ""
    return [
        f"{conditions['date']}, commit {conditions['commit'] or 'unknown'}; "
        + ", ".join(
            f"{key} {value}" for key, value in found.machine.items() if key in ("gpu", "driver", "processor", "cores")
        ),
        f"ours: GPT-2 of {size.layers} layers, width {size.width}, {options.dtype}, {found.provider}{graphs}; the "
        f"slow-down is that of paired blocks, the verdict against a margin of {100 * found.margin:g} %",
        _THEIRS,
        "of the branch's parameters a half are zeros: its B has a block for the keys, so that one product is enough",
        *([f"not run here: {', '.join(left_out)}"] if left_out else []),
        *(
            [
                "16 × 256 has 32 times the tokens of 1 × 128, 32 × 512 has 128 times: passes too long for "
                "enough blocks on a CPU, so smaller shapes instead"
            ]
            if options.provider == "cpu"
            else []
        ),
        ", ".join(f"{package} {version}" for package, version in found.versions.items()),
    ]


if __name__ == "__main__":
    main()
