"""How often `surgery bench` is wrong, and how often it can tell: simulated runs, judged as real ones are.

    python benchmarks/error_rates.py               # 2,000 runs a row: some minutes

No clock and no model: blocks are drawn from noise as real machines make it, and go through
`surgery.onnx.timing.verdict.follow`,
looks, control and all. Fails if a claim that is false is made in more than 5 % of the
runs of any row, but for the last kind of noise: there each set of sessions resembles the one before it, which the tests
take for impossible, and the rows show what that would do.

The noise. A machine's speed wanders (a first-order autoregressive process, sampled at every quarter of every block),
drifts over the run, and jumps; each quarter's median has noise of its own; one block in ten is spoilt; and each set of
sessions differs by what its sessions got in memory, A's own being the same for effect and control.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import report
import session
from report import Sheet

from surgery.onnx.timing.latency import LONGEST, ROUNDS
from surgery.onnx.timing.verdict import ALPHA, follow

RUNS = 2000
SECONDS = (32, 64, 180)
MARGINS = (0.01, 0.02)
CLAIMS = ("equivalent", "slower", "faster", "inconclusive")
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Noise:
    """What disturbs a measurement, as shares of a run's time.

    sessions: standard deviation between two sessions of one model.
    quarter: of a quarter block's median, whatever the machine does.
    wander: of the machine's speed.
    memory: quarters after which the speed has forgotten 63 % of what it was.
    drift: how much slower the machine is at the end than at the beginning.
    jumps: of the speed, chance a quarter, each of 10 %.
    spoilt: share of blocks that a neighbour spoils, by 10 % and more.
    alike: correlation of sets of sessions with those before them.
    """

    name: str
    sessions: float = 0.01
    quarter: float = 0.01
    wander: float = 0.0
    memory: float = 1.0
    drift: float = 0.0
    jumps: float = 0.0
    spoilt: float = 0.0
    alike: float = 0.0


NOISES = (
    Noise("quiet", sessions=0.005, quarter=0.005),
    Noise("shared machine", quarter=0.015, wander=0.03, memory=4, spoilt=0.1),
    Noise("slow waves", wander=0.1, memory=48, spoilt=0.1),
    Noise("drift and jumps", wander=0.02, memory=12, drift=0.3, jumps=0.01, spoilt=0.05),
    Noise("sessions alike", quarter=0.015, wander=0.03, memory=4, spoilt=0.1, alike=0.3),
)


@dataclass(frozen=True)
class Row:
    """What was said of one truth: each claim's share of the runs, and the mean seconds until it was made."""

    noise: str
    margin: float
    seconds: int
    ratio: float
    runs: int
    equivalent: float
    slower: float
    faster: float
    inconclusive: float
    mean_seconds: float

    @property
    def false(self) -> float:
        """The largest share of a claim that is not true; a ratio at the margin is neither within nor beyond it."""
        within = self.ratio < 1 + self.margin
        beyond = self.ratio > 1 + self.margin
        return max(0.0 if within else self.equivalent, 0.0 if beyond else self.slower, self.faster)


def blocks(noise: Noise, epochs: int, runs: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Log-ratios of A' to A and of A to A by block, each of shape (runs, epochs, ROUNDS); the truth is still to add."""
    quarters = epochs * ROUNDS * 8  # a round is two blocks of four
    keep = math.exp(-1 / noise.memory)
    speed = np.empty((quarters, runs))
    speed[0] = noise.wander * rng.standard_normal(runs)
    steps = noise.wander * math.sqrt(1 - keep**2) * rng.standard_normal((quarters, runs))
    for i in range(1, quarters):
        speed[i] = keep * speed[i - 1] + steps[i]
    speed += np.linspace(0, math.log1p(noise.drift), quarters)[:, None]
    speed += np.cumsum(0.1 * rng.choice([-1, 1], speed.shape) * (rng.random(speed.shape) < noise.jumps), axis=0)
    speed += noise.quarter * rng.standard_normal(speed.shape)
    parts = speed.T.reshape(runs, epochs, ROUNDS, 2, 4)
    ratios = (parts[..., 1] + parts[..., 2] - parts[..., 0] - parts[..., 3]) / 2  # A B B A, or
    ratios *= rng.choice([-1, 1], ratios.shape)  # B A A B
    spoilt = rng.random(ratios.shape) < noise.spoilt
    ratios += spoilt * 0.1 * rng.standard_t(2, ratios.shape)
    offsets = rng.standard_normal((runs, epochs, 3))  # of A, B and A'
    for i in range(1, epochs):
        offsets[:, i] = noise.alike * offsets[:, i - 1] + math.sqrt(1 - noise.alike**2) * offsets[:, i]
    offsets *= noise.sessions / math.sqrt(2)
    effect = ratios[..., 0] + (offsets[..., 1] - offsets[..., 0])[..., None]
    control = ratios[..., 1] + (offsets[..., 2] - offsets[..., 0])[..., None]
    return effect, control


def row(noise: Noise, margin: float, seconds: int, ratio: float, runs: int) -> Row:
    """Judges so many runs."""
    epochs = int(seconds / LONGEST)
    effect, control = blocks(
        noise, epochs, runs, np.random.default_rng([epochs, round(1e4 * margin), round(1e4 * ratio)])
    )
    effect += math.log(ratio)
    said: Counter[str] = Counter()
    used = 0.0
    for run in range(runs):
        shares: list[float] = []

        def stream(run: int = run, shares: list[float] = shares) -> Iterator[tuple[list[float], list[float], float]]:
            for i in range(epochs):
                shares.append((i + 1) / epochs)
                yield effect[run, i].tolist(), control[run, i].tolist(), shares[-1]

        said[follow(stream(), margin).verdict] += 1
        used += shares[-1] * seconds
    return Row(noise.name, margin, seconds, ratio, runs, *(said[claim] / runs for claim in CLAIMS), used / runs)


def cases() -> list[tuple[Noise, float, int, float]]:
    """Every noise, margin and time with no slow-down, one of exactly the margin, and twice that."""
    return [
        (noise, margin, seconds, 1 + times * margin)
        for noise in NOISES
        for margin in MARGINS
        for times in (0, 1, 2)
        for seconds in SECONDS
    ]


def as_sheet(rows: list[Row]) -> Sheet:
    """A row for each noise, margin, truth and time."""
    headings = ("noise", "margin", "true ratio", "seconds", *CLAIMS, "seconds used", "false at most")
    lines = [
        (
            each.noise,
            f"{each.margin:.0%}",
            f"{each.ratio:.2f}",
            str(each.seconds),
            *(f"{getattr(each, claim):.1%}" for claim in CLAIMS),
            f"{each.mean_seconds:.0f}",
            f"{each.false:.1%}",
        )
        for each in rows
    ]
    return Sheet("What `surgery bench` says of simulated runs", headings, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of each row [{RUNS}]")
    parser.add_argument("--jobs", type=int, help="processes [one for each core]")
    parser.add_argument("--results", type=Path, default=session.HERE / "results")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(row, *zip(*cases(), strict=True), [options.runs] * len(cases())))
    found = session.conditions({"surgery": (sys.executable, ("numpy",))})
    promised = {noise.name for noise in NOISES if not noise.alike}
    worst = max(each.false for each in rows if each.noise in promised)
    beyond = max(each.false for each in rows if each.noise not in promised)
    remarks = [
        f"{options.runs:,} runs a row; the worst share of a false claim is {worst:.1%}, {ALPHA:.0%} are allowed",
        f"beyond what is promised, where sets of sessions resemble those before them: {beyond:.1%}",
        f"{found['date']}, commit {found['commit'] or 'unknown'}",
        *session.installed(found),
    ]
    command = f"python benchmarks/error_rates.py --runs {options.runs}"
    sheets = [as_sheet(rows)]
    report.show(sheets, remarks)
    document = {"command": command, **found, "noises": [asdict(each) for each in NOISES]}
    document["table"] = [asdict(each) for each in rows]
    page = report.as_markdown(sheets, {"simulation": command}, remarks)
    report.write(options.results, f"{found['date']}-error-rates", report.as_json(document), page)
    if worst > ALPHA:
        sys.exit(f"more false claims than {ALPHA:.0%}")


if __name__ == "__main__":
    main()
