"""The main job, end to end, on a real model: `make demo`.

Fine-tunes MiniLM for 120 steps, then does everything else through the command line, as a pipeline would: look
at the spectrum, extract at several ranks and for budgets of the same sizes, merge, unmerge, export base and merged,
bench. Everything it prints was measured in this run; demo-out/results.json has it all.
"""

from __future__ import annotations

import filecmp
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import finetune
import torch
import transformers
from corpus import Pair, pairs
from rich.console import Console
from rich.table import Table

OUT = Path("demo-out")
MARKER = OUT / ".made-by-surgery-demo"
RANKS = (2, 8, 32)
SHOWN = 8  # the rank that is unmerged, exported and timed, and that DoRA is compared at
PICTURE = OUT / "ranks.html"
BENCH_MARGIN = 0.02
# That tuned must be better by, or the table is about noise. Five standard errors of the difference of two accuracies
# over 1000 pairs, which is at most 0.022.
GAIN = 0.1
console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def main() -> None:
    """Does it all."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    prepare()
    train, test = pairs(limit_train=2000, limit_test=1000)
    console.print(
        f"Task: does this docstring describe this function? {len(train)} pairs to train on, {len(test)} held out "
        "from other files."
    )
    dtype, seconds = finetune.make_pair(train, OUT / "base", OUT / "tuned")
    results: dict[str, Any] = {"steps": finetune.STEPS, "dtype": dtype, "training_seconds": seconds, "adapters": {}}
    answers = {name: answers_of(OUT / name, test) for name in ("base", "tuned")}
    base, tuned = (accuracy(answers[name], test) for name in ("base", "tuned"))
    console.print(
        f"Fine-tuned MiniLM for {finetune.STEPS} steps in {dtype}, the faster here, in {seconds:.0f} s: held-out "
        f"accuracy {base:.1%} → {tuned:.1%}.\n"
    )
    if tuned < base + GAIN:
        sys.exit(
            f"The tuned model is right on {tuned:.1%} of the held-out pairs and the base on {base:.1%}: not the "
            f"{GAIN:.0%} more without which this demo would compare noise. Please report this with the versions of "
            "Python, torch and transformers."
        )
    looked = surgery("spectrum", OUT / "base", OUT / "tuned", "--max-rank", 64, "--report", PICTURE)
    results["spectrum"] = {key: looked[key] for key in ("uniform", "budget", "seconds")}
    for rank in RANKS:
        uniform = adapt(results, f"lora-r{rank}", f"rank {rank}", "--rank", rank)
        adapt(results, f"budget-r{rank}", "the same size by --budget", "--budget", size(uniform))
        if rank == SHOWN:
            adapt(results, f"dora-r{rank}", f"rank {rank}, DoRA", "--rank", rank, "--method", "dora")
    merged = merged_with(f"lora-r{SHOWN}")
    results["unmerge"] = surgery("unmerge", merged, OUT / f"lora-r{SHOWN}", "-o", OUT / "base-again")
    graphs = [OUT / "base-onnx" / "model.onnx", OUT / "merged-onnx" / "model.onnx"]
    results["exports"] = [
        surgery("export-onnx", model, "-o", graph) for model, graph in zip((OUT / "base", merged), graphs, strict=True)
    ]
    results["same_graph"] = compare(*graphs)
    results["bench"] = surgery("bench", *graphs, "--margin", BENCH_MARGIN)
    answers |= {name: answers_of(merged_with(name), test) for name in results["adapters"]}
    score(results, answers, test)
    results["seconds"] = time.perf_counter() - start
    (OUT / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    report(results)


def prepare() -> None:
    """An empty output folder; one that this demo did not make is left alone."""
    if OUT.exists() and not MARKER.exists():
        raise SystemExit(f"{OUT}/ is there and was not made by this demo: move it away")
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    MARKER.touch()


def adapt(results: dict[str, Any], name: str, title: str, *how: object) -> Path:
    """Extracts an adapter and merges it again; returns its folder."""
    adapter = OUT / name
    extracted = surgery("extract", *how, OUT / "base", OUT / "tuned", "-o", adapter)
    merged = surgery("merge", OUT / "base", adapter, "-o", merged_with(name))
    ranks = [module["rank"] for module in extracted["modules"]]
    results["adapters"][name] = {
        "title": title,
        "bytes": size(adapter),
        "least_rank": min(ranks),
        "most_rank": max(ranks),
        "digest": merged["digest"],
        **{key: extracted[key] for key in ("energy", "residual", "seconds")},
    }
    return adapter


def merged_with(name: str) -> Path:
    """Where base lies with an adapter merged."""
    return OUT / f"merged-{name}"


def surgery(*arguments: object) -> Any:
    """Runs one command as a transcript shows it, and returns its --json document."""
    words = [str(argument) for argument in arguments]
    console.print(f"$ surgery {shlex.join(words)}", style="bold")
    program = Path(sys.executable).with_name("surgery")
    done = subprocess.run([program, *words, "--json"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}surgery {words[0]} ended with exit code {done.returncode}")
    document = json.loads(done.stdout)
    console.print(f"  {said(document)}  ({document['seconds']:.1f} s)\n")
    return document


def said(document: dict[str, Any]) -> str:
    """A command's result in a line."""
    if document["operation"] == "spectrum":
        energies = {point["rank"]: point["energy"] for point in document["uniform"]}
        best = document["budget"][list(energies).index(SHOWN)]["energy"]
        return (
            f"rank {SHOWN} for all {len(document['weights'])} weights holds {energies[SHOWN]:.1%} of the energy, the "
            f"same bytes where they count {best:.1%}"
        )
    ledger = ", ".join(f"{count} {fate.replace('_', '-')}" for fate, count in document["ledger"].items() if count)
    if document["operation"] == "extract":
        return f"{document['energy']:.1%} of the difference's energy kept; {ledger}"
    if document["operation"] == "merge":
        return f"digest {document['digest'][:16]}; {ledger}"
    if document["operation"] == "unmerge":
        verdict = (
            "the base came back bit for bit"
            if document["bit_exact"]
            else (f"{len(document['differing'])} tensors differ from the base by rounding")
        )
        return f"{verdict}; {ledger}"
    if document["operation"] == "export-onnx":
        error = document["max_rel_error"]
        (graph,) = document["graphs"]
        return f"graph {graph['sha256'][:16]}, {graph['nodes']} nodes; torch agrees to {error:.1e}"
    (found,) = document["comparisons"]
    low, high = found["interval"]
    return f"merged/base {found['ratio']:.4f} ({low:.4f} – {high:.4f}): {found['verdict']} at {document['margin']:.0%}"


def compare(a: Path, b: Path) -> bool:
    """cmp, in the transcript."""
    same = filecmp.cmp(a, b, shallow=False)
    console.print(f"$ cmp {a} {b}", style="bold")
    console.print(f"  {'the same bytes: the merged model is the base’s program' if same else 'they differ'}\n")
    return same


def answers_of(folder: Path, test: list[Pair]) -> torch.Tensor:
    """What the model in a folder says of every held-out pair."""
    return finetune.predictions(*finetune.load(folder), test)


def accuracy(given: torch.Tensor, test: list[Pair]) -> float:
    """The share of pairs that a model is right about."""
    return float((given == torch.tensor([pair.label for pair in test])).float().mean())


def score(results: dict[str, Any], answers: dict[str, torch.Tensor], test: list[Pair]) -> None:
    """Held-out accuracy of every model, and how often it agrees with the tuned one."""
    adapters = results["adapters"]
    for name, given in answers.items():
        row = adapters[name] if name in adapters else results.setdefault(name, {})
        row["accuracy"] = accuracy(given, test)
        row["agreement"] = float((given == answers["tuned"]).float().mean())


def report(results: dict[str, Any]) -> None:
    """The one table."""
    model = size(OUT / "tuned")
    table = Table("model", "adapter", "of the model", "energy kept", "agrees with tuned", "held-out accuracy")
    table.add_row("base", "", "", "", *scores(results["base"]))
    for row in results["adapters"].values():
        share = (f"{row['bytes'] / 1e6:.2f} MB", f"{row['bytes'] / model:.1%}", f"{row['energy']:.1%}")
        table.add_row(f"merged, {row['title']}", *share, *scores(row))
    table.add_row("tuned", "", "", "", *scores(results["tuned"]))
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    bench = results["bench"]
    (found,) = bench["comparisons"]
    low, high = found["interval"]
    graphs = "the same bytes" if results["same_graph"] else "DIFFERENT"
    console.print(f"ONNX graphs of base and merged: {graphs}")
    console.print(
        f"latency merged/base at 1×128 on {bench['provider']}: {found['ratio']:.4f} ({low:.4f} – {high:.4f}), "
        f"{found['verdict']} at a margin of {bench['margin']:.0%}"
    )
    console.print(f"error and size of every rank, weight by weight: open {PICTURE} in a browser")
    console.print(f"{results['seconds']:.0f} s in all; every figure is in {OUT / 'results.json'}")


def scores(row: dict[str, float]) -> tuple[str, str]:
    """The last two cells of a model's row."""
    return f"{row['agreement']:.1%}", f"{row['accuracy']:.1%}"


def size(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
