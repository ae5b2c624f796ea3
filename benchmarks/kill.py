"""Kills merge and unmerge at random moments, and looks at what is left.

    python benchmarks/kill.py                # 200 kills, about two minutes
    python benchmarks/kill.py --kills 12 --small

A server loads the libraries once and forks for each run, so that every kill hits the work and none the imports; the
run works with copies of itself, as the command line does, which die with it. The moments are uniform over the time
that a whole run takes, and a little beyond. After each kill every input must be the same, byte for byte, and the
output the one of a run that nobody killed, or absent; an output with an undo file must have that one too. Anything
else fails. What a kill may leave: an undo file without an output, and hidden files or folders (.NAME.xxxxxxxx.tmp),
which are no output.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import report
import session
import torch
from report import Sheet
from safetensors.torch import save_file

import surgery

SEED = 0
BEYOND = 1.1  # kills come up to so much of a run's time after its start
SERVER = """
import json, os, sys
import surgery, torch
import surgery.operations.merge.merge, surgery.operations.merge.unmerge, formats.staging
from surgery.pipeline.engine import Resources
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        getattr(surgery, job.pop("verb"))(**job, resources=Resources(processes=True))
        os._exit(0)
    print(pid, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Scene:
    """What is killed: a verb with its arguments, and whether something stands at the output before."""

    name: str
    verb: str
    first: str
    output: str
    undo: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    over: bool = False

    def job(self, work: Path, out: Path) -> dict[str, Any]:
        """For the server. Of merge the undo file is an output, of unmerge an input."""
        given = {"verb": self.verb, "adapters": str(work / "in" / "adapter"), "out": str(out / self.output)}
        first = {"base" if self.verb == "merge" else "merged": str(work / "in" / self.first)}
        undo = {"undo": str((out if self.verb == "merge" else work / "in") / self.undo)} if self.undo else {}
        return given | first | undo | self.arguments | ({"force": True} if self.over else {})


SHARDS = {"max_shard_size": 9 << 20}
SCENES = (
    Scene("merge, file", "merge", "base.st", "m.st"),
    Scene("merge, file, --undo", "merge", "base.st", "m.st", "u.st"),
    Scene("merge, folder", "merge", "base", "m", None, SHARDS),
    Scene("merge, folder, --undo", "merge", "base", "m", "u.st", SHARDS),
    Scene("merge, folder, over an older one", "merge", "base", "m", None, SHARDS, over=True),
    Scene("unmerge, file, --undo", "unmerge", "merged.st", "b.st", "undo.st"),
    Scene("unmerge, folder, --undo", "unmerge", "merged", "b", "undo-folder.st"),
)


@dataclass
class Tally:
    """What was left after the kills of one scene. `broken` counts what must never be."""

    scene: str
    run_s: float
    kills: int = 0
    absent: int = 0
    older: int = 0
    whole: int = 0
    undo_alone: int = 0
    hidden: int = 0
    broken: int = 0
    moments: list[float] = field(default_factory=list)


class Server:
    """The process that forks for each run."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, text=True)
        self._said()

    def run(self, job: dict[str, Any], moment: float | None = None) -> tuple[float, int]:
        """Seconds of a run and its exit code; killed at a moment, if one is given."""
        begin = time.perf_counter()
        self._say(json.dumps(job))
        pid = int(self._said())
        if moment is not None:
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)  # it is ours, and a zombie at least: the server has not waited for it yet
        self._say("wait")
        code = int(self._said())
        return time.perf_counter() - begin, code

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def write_model(folder: Path, width: int, layers: int) -> None:
    """A bfloat16 model as a file and as a folder, an adapter of rank 16 that also replaces a norm, and both merged."""
    generator = torch.Generator().manual_seed(SEED)
    base: dict[str, torch.Tensor] = {"norm.weight": torch.ones(width, dtype=torch.bfloat16)}
    factors = {"norm.weight": torch.rand(width, generator=generator)}
    for layer in range(layers):
        weight = 0.02 * torch.randn(width, width, generator=generator)
        base[f"layers.{layer}.up.weight"] = weight.bfloat16()
        factors[f"layers.{layer}.up.lora_A.weight"] = torch.randn(16, width, generator=generator) / width**0.5
        factors[f"layers.{layer}.up.lora_B.weight"] = 1e-3 * torch.randn(width, 16, generator=generator)
    (folder / "base").mkdir(parents=True)
    (folder / "adapter").mkdir()
    save_file(base, folder / "base.st", metadata={"format": "pt"})
    shutil.copy(folder / "base.st", folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text("{}")
    named = {f"base_model.model.{name}": tensor for name, tensor in factors.items()}
    save_file(named, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "modules_to_save": ["norm"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    surgery.merge(folder / "base.st", folder / "adapter", folder / "merged.st", undo=folder / "undo.st")
    folders = {"undo": folder / "undo-folder.st", "max_shard_size": SHARDS["max_shard_size"]}
    surgery.merge(folder / "base", folder / "adapter", folder / "merged", **folders)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def torment(server: Server, scene: Scene, work: Path, kills: int, chance: random.Random) -> Tally:
    """Runs one scene to the end three times, then kills it."""
    inputs = digests(work / "in")
    times = []
    for _ in range(3):
        with outputs(work, scene) as out:
            seconds, code = server.run(scene.job(work, out))
            if code:
                raise SystemExit(f"{scene.name}: exit code {code}")
            times.append(seconds)
            reference = digests(out)
    tally = Tally(scene.name, statistics.median(times))
    for _ in range(kills):
        moment = chance.uniform(0, BEYOND * tally.run_s)
        with outputs(work, scene) as out:
            older = digests(out)
            code = server.run(scene.job(work, out), moment)[1]
            if code not in (0, -signal.SIGKILL):
                raise SystemExit(f"{scene.name}: exit code {code}")
            left = digests(out)
            tally.kills += 1
            tally.moments.append(moment)
            judge(tally, scene, left, reference, older, out)
            tally.broken += digests(work / "in") != inputs
    return tally


def judge(
    tally: Tally, scene: Scene, left: dict[str, str], reference: dict[str, str], older: dict[str, str], out: Path
) -> None:
    """Counts what one kill left."""
    tally.hidden += any(path.name.startswith(".") for path in out.iterdir())
    visible = {name: digest for name, digest in left.items() if not name.startswith(".")}
    undo = {scene.undo} & reference.keys()
    if visible == reference:
        tally.whole += 1
    elif visible == older:
        tally.older += bool(older)
        tally.absent += not older and not (out / scene.output).exists()
        tally.broken += not older and (out / scene.output).exists()
    elif undo and visible == {name: reference[name] for name in undo}:
        tally.undo_alone += 1
    else:
        tally.broken += 1


@contextlib.contextmanager
def outputs(work: Path, scene: Scene) -> Iterator[Path]:
    """An empty folder for the outputs of one run, or one where an older output stands."""
    out = work / "out"
    out.mkdir()
    try:
        if scene.over:
            (out / scene.output).mkdir()
            (out / scene.output / "older").write_text("older")
        yield out
    finally:
        shutil.rmtree(out)


def as_sheet(tallies: list[Tally]) -> Sheet:
    """A row for each scene, and their sum."""
    counts = ("kills", "absent", "undo_alone", "older", "whole", "hidden", "broken")
    headings = ("killed", "run, s", "kills", "absent", "undo file alone", "older one", "whole", "hidden left", "broken")
    rows = [(each.scene, f"{each.run_s:.2f}", *(str(getattr(each, key)) for key in counts)) for each in tallies]
    sums = (str(sum(getattr(each, key) for each in tallies)) for key in counts)
    return Sheet("What kill -9 at a random moment leaves", headings, [*rows, ("all", "", *sums)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="of all scenes together [%(default)s]")
    parser.add_argument("--small", action="store_true", help="a model of 2 MB, no results kept")
    parser.add_argument("--results", type=Path, default=session.HERE / "results")
    options = parser.parse_args()
    chance = random.Random(SEED)
    share, more = divmod(options.kills, len(SCENES))
    with tempfile.TemporaryDirectory(prefix="surgery-kill-") as name, contextlib.closing(Server()) as server:
        work = Path(name)
        write_model(work / "in", *((256, 16) if options.small else (1024, 20)))
        size = (work / "in" / "base.st").stat().st_size
        tallies = []
        for index, scene in enumerate(SCENES):
            tallies.append(torment(server, scene, work, share + (index < more), chance))
            print(f"{scene.name}: {tallies[-1].kills} kills", file=sys.stderr)
    sheets = [as_sheet(tallies)]
    found = session.conditions({"surgery": (sys.executable, ("torch", "safetensors"))})
    remarks = [
        f"{found['date']}, commit {found['commit'] or 'unknown'}",
        f"model of {size / 1e6:.0f} MB, bfloat16, rank 16; {session.machine(found)}",
        f"moments uniform over {BEYOND} times a run, imports not counted; inputs compared byte for byte after each",
        *session.installed(found),
    ]
    report.show(sheets, remarks)
    if not options.small:
        command = f"python benchmarks/kill.py --kills {options.kills}"
        document = {"command": command, **found, "bytes": size, "table": [asdict(each) for each in tallies]}
        page = report.as_markdown(sheets, {"kill -9": command}, remarks)
        report.write(options.results, f"{found['date']}-kill", report.as_json(document), page)
    if any(each.broken for each in tallies):
        sys.exit("an output was broken, or an input changed")


if __name__ == "__main__":
    main()
