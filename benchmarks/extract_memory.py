"""Peak memory of `surgery extract` at rank 16 on two models, of which one is four times as deep as the other.

What is held at a time is a few weights, not the model: the peak must not grow with the depth. Like the other
benchmarks, whole processes, the peak as the kernel saw it of the largest, and of all workers together as sampled.

    python benchmarks/extract_memory.py --work /data/b     # 6 and 24 layers: 0.8 and 2.4 GB each of base and tuned
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import report
import session
from extract import RANK
from model import TINY, Shape
from processes import CommandFailed, Contender, Run, measure, peak_of_all
from session import PYTHON, SURGERY

DEEPER = 4  # times
LIMIT = 1.2e9  # bytes that we mean to need at most
GROWTH = 1.1  # times as much as on the shallow model that we mean to need at most on the deep one
_FILES = ("base/model.safetensors", "tuned/model.safetensors")
_OUT = "out/surgery-memory"
_CONTENDER = Contender(
    "surgery extract",
    (SURGERY, "extract", "--rank", str(RANK), "base", "tuned", "-o", _OUT, "--json"),
    reads=_FILES,
    writes=_OUT,
)


def main() -> None:
    options = session.parser(__doc__.partition("\n")[0], rounds=3).parse_args()
    try:
        with session.work_folder(options.work) as work:
            _run(options, work)
    except CommandFailed as error:
        sys.exit(f"extract_memory: {error}")


def _run(options: argparse.Namespace, work: Path) -> None:
    first = TINY if options.quick else Shape(layers=options.layers)
    shapes = [first, dataclasses.replace(first, layers=DEEPER * first.layers)]
    measured: list[tuple[Shape, int, list[Run], int | None]] = []
    for shape in shapes:
        folder = session.generated(
            work / (f"tiny-{shape.layers}" if options.quick else f"{shape.layers}-layers"), shape
        )
        size = (folder / _FILES[0]).stat().st_size
        runs = measure([_CONTENDER], folder, options.rounds)
        measured.append((shape, size, runs, peak_of_all(_CONTENDER, folder)))
    rows = [_row(*each) for each in measured]
    found = session.conditions({"surgery": (PYTHON, ("model-surgery", "torch", "numpy", "safetensors"))})
    remarks = [
        f"{found['date']}, commit {found['commit'] or 'unknown'}; {session.machine(found)}",
        f"wall: median (least–most) of {options.rounds} rounds; peak: the largest of them",
        *([] if options.quick else targets(*(_peak(runs, together) for _, _, runs, together in measured))),
        *session.installed(found),
    ]
    title = f"memory of extract, rank {RANK}, linear weights"
    sheets = [report.answers(title, rows)]
    report.show(sheets, remarks)
    if options.quick:
        return
    commands = {_CONTENDER.name: _CONTENDER.shown}
    document = {
        "benchmark": "extract-memory",
        "title": title,
        **found,
        "commands": commands,
        "table": rows,
        "runs": [{"layers": shape.layers, **dataclasses.asdict(run)} for shape, _, runs, _ in measured for run in runs],
    }
    page = report.as_markdown(sheets, commands, remarks)
    report.write(options.results, f"{found['date']}-extract-memory", report.as_json(document), page)


def _peak(runs: list[Run], together: int | None) -> int:
    return max(together or 0, *(run.peak_rss_bytes for run in runs))


def _row(shape: Shape, size: int, runs: list[Run], together: int | None) -> dict[str, Any]:
    return {
        "layers": str(shape.layers),
        "base, tuned: MB each": round(size / 1e6),
        "wall, s": str(report.Spread.of(run.wall_s for run in runs)),
        "largest process, peak MB": round(max(run.peak_rss_bytes for run in runs) / 1e6),
        "all together, peak MB": "–" if together is None else str(round(together / 1e6)),
    }


def targets(shallow: float, deep: float) -> list[str]:
    """What we aim at, and whether this run got there; bytes."""
    met = {True: "met", False: "NOT MET"}
    return [
        f"target: at most {LIMIT / 1e6:,.0f} MB: {met[max(shallow, deep) <= LIMIT]}",
        f"target: at most {GROWTH - 1:.0%} more on a model {DEEPER} times as deep: {met[deep <= GROWTH * shallow]}, "
        f"{deep / shallow - 1:+.1%}",
    ]


if __name__ == "__main__":
    main()
