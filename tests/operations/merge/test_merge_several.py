"""Several adapters in one merge: summed, rounded once, whatever their order; and taken off together."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from lora_by_hand import lora
from miniature import weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from formats import DType
from formats.errors import CorruptFile
from surgery.errors import AlreadyMerged, NothingToDo, NotMergeable, NotMerged
from surgery.exact.rounding import round_once
from surgery.receipts.receipt import RECEIPT, Receipt

WEIGHT = "layers.0.up.weight"


def factors(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Factors of rank 2 for the miniature's first linear layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.up.lora_A.weight": torch.randn(2, 16, generator=generator),
        "layers.0.up.lora_B.weight": scale * torch.randn(48, 2, generator=generator),
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The miniature in bfloat16."""
    save_file(weights(dtype=torch.bfloat16), tmp_path / "base.st", metadata={"format": "pt"})
    return tmp_path / "base.st"


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Three adapters of the same layer."""
    return [lora(tmp_path / f"a{seed}", factors(seed, 10.0**-seed)) for seed in range(3)]


def test_their_order_does_not_show(base: Path, three: list[Path], tmp_path: Path, cli_json: Callable[..., Any]) -> None:
    """Every order, on the command line and in the library: one file, byte for byte."""
    for index, order in enumerate(itertools.permutations(zip(three, (1.0, 0.5, -2.0), strict=True))):
        surgery.merge(base, order, tmp_path / f"{index}.st")
    report = cli_json("merge", base, f"{three[1]}:0.5", three[0], f"{three[2]}:-2", "-o", tmp_path / "cli.st")
    assert len({path.read_bytes() for path in [tmp_path / "cli.st", *(tmp_path / f"{i}.st" for i in range(6))]}) == 1
    assert len(report["adapters"]) == 3


def test_the_sum_is_rounded_once(base: Path, three: list[Path], tmp_path: Path) -> None:
    """Against float64, to the last bit but for the odd element; --weight is a factor of every weight."""
    surgery.merge(base, [three[0], (three[1], 0.5), three[2]], tmp_path / "m.st", weight=0.25)
    exact = weights(dtype=torch.bfloat16)[WEIGHT].double()
    for seed, own in enumerate((1.0, 0.5, 1.0)):
        a, b = factors(seed, 10.0**-seed).values()
        exact += 0.25 * own * 2 * b.double() @ a.double()
    merged = load_file(tmp_path / "m.st")[WEIGHT]
    assert int((merged != round_once(exact, DType.BF16)).sum()) <= 1


def test_the_receipt_names_all_and_they_come_off_together(base: Path, three: list[Path], tmp_path: Path) -> None:
    """With the receipt's weights; a part of them, or other weights, are refused; merged again are refused too."""
    surgery.merge(base, [three[0], (three[1], 0.5)], tmp_path / "m.st")
    with safe_open(tmp_path / "m.st", "pt") as file:
        receipt = Receipt.parse(file.metadata()[RECEIPT], "m.st")
    assert sorted(merged.weight for merged in receipt.adapters) == [0.5, 1.0]
    with pytest.raises(NotMerged, match="all adapters of one merge come off together"):
        surgery.unmerge(tmp_path / "m.st", three[0], tmp_path / "b.st")
    with pytest.raises(NotMerged, match="another weight"):
        surgery.unmerge(tmp_path / "m.st", [three[0], (three[1], 0.6)], tmp_path / "b.st")
    with pytest.raises(AlreadyMerged):
        surgery.merge(tmp_path / "m.st", [three[2], three[1]], tmp_path / "mm.st")
    surgery.merge(tmp_path / "m.st", three[2], tmp_path / "mm.st")
    surgery.unmerge(tmp_path / "mm.st", three[2], tmp_path / "again.st")
    surgery.unmerge(tmp_path / "again.st", [three[1], three[0]], tmp_path / "b.st")
    back, before = load_file(tmp_path / "b.st")[WEIGHT], weights(dtype=torch.bfloat16)[WEIGHT]
    torch.testing.assert_close(back, before, rtol=0.02, atol=0.1)


def test_a_receipt_with_other_hashes_is_refused(base: Path, three: list[Path], tmp_path: Path) -> None:
    """Those of an earlier version were SHA-256: nothing of them could be compared."""
    surgery.merge(base, (three[0], 0.5), tmp_path / "m.st")
    with safe_open(tmp_path / "m.st", "pt") as file:
        document = json.loads(file.metadata()[RECEIPT])
    del document["hash"]
    save_file(load_file(tmp_path / "m.st"), tmp_path / "old.st", metadata={RECEIPT: json.dumps(document)})
    with pytest.raises(CorruptFile, match="receipt cannot be read") as caught:
        surgery.unmerge(tmp_path / "old.st", three[0], tmp_path / "b.st")
    assert "version of surgery that wrote" in caught.value.details["next"]


def test_two_that_replace_one_tensor_are_refused(base: Path, tmp_path: Path) -> None:
    """Naming both; nothing is written."""
    saved = [
        lora(tmp_path / name, factors(seed) | {"layers.0.norm.weight": torch.zeros(16)}, modules_to_save=["norm"])
        for seed, name in enumerate(("one", "two"))
    ]
    with pytest.raises(NotMergeable, match="replace the same tensor") as caught:
        surgery.merge(base, saved, tmp_path / "m.st")
    assert "one" in caught.value.details["found"]
    assert "two" in caught.value.details["found"]
    assert not (tmp_path / "m.st").exists()


def test_the_same_adapter_twice_is_refused(base: Path, three: list[Path], tmp_path: Path) -> None:
    """Under another name too; both are named."""
    copy = lora(tmp_path / "copy", factors(0))
    with pytest.raises(NotMergeable, match="same adapter is given twice") as caught:
        surgery.merge(base, [three[0], (copy, 0.5)], tmp_path / "m.st")
    assert str(copy) in str(caught.value)
    assert str(three[0]) in str(caught.value)


def test_dora_stays_alone_on_its_weight(base: Path, three: list[Path], tmp_path: Path) -> None:
    """It is no delta; beside one that adapts other weights it is welcome."""
    dora = lora(
        tmp_path / "dora",
        factors(7) | {"layers.0.up.lora_magnitude_vector": torch.ones(48)},
        use_dora=True,
        target_modules=["up"],
    )
    with pytest.raises(NotMergeable, match="nothing can be added beside it"):
        surgery.merge(base, [dora, three[0]], tmp_path / "m.st")
    down = {"layers.0.down.lora_A.weight": torch.ones(2, 48), "layers.0.down.lora_B.weight": torch.ones(16, 2)}
    report = surgery.merge(base, [dora, lora(tmp_path / "down", down)], tmp_path / "m.st")
    assert report.ledger["merged"] == 2


@pytest.mark.parametrize(("weight", "message"), [("0", "changes? nothing|would change nothing"), ("nan", "not finite")])
def test_a_weight_that_means_nothing_is_refused(
    base: Path, three: list[Path], tmp_path: Path, cli: Callable[..., Result], weight: str, message: str
) -> None:
    """Zero would leave an adapter out without a word; nan is no factor."""
    with pytest.raises((NothingToDo, surgery.SurgeryError), match=message):
        surgery.merge(base, [three[0], (three[1], float(weight))], tmp_path / "m.st")
    assert cli("merge", base, three[0], f"{three[1]}:{weight}", "-o", tmp_path / "m.st").exit_code == 1


def test_a_colon_in_a_path_is_no_weight_where_the_path_is_there(base: Path, tmp_path: Path, cli_json: Any) -> None:
    """`run:2` is the folder of that name."""
    adapter = lora(tmp_path / "run:2", factors(0))
    merged = cli_json("merge", base, adapter, "-o", tmp_path / "m.st")
    assert merged["digest"] == surgery.merge(base, adapter, tmp_path / "m1.st").digest
