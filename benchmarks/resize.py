"""Times `surgery resize` from rank 64 to 8 against the decomposition of B·A itself, and checks every residual.

    python benchmarks/resize.py --modules 4     # 4096 × 4096 each; a dense SVD takes most of a minute for each of them

A dense SVD is what kohya's resize_lora.py did, and does with `--svd_lowrank_niter 0`; by default it now takes a
randomised one. The adapter is generated, in bfloat16: Gaussian factors, weighed so that the spectrum falls slowly.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import report
import session
from processes import CommandFailed, Contender, measure
from session import HERE, PYTHON, SURGERY, WrongAnswer, verdict

RANK, NEW = 64, 8
SIDE, TINY_SIDE = 4096, 128
FASTER = 100  # times that we mean to be faster than the dense way, without imports
TOLERANCE = 1.0001  # our residual against the optimum's
_WEIGHTS = "adapter/adapter_model.safetensors"
_OURS, _DENSE, _RANDOM = "surgery resize", "torch.linalg.svd of B·A", "torch.svd_lowrank of B·A, kohya's default"
_OUT = {_OURS: "out/surgery.st", _DENSE: "out/dense.st", _RANDOM: "out/random.st"}


def contenders() -> tuple[Contender, ...]:
    """Ours, and the peer's two ways."""
    peers = [
        Contender(
            name,
            (PYTHON, str(HERE / "resize_peers.py"), niter, str(NEW), _WEIGHTS, _OUT[name]),
            reads=(_WEIGHTS,),
            writes=_OUT[name],
        )
        for name, niter in ((_DENSE, "0"), (_RANDOM, "2"))
    ]
    ours = (SURGERY, "resize", "--rank", str(NEW), "adapter", "-o", _OUT[_OURS], "--json")
    return (Contender(_OURS, ours, reads=(_WEIGHTS,), writes=_OUT[_OURS]), *peers)


def write_adapter(folder: Path, side: int, modules: int) -> None:
    """The adapter that everybody resizes."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    falling = (1 + torch.arange(RANK)) ** -0.5
    tensors = {}
    for number in range(modules):
        key = f"base_model.model.layers.{number}.proj.lora_"
        tensors[f"{key}A.weight"] = (torch.randn(RANK, side, generator=generator) / 64).bfloat16()
        tensors[f"{key}B.weight"] = (falling * torch.randn(side, RANK, generator=generator) / 64).bfloat16()
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def check(folder: Path) -> list[dict[str, Any]]:
    """‖ΔW − BA‖/‖ΔW‖ of each, formed in float64, beside that of the exact decomposition by numpy.

    Raises:
        WrongAnswer: ours beyond TOLERANCE times the optimum and the rounding to bfloat16, which is told apart.
    """
    import numpy as np
    import torch
    from safetensors.torch import load_file

    before = load_file(folder / _WEIGHTS)
    after = {name: load_file(folder / out) for name, out in _OUT.items()}
    rows = []
    for key in sorted(key for key in before if ".lora_A." in key):
        other = key.replace(".lora_A.", ".lora_B.")
        a, b = before[key].double(), before[other].double()
        core = np.linalg.qr(b.numpy())[1] @ np.linalg.qr(a.numpy().T)[1].T
        values = np.linalg.svd(core, compute_uv=False)
        delta = b @ a
        row: dict[str, Any] = {"weight": key.split(".lora_A.")[0].removeprefix("base_model.model.")}
        row["optimum"] = float(np.sqrt((values[NEW:] ** 2).sum() / (values**2).sum()))
        for name, tensors in after.items():
            left = torch.linalg.norm(delta - tensors[other].double() @ tensors[key].double())
            row[name] = float(left / torch.linalg.norm(delta))
        rows.append(row)
        if not row[_OURS] <= TOLERANCE * row["optimum"]:
            raise WrongAnswer(f"the residual exceeds {TOLERANCE} × the optimum: {row}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, help="keep adapter and outputs here [a temporary directory]")
    parser.add_argument("--modules", type=int, default=4, help="of the adapter [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="times each command runs [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="a tiny adapter, one round, no results kept")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for what was measured")
    parser.add_argument("--generate", nargs=3, metavar=("FOLDER", "SIDE", "MODULES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.generate:  # a process of its own: the one that measures must stay small
        folder, side, modules = options.generate
        write_adapter(Path(folder), int(side), int(modules))
        return
    try:
        with session.work_folder(options.work) as work:
            _run(options, work)
    except (CommandFailed, WrongAnswer) as error:
        sys.exit(f"resize: {error}")


def _run(options: argparse.Namespace, work: Path) -> None:
    tiny, full = work / "tiny", work / f"{options.modules}-modules"
    for folder, side, modules in ((tiny, TINY_SIDE, 1), (full, SIDE, options.modules)):
        if not (options.quick and folder == full):
            subprocess.run([PYTHON, __file__, "--generate", folder, str(side), str(modules)], check=True)
    commands = contenders()
    measure(commands, tiny, rounds=1, label="rehearsal")
    folder, side, rounds = (tiny, TINY_SIDE, 1) if options.quick else (full, SIDE, options.rounds)
    runs = measure(commands, folder, rounds)
    answers = check(folder)
    rows = report.summarise(runs, commands, "")
    found = session.conditions({"surgery": (PYTHON, ("model-surgery", "torch", "numpy", "safetensors"))})
    dense = next(row for row in rows if row.contender == _DENSE).own_ratio
    assert dense is not None
    remarks = [
        f"{found['date']}, commit {found['commit'] or 'unknown'}; {session.machine(found)}",
        f"median (least–most) of {rounds} rounds; ratios are taken within a round",
        session.company(report.others_share(runs, found["machine"]["cores"])),
        verdict(f"the dense way's time at least {FASTER} × ours", dense.median >= FASTER, f"{dense} ×"),
        *session.installed(found),
    ]
    title = f"resize, rank {RANK} to {NEW}, {len(answers)} weights of {side} × {side}, bfloat16"
    sheets = [report.timings(title, rows), report.answers("Residuals ‖ΔW − BA‖/‖ΔW‖", answers)]
    report.show(sheets, remarks)
    if options.quick:
        return
    shown = {contender.name: contender.shown for contender in commands}
    document = {
        "benchmark": "resize",
        "title": title,
        **found,
        "commands": shown,
        "table": rows,
        "answers": answers,
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    page = report.as_markdown(sheets, shown, remarks)
    report.write(options.results, f"{found['date']}-resize", report.as_json(document), page)


if __name__ == "__main__":
    main()
