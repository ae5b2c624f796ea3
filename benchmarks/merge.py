"""Times `surgery merge` of a rank-16 adapter of all linear weights against PEFT, and checks every merged element.

The floor is cp, and cp with the data on disk at the end: surgery puts its output there before it names it, PEFT and
cp leave it in the page cache.

    python benchmarks/merge.py --layers 42             # 4 GB; the results get a name of their own
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import session
from model import ALPHA, RANK, Shape
from processes import Contender
from report import Row
from session import CP, HERE, PYTHON, SURGERY, Comparison, WrongAnswer, verdict

if TYPE_CHECKING:
    import torch

_FILES = ("base/model.safetensors", "adapter/adapter_model.safetensors")
_OURS, _THEIRS, _COPY, _SYNCED = "out/surgery-merge", "out/peft-merge", "out/copy.safetensors", "out/synced.safetensors"
_UNDOABLE = "out/surgery-undo"
_SURGERY, _WITH_UNDO, _PEFT = "surgery merge", "surgery merge --undo", "PEFT merge_and_unload, save_pretrained"
_FLOOR = "floor: cp"
_COLD, _COLD_FLOOR = f"{_WITH_UNDO}, from disk", f"{_FLOOR}, from disk"
FASTER = 3.5  # times that we mean to be faster than PEFT, as whole processes
NEAR = 4.0  # times cp that we mean to take at most, without imports, undo file included
SMALL = 700_000_000  # bytes of peak RSS, whatever the model's size
_ROWS = 512  # of a block
_DISCARDED = 45  # mantissa bits of float64 that bfloat16 lacks


def comparison() -> Comparison:
    """Both tools with their defaults, each in a fresh process."""
    return Comparison(
        name="merge",
        title=f"merge, rank {RANK}, all linear weights",
        contenders=(
            Contender(
                _SURGERY,
                (SURGERY, "merge", "base", "adapter", "-o", _OURS, "--json"),
                reads=_FILES,
                writes=_OURS,
            ),
            _undoable(_WITH_UNDO, cold=False),
            Contender(
                _PEFT,
                (PYTHON, str(HERE / "peft_merge.py"), "base", "adapter", _THEIRS),
                reads=_FILES,
                writes=_THEIRS,
            ),
            Contender(_FLOOR, (*CP, _FILES[0], _COPY), reads=_FILES[:1], writes=_COPY),
            _undoable(_COLD, cold=True),
            Contender(_COLD_FLOOR, (*CP, _FILES[0], _COPY), reads=_FILES[:1], writes=_COPY, cold=True),
            Contender(
                "floor: cp and sync",
                ("sh", "-c", f"{' '.join(CP)} {_FILES[0]} {_SYNCED} && sync {_SYNCED}"),
                reads=_FILES[:1],
                writes=_SYNCED,
            ),
        ),
        check=check,
        environments={
            "surgery": (PYTHON, ("model-surgery", "torch", "numpy", "safetensors")),
            "PEFT": (PYTHON, ("peft", "torch", "transformers", "safetensors")),
        },
        targets=targets,
    )


def _undoable(name: str, *, cold: bool) -> Contender:
    return Contender(
        name,
        (
            *(SURGERY, "merge", "base", "adapter", "-o", f"{_UNDOABLE}/merged"),
            *("--undo", f"{_UNDOABLE}/undo.safetensors", "--json"),
        ),
        reads=_FILES,
        writes=_UNDOABLE,
        cold=cold,
    )


def targets(rows: Sequence[Row], layers: int) -> list[str]:
    """What we aim at, and whether this run got there: PEFT in the model of 0.4 B, cp where the model is large."""
    by_name = {row.contender: row for row in rows}
    ours, undoable = by_name[_SURGERY], by_name[_WITH_UNDO]
    faster = by_name[_PEFT].wall_ratio
    peak = max(ours.peak_rss_bytes, undoable.peak_rss_bytes)
    said = []
    if layers <= Shape.layers:
        said.append(verdict(f"PEFT's wall time at least {FASTER} × ours", faster.median >= FASTER, f"{faster} ×"))
    near_floor = ((undoable, by_name[_FLOOR]), (by_name[_COLD], by_name[_COLD_FLOOR]))
    for undo, floor in near_floor if layers > Shape.layers else ():
        assert undo.own_s is not None
        near = undo.own_s.median / floor.wall_s.median
        of = f"{undo.contender}, less imports, at most {NEAR} × {floor.contender}"
        said.append(verdict(of, near <= NEAR, f"{near:.2f} × by the medians"))
    return [
        *said,
        verdict(f"peak RSS at most {SMALL / 1e6:.0f} MB", peak <= SMALL, f"{peak / 1e6:.0f} MB"),
    ]


def check(folder: Path) -> list[dict[str, Any]]:
    """Every element of both outputs against W0 + s·BA in float64, rounded once.

    Raises:
        WrongAnswer: other names than the base's, an unmerged tensor that changed, or an element of ours that is
            further from PEFT's than one unit in the last place of the terms.
    """
    from safetensors import safe_open

    with (
        safe_open(folder / _FILES[0], framework="pt") as base,
        safe_open(folder / _FILES[1], framework="pt") as adapter,
        safe_open(folder / _OURS / "model.safetensors", framework="pt") as ours,
        safe_open(folder / _THEIRS / "model.safetensors", framework="pt") as theirs,
    ):
        if not set(base.keys()) == set(ours.keys()) == set(theirs.keys()):
            raise WrongAnswer("the outputs hold other tensors than the base")
        total = _Counts()
        for name in base.keys():  # noqa: SIM118 - the file is no mapping
            prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if f"{prefix}A.weight" in adapter.keys():  # noqa: SIM118
                factors = adapter.get_tensor(f"{prefix}B.weight"), adapter.get_tensor(f"{prefix}A.weight")
                total.add(name, base.get_tensor(name), *factors, ours.get_tensor(name), theirs.get_tensor(name))
            elif not base.get_tensor(name).equal(ours.get_tensor(name)):
                raise WrongAnswer(f"{name} changed, though the adapter has nothing for it")
    undoable = folder / _UNDOABLE
    if not filecmp.cmp(folder / _OURS / "model.safetensors", undoable / "merged/model.safetensors", shallow=False):
        raise WrongAnswer("with --undo the merge is another")
    share = (undoable / "undo.safetensors").stat().st_size / (2 * total.elements)
    undo = {"merged by": "bytes of the undo file ÷ the merged tensors'", "elements": total.elements}
    return [*total.rows(), undo | {"not the nearest bfloat16": "", "share": share}]


class _Counts:
    """Elements seen so far, and how many of each tool's are not the float64 reference rounded once."""

    def __init__(self) -> None:
        self.elements = 0
        self.wrong = {"surgery": 0, "PEFT": 0}

    def add(
        self,
        name: str,
        weight: torch.Tensor,
        lora_b: torch.Tensor,
        lora_a: torch.Tensor,
        ours: torch.Tensor,
        theirs: torch.Tensor,
    ) -> None:
        """One merged weight; raises WrongAnswer."""
        wide_b, wide_a = lora_b.double(), lora_a.double()  # (out, rank), (rank, in)
        for rows in _blocks(weight.shape[0]):
            base, delta = weight[rows].double(), wide_b[rows] @ wide_a * (ALPHA / RANK)  # (rows, in)
            mine, peer = ours[rows].double(), theirs[rows].double()
            exact = _nearest_bfloat16(base + delta)
            self.elements += exact.numel()
            self.wrong["surgery"] += int((mine != exact).sum())
            self.wrong["PEFT"] += int((peer != exact).sum())
            # PEFT computes in float32, so where the terms cancel its error is relative to them and not to their sum.
            largest = base.abs().maximum(delta.abs()).maximum(mine.abs()).maximum(peer.abs())
            if not bool(((mine - peer).abs() <= _unit_in_last_place(largest)).all()):
                raise WrongAnswer(f"{name} is further from PEFT's than one unit in the last place")

    def rows(self) -> list[dict[str, Any]]:
        """For the table."""
        return [
            {"merged by": tool, "elements": self.elements, "not the nearest bfloat16": wrong}
            | {"share": wrong / self.elements}
            for tool, wrong in self.wrong.items()
        ]


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(begin, begin + _ROWS) for begin in range(0, rows, _ROWS))


def _nearest_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """float64 rounded to bfloat16's seven mantissa bits, ties to even, on the bits themselves and still float64: a
    way of its own, not the one that is checked. For normal values."""
    import torch

    bits = values.view(torch.int64)
    odd = (bits >> _DISCARDED) & 1
    return ((bits + odd + ((1 << (_DISCARDED - 1)) - 1)) >> _DISCARDED << _DISCARDED).view(torch.float64)


def _unit_in_last_place(values: torch.Tensor) -> torch.Tensor:
    """Of bfloat16 at these magnitudes."""
    import torch

    _, exponent = torch.frexp(values)  # 0.5 ≤ mantissa < 1
    return torch.ldexp(torch.ones_like(values), exponent - 8)


def main() -> None:
    options = session.parser(__doc__.partition("\n")[0], rounds=7).parse_args()
    session.run(comparison(), options)


if __name__ == "__main__":
    main()
