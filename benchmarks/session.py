"""What every benchmark does: generate the model, rehearse, measure in turn, check the answers, keep the results.

The rehearsal runs each command once, unrecorded, on a tiny model: it loads every tool's libraries into the page
cache, and whatever is not installed fails before the long runs rather than after them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
from model import TINY, Shape, is_generated
from processes import CommandFailed, Contender, measure

HERE = Path(__file__).parent
PYTHON = sys.executable
SURGERY = str(Path(sys.executable).with_name("surgery"))
CP = ("cp", "--reflink=never") if sys.platform == "linux" else ("cp",)
QUICK_SECONDS = 5.0  # of a bench on a tiny model, at most: enough on a busy machine too
_QUICK_ROUNDS = 2
_BUSY = 0.05  # share of the machine beyond which timings mean little


class WrongAnswer(Exception):
    """A command of ours gave a result that it should not."""


@dataclass(frozen=True)
class Comparison:
    """What a benchmark compares.

    Attributes:
        name: of its results.
        title: what is done, with which settings.
        contenders: ours first.
        check: compares the answers that lie in a folder after the runs, row by row; raises WrongAnswer.
        environments: the Python of each environment that takes part, by its owner, with the packages that matter.
        floor: the contender whose time without imports the others' are divided by, if it tells one.
        targets: says of each target, given the rows and the model's layers, whether it was met; that fails nothing.
    """

    name: str
    title: str
    contenders: Sequence[Contender]
    check: Callable[[Path], list[dict[str, Any]]]
    environments: Mapping[str, tuple[str, tuple[str, ...]]]
    floor: str = ""
    targets: Callable[[Sequence[report.Row], int], list[str]] = lambda rows, layers: []


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--work", type=Path, help="keep models and outputs here [a temporary directory]")
    made.add_argument("--layers", type=int, default=Shape.layers, help="of the model [%(default)s, 0.4 B parameters]")
    made.add_argument("--rounds", type=int, default=rounds, help="times each command runs [%(default)s]")
    made.add_argument("--quick", action="store_true", help="a tiny model, two rounds, no results kept")
    made.add_argument("--results", type=Path, default=HERE / "results", help="folder for what was measured")
    return made


def add_latency_options(made: argparse.ArgumentParser) -> None:
    """The options that benchmarks by `surgery bench` share."""
    made.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    made.add_argument("--provider", default="cpu", help="cpu, cuda … [%(default)s]")
    made.add_argument("--cuda-graph", action="store_true", help="capture each pass into a CUDA graph")
    made.add_argument("--threads", type=int, help="of each session [the runtime's choice]")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--work", type=Path, help="keep the graphs here [a temporary directory; 8 GB in float32]")
    made.add_argument("--quick", action="store_true", help="a tiny model, no results kept")
    made.add_argument("--results", type=Path, default=HERE / "results", help="folder for what was measured")


def of_every_session(options: argparse.Namespace) -> dict[str, Any]:
    """Those of them that `bench` takes by the same names."""
    return {name: getattr(options, name) for name in ("provider", "threads", "seed", "cuda_graph")}


def run(comparison: Comparison, options: argparse.Namespace) -> None:
    """Does it all; exits with 1 if a command fails or an answer is wrong."""
    try:
        with work_folder(options.work) as work:
            _run(comparison, options, work)
    except (CommandFailed, WrongAnswer) as error:
        sys.exit(f"{comparison.name}: {error}")


def _run(comparison: Comparison, options: argparse.Namespace, work: Path) -> None:
    tiny = generated(work / "tiny", TINY)
    measure(comparison.contenders, tiny, rounds=1, label="rehearsal")
    shape = TINY if options.quick else Shape(layers=options.layers)
    folder = tiny if options.quick else generated(work / f"{shape.layers}-layers", shape)
    runs = measure(comparison.contenders, folder, _QUICK_ROUNDS if options.quick else options.rounds)
    checks = comparison.check(folder)
    rows = report.summarise(runs, comparison.contenders, comparison.floor)
    size = (folder / "base" / "model.safetensors").stat().st_size
    found = conditions(comparison.environments)
    others = report.others_share(runs, found["machine"]["cores"])
    remarks = [
        f"{found['date']}, commit {found['commit'] or 'unknown'}",
        f"model of {shape.layers} layers, {size / 1e6:.0f} MB, bfloat16; {machine(found)}",
        f"median (least–most) of {1 + max(run.round for run in runs)} rounds; ratios are taken within a round",
        company(others),
        *([] if options.quick else comparison.targets(rows, shape.layers)),
        *installed(found),
    ]
    sheets = [report.timings(comparison.title, rows), report.answers("Answers", checks)]
    report.show(sheets, remarks)
    if options.quick:
        return
    commands = {contender.name: contender.shown for contender in comparison.contenders}
    document = {
        "benchmark": comparison.name,
        "title": comparison.title,
        **found,
        "model": {**dataclasses.asdict(shape), "bytes": size},
        "commands": commands,
        "table": rows,
        "answers": checks,
        "runs": runs,
    }
    page = report.as_markdown(sheets, commands, remarks)
    unusual = "" if shape == Shape() else f"-{shape.layers}-layers"
    report.write(options.results, f"{found['date']}-{comparison.name}{unusual}", report.as_json(document), page)


def machine(found: Mapping[str, Any]) -> str:
    """Of the conditions, in words."""
    return f"{found['machine']['cpu']}, {found['machine']['cores']} cores"


def installed(found: Mapping[str, Any]) -> list[str]:
    """Of the conditions, the versions, a line for each environment."""
    return [
        f"{owner}: " + ", ".join(f"{package} {version}" for package, version in versions.items())
        for owner, versions in found["versions"].items()
    ]


def verdict(target: str, met: bool, measured: str) -> str:
    """A target in words, and whether what was measured meets it."""
    return f"target: {target}: {'met' if met else 'NOT MET'}, {measured}"


def company(others: float | None) -> str:
    """How quiet the machine was. Libraries whose threads wait for each other suffer most from company."""
    if others is None:
        return "what other processes did meanwhile is unknown"
    remark = f"other processes had {others:.1%} of the machine's CPU time"
    return f"{remark}: TOO BUSY, do not quote these times" if others > _BUSY else remark


@contextlib.contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="surgery-benchmark-") as temporary:
        yield Path(temporary)


def generated(folder: Path, shape: Shape) -> Path:
    """The folder with the model in it: by a process of its own, because this one must stay small."""
    if not is_generated(folder, shape):
        print(f"generating a model of {shape.layers} layers", file=sys.stderr)
        tiny = ["--tiny"] if dataclasses.replace(shape, layers=TINY.layers) == TINY else []
        subprocess.run([PYTHON, HERE / "model.py", folder, "--layers", str(shape.layers), *tiny], check=True)
    return folder


def conditions(environments: Mapping[str, tuple[str, tuple[str, ...]]]) -> dict[str, Any]:
    """When, on what and with which versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "machine": {"cpu": _cpu(), "cores": _cores(), "system": f"{platform.system()} {platform.machine()}"},
        "versions": {owner: _versions(python, packages) for owner, (python, packages) in environments.items()},
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _commit() -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(
            ["git", "describe", "--always", "--dirty"], cwd=HERE, text=True, stderr=subprocess.DEVNULL
        ).strip()
    return None


def _versions(python: str, packages: Sequence[str]) -> dict[str, str]:
    program = (
        "import json, platform, sys; from importlib.metadata import version;"
        "print(json.dumps({'python': platform.python_version()} | {name: version(name) for name in sys.argv[1:]}))"
    )
    found: dict[str, str] = json.loads(subprocess.check_output([python, "-c", program, *packages], text=True))
    return found
