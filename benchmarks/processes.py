"""Runs commands as whole processes, in turn, and measures each.

Wall time is from before the process is started until it is reaped; peak RSS and CPU time are what the kernel says of
it (`wait4`). Linux hands a parent's resident set on to a child's peak, so the process that measures must stay small:
it never loads torch, which `measure` checks. Knows nothing of what the commands do.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 16 << 20
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Contender:
    """One command of a comparison, run in the work folder.

    Attributes:
        name: in tables.
        argv: the command.
        reads: files that are put into the page cache before each run.
        writes: what it makes; removed before each run.
        cold: whether the files it reads are put out of the page cache instead.
        imports: name of the contender that only starts and loads what this one loads. Without one, what counts is
            what the process itself says, as "seconds" in a JSON document on stdout.
    """

    name: str
    argv: tuple[str, ...]
    reads: tuple[str, ...] = ()
    writes: str | None = None
    imports: str | None = None
    cold: bool = False

    @property
    def shown(self) -> str:
        """The command without this machine's paths."""
        here = f"{Path(__file__).parent}{os.sep}"
        words = [Path(self.argv[0]).name, *(word.replace(here, "benchmarks/") for word in self.argv[1:])]
        return " ".join(f"'{word}'" if " " in word else word for word in words)


@dataclass(frozen=True)
class Run:
    """One measured process.

    Attributes:
        wall_s: from start to end.
        own_s: what the process itself says it took; None if it says nothing.
        cpu_s: user and system time.
        peak_rss_bytes: largest resident set, mapped files included.
        others_cpu_s: CPU time that went to anything but this process meanwhile (or was stolen); None if unknown.
        load_average: of one minute, before.
    """

    contender: str
    round: int
    wall_s: float
    own_s: float | None
    cpu_s: float
    peak_rss_bytes: int
    others_cpu_s: float | None
    load_average: float


class CommandFailed(Exception):
    """A command of a comparison ended with an error."""


def measure(contenders: Sequence[Contender], folder: Path, rounds: int, label: str = "round") -> list[Run]:
    """Runs all contenders in turn, `rounds` times over. Raises CommandFailed."""
    if "torch" in sys.modules:
        raise RuntimeError("the process that measures must stay small, and torch is loaded")
    runs = []
    for number in range(rounds):
        for contender in contenders:
            print(f"{label} {number + 1} of {rounds}: {contender.name} ... ", end="", file=sys.stderr, flush=True)
            runs.append(_run(contender, folder, number))
            print(f"{runs[-1].wall_s:.2f} s", file=sys.stderr)
    return runs


def _run(contender: Contender, folder: Path, number: int) -> Run:
    if contender.writes:
        (folder / contender.writes).parent.mkdir(parents=True, exist_ok=True)
        _remove(folder / contender.writes)
    os.sync()  # what the last command left to be written must not slow this one down
    (_cool if contender.cold else _warm)(folder / name for name in contender.reads)
    load, busy = os.getloadavg()[0], _busy_s()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            contender.argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=_environment()
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        said, complaint = _text(out), _text(err)
    if process.returncode:
        raise CommandFailed(f"{contender.shown}\nexit code {process.returncode}\n{said[-2000:]}{complaint[-4000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return Run(
        contender=contender.name,
        round=number,
        wall_s=wall,
        own_s=json.loads(said)["seconds"] if said.startswith("{") else None,
        cpu_s=cpu,
        peak_rss_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        others_cpu_s=None if busy is None else max(0.0, (_busy_s() or busy) - busy - cpu),
        load_average=load,
    )


def peak_of_all(contender: Contender, folder: Path) -> int | None:
    """Runs a command once more and asks every 20 ms what it and all its processes hold together, in bytes: what they
    share counts once (Linux' proportional set size). For its memory alone, since asking takes time; None elsewhere than
    on Linux. Raises CommandFailed."""
    if sys.platform != "linux":
        return None
    if contender.writes:
        _remove(folder / contender.writes)
    process = subprocess.Popen(
        contender.argv,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=_environment(),
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(_proportional, _family(process.pid))))
        time.sleep(0.02)
    if process.returncode:
        raise CommandFailed(f"{contender.shown}\nexit code {process.returncode}")
    return peak


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    with contextlib.suppress(OSError):
        below = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _words(task / "children")]
        return [pid, *(each for child in below for each in _family(child))]
    return [pid]


def _proportional(pid: int) -> int:
    """Bytes; 0 of a process that has ended."""
    words = _words(Path(f"/proc/{pid}/smaps_rollup"))
    return 1024 * int(words[words.index("Pss:") + 1]) if "Pss:" in words else 0


def _words(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text().split()
    return []


def _environment() -> dict[str, str]:
    """Ours, without the network: nobody's time shall hold a look-up at a hub; and with compiled modules kept, as Python
    keeps them unless it is told otherwise."""
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**ours, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def _warm(paths: Iterable[Path]) -> None:
    buffer = bytearray(_CHUNK)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _cool(paths: Iterable[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _text(file: tempfile._TemporaryFileWrapper[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _busy_s() -> float | None:
    """CPU time of the whole machine so far that was not idle, stolen time included."""
    try:
        first = Path("/proc/stat").read_text().partition("\n")[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICKS
