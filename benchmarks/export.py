"""Times `surgery export-onnx` against torch.onnx.export + save, of a GPT-2-medium-shaped model in float32.

    python benchmarks/export.py --work /somewhere/with/25GB

The second export puts a merged model's weights under the graph that its base left: in the model's own folder, over the
file that is there, or in another with a copy, of which cp is the floor. The first one traces. It is timed without the
comparison with torch, which torch's own export does not make either, and once with it. With --template the graph is
torch's own export of the base. Besides, a model of more than 2 GB, which no protobuf can hold, is exported in these
ways and run.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import report
import session
from processes import CommandFailed, Contender, Run, measure
from session import CP, HERE, PYTHON, SURGERY, WrongAnswer, verdict

LAYERS, WIDTH = 24, 1024  # GPT-2 medium: 0.35 B parameters, 1.4 GB
LARGE_LAYERS = 42  # 2.3 GB
TINY = (2, 64)
SECOND_FASTER = 20  # times that the second export is meant to be faster than torch's
TOLERANCE = 1e-4  # of the logits, against the largest
_STEPS = str(HERE / "export_steps.py")
_SECOND, _COPIED = "surgery export-onnx --graph, beside the weights", "surgery export-onnx --graph, with a copy"
_FIRST, _CHECKED = "surgery export-onnx --no-verify", "surgery export-onnx"
_TEMPLATE, _TORCH, _COPY = "surgery export-onnx --template", "torch.onnx.export + save", "floor of a copy: cp"
_OUT = {
    _SECOND: "merged/model.onnx",
    _COPIED: "out-second/model.onnx",
    _FIRST: "out-first/model.onnx",
    _TEMPLATE: "out-template/model.onnx",
    _CHECKED: "out-checked/model.onnx",
    _TORCH: "out-torch/model.onnx",
}
_OURS, _THEIRS = "base-onnx/model.onnx", "base-torch/model.onnx"  # the base's graph


def contenders() -> tuple[Contender, ...]:
    """Ours, and torch's."""
    ours = {
        _SECOND: ("merged", "--graph", _OURS),
        _COPIED: ("merged", "--graph", _OURS),
        _FIRST: ("merged", "--no-verify"),
        _TEMPLATE: ("merged", "--template", _THEIRS, "--base", "base"),
        _CHECKED: ("merged",),
    }
    weights = "merged/model.safetensors"
    made = [
        Contender(
            name,
            (SURGERY, "export-onnx", *words, "-o", _OUT[name], "--json"),
            reads=(weights, "base/model.safetensors", f"{_THEIRS}.data") if name == _TEMPLATE else (weights,),
            writes=_written(name),
        )
        for name, words in ours.items()
    ]
    theirs = (PYTHON, _STEPS, "torch", "merged", _OUT[_TORCH])
    copied = "out-cp/model.safetensors"
    return (
        *made,
        Contender(_TORCH, theirs, reads=(weights,), writes=_written(_TORCH)),
        Contender(_COPY, (*CP, weights, copied), reads=(weights,), writes=copied),
    )


def _written(name: str) -> str:
    """What an export writes: its folder, or in the model's own the graph alone."""
    return _OUT[name] if name == _SECOND else str(Path(_OUT[name]).parent)


def prepare(folder: Path, layers: int, width: int) -> None:
    """Base, adapter, merged, and the base's graph, by torch and by us."""
    if (folder / "base-onnx").exists():
        return
    print(f"generating a model of {layers} layers", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _step("generate", str(folder), str(layers), str(width))
    _step("torch", "base", _THEIRS, cwd=folder)
    for words in (
        ("merge", "base", "adapter", "-o", "merged"),
        ("export-onnx", "base", "-o", _OURS, "--no-verify"),
    ):
        subprocess.run([SURGERY, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def check(folder: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Each export's logits beside torch's own.

    Raises:
        WrongAnswer: one of ours is not torch's, or its graph is not the one of the base, byte for byte.
    """
    graphs = [_OUT[name] for name in names]
    rows: list[dict[str, Any]] = json.loads(_step("check", "merged", *graphs, cwd=folder))
    for name, row in zip(names, rows, strict=True):
        row["export"] = name
        row["graph"] = "its own"
        if name != _TORCH:
            graph = _THEIRS if name == _TEMPLATE else _OURS
            own = "the base's, bytes" if name != _SECOND else "the base's, weights elsewhere"
            same = name == _SECOND or filecmp.cmp(folder / _OUT[name], folder / graph, shallow=False)
            if name == _SECOND:
                subprocess.run([SURGERY, "prove", graph, _OUT[name]], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            if not same or row["difference from torch"] > TOLERANCE:
                raise WrongAnswer(f"an export that is not the model: {row}, the base's graph: {same}")
            row["graph"] = own
    return rows


def large(folder: Path) -> str:
    """Exports a model beyond 2 GB without comparing and runs it; what was found, in a line."""
    prepare(folder, LARGE_LAYERS, WIDTH)
    ways = (_SECOND, _COPIED, _FIRST, _TEMPLATE)
    for contender in contenders():
        if contender.name in ways:
            subprocess.run(contender.argv, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    rows = check(folder, ways)
    worst = max(row["difference from torch"] for row in rows)
    size = rows[0]["bytes"] / 1e9
    return (
        f"a model of {size:.2f} GB was exported onto its base's graph, beside its weights and with a copy, by trace "
        f"and by template: {worst:.1e} from torch"
    )


def _step(*words: str, cwd: Path | None = None) -> str:
    done = subprocess.run([PYTHON, _STEPS, *words], cwd=cwd, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def targets(rows: list[report.Row]) -> list[str]:
    """Each target, and whether it was met."""
    row = {each.contender: each for each in rows}
    theirs, first, copied = row[_TORCH], row[_FIRST], row[_COPIED]
    assert theirs.own_ratio is not None
    assert theirs.own_s is not None
    assert copied.own_s is not None
    slower = (
        first.wall_s.median / theirs.wall_s.median
    )  # whole processes: both trace, and only torch's loads the weights
    share = first.peak_rss_bytes / theirs.peak_rss_bytes
    faster = theirs.own_ratio.median
    with_copy = theirs.own_s.median / copied.own_s.median
    most = theirs.own_s.median / row[_COPY].wall_s.median
    return [
        verdict(
            f"torch's time at least {SECOND_FASTER} × the second export's, beside the weights",
            faster >= SECOND_FASTER,
            f"{faster:.0f} ×",
        ),
        verdict(
            f"torch's time at least {SECOND_FASTER} × the second export's with a copy",
            with_copy >= SECOND_FASTER,
            f"{with_copy:.1f} ×; of cp alone it is {most:.1f} ×",
        ),
        verdict("the first export's time at most torch's, as whole processes", slower <= 1, f"{slower:.2f} ×"),
        verdict("the first export's peak memory at most half of torch's", share <= 0.5, f"{share:.2f} ×"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, help="keep models and exports here [a temporary directory]")
    parser.add_argument("--rounds", type=int, default=3, help="times each command runs [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, no results kept")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for what was measured")
    options = parser.parse_args()
    try:
        with session.work_folder(options.work) as work:
            _run(options, work)
    except (CommandFailed, WrongAnswer, subprocess.CalledProcessError) as error:
        sys.exit(f"export: {error}")


def _run(options: argparse.Namespace, work: Path) -> None:
    tiny, full = work / "tiny", work / "medium"
    prepare(tiny, *TINY)
    commands = contenders()
    runs: list[Run] = measure(commands, tiny, rounds=1, label="rehearsal")
    folder, remark = tiny, ""
    if not options.quick:
        folder = full
        prepare(full, LAYERS, WIDTH)
        runs = measure(commands, full, options.rounds)
    answers = check(folder, tuple(_OUT))
    rows = report.summarise(runs, commands, "")
    size = (folder / "merged" / "model.safetensors").stat().st_size
    if not options.quick:
        for name in _OUT:
            if name != _SECOND:
                shutil.rmtree(full / _written(name))  # room for the large one
        remark = large(work / "large")
    packages = ("model-surgery", "torch", "transformers", "onnx", "onnxscript", "onnxruntime-gpu")
    found = session.conditions({"surgery": (PYTHON, packages)})
    remarks = [
        f"{found['date']}, commit {found['commit'] or 'unknown'}; {session.machine(found)}",
        f"median (least–most) of {1 + max(run.round for run in runs)} rounds; ratios are taken within a round; without "
        "imports and, for torch, without loading the model",
        session.company(report.others_share(runs, found["machine"]["cores"])),
        *([] if options.quick else targets(rows)),
        *([remark] if remark else []),
        *session.installed(found),
    ]
    title = f"export to ONNX of a merged GPT-2-medium-shaped model, {size / 1e6:.0f} MB, float32"
    sheets = [report.timings(title, rows), report.answers("Answers", answers)]
    report.show(sheets, remarks)
    if options.quick:
        return
    shown = {contender.name: contender.shown for contender in commands}
    document = {
        "benchmark": "export",
        "title": title,
        **found,
        "commands": shown,
        "table": rows,
        "answers": answers,
        "large": remark,
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    page = report.as_markdown(sheets, shown, remarks)
    report.write(options.results, f"{found['date']}-export", report.as_json(document), page)


if __name__ == "__main__":
    main()
