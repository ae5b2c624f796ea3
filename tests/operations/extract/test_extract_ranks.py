"""extract's ways to choose a rank and its tensors: rules, overrides, budgets, patterns; and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from miniature import perturbed, weights
from safetensors.torch import load_file, save_file

import surgery
from formats.errors import UnknownTensor
from surgery.errors import ReportedError
from surgery.ranks import Bounded, EnergyRule, QuantileRule, RankRule, RatioRule, ResidualRule, ThresholdRule
from surgery.ranks.budget import Budget

pytestmark = pytest.mark.processor

DECAY = (0.5, 0.8, 0.95)  # of the singular values of each weight: one is steep, one is slow


@pytest.fixture
def spectra(tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A pair whose changes have singular values decay^i, and those values by weight."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"a.weight": (96, 64), "b.weight": (64, 96), "c.weight": (64, 64)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tuned, values = {}, {}
    for decay, (name, shape) in zip(DECAY, shapes.items(), strict=True):
        left, right = (torch.linalg.qr(torch.randn(side, 64, generator=generator).double()).Q for side in shape)
        values[name] = decay ** torch.arange(64).double()
        tuned[name] = (base[name].double() + (left * values[name]) @ right.mT).float()
    save_file(base, tmp_path / "base.st")
    save_file(tuned, tmp_path / "tuned.st")
    return tmp_path / "base.st", tmp_path / "tuned.st", values


@pytest.mark.parametrize(
    "rule",
    [EnergyRule(0.9), ResidualRule(0.4), RatioRule(4), ThresholdRule(0.3), QuantileRule(0.45),
     Bounded(EnergyRule(0.99), minimum=5, maximum=9)],
    ids=str,
)  # fmt: skip
def test_a_rule_chooses_each_weights_rank(
    spectra: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path, rule: RankRule
) -> None:
    """As it would from the whole spectrum; the config has every rank, and merging holds what the report says."""
    base, tuned, values = spectra
    report = surgery.extract(base, tuned, tmp_path / "adapter", rank=rule, dtype="float32")
    assert {module.name: module.rank for module in report.modules} == {
        name: rule(exact.numpy(), float(exact.square().sum()), len(exact)) for name, exact in values.items()
    }
    surgery.merge(base, tmp_path / "adapter", tmp_path / "merged.st")
    merged, wanted = load_file(tmp_path / "merged.st"), load_file(tuned)
    for module in report.modules:
        left_out = float((merged[module.name] - wanted[module.name]).double().norm())
        assert left_out == pytest.approx(module.residual * module.delta_norm, rel=1e-3)


def test_a_rule_that_no_small_rank_meets_carries_the_weight_in_full(
    spectra: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Factors that are larger than their weight serve nobody."""
    base, tuned, _ = spectra
    report = surgery.extract(base, tuned, tmp_path / "adapter", rank=EnergyRule(1 - 1e-6))
    assert {module.name for module in report.modules} == {"a.weight", "b.weight"}
    assert report.ledger["full"] == 1
    surgery.merge(base, tmp_path / "adapter", tmp_path / "merged.st")
    assert torch.equal(load_file(tmp_path / "merged.st")["c.weight"], load_file(tuned)["c.weight"])


def test_the_bytes_do_not_depend_on_the_number_of_threads(
    spectra: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Although what is written shrinks while others write."""
    for jobs in (1, 2, 3):
        surgery.extract(
            *spectra[:2], tmp_path / f"{jobs}.st", rank=EnergyRule(0.9), resources=surgery.Resources(jobs=jobs)
        )
    assert len({(tmp_path / f"{jobs}.st").read_bytes() for jobs in (1, 2, 3)}) == 1


def test_the_last_override_wins(spectra: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """Whatever rules the others."""
    overrides = {"*": 7, "re:[bc].*": 3}
    report = surgery.extract(*spectra[:2], tmp_path / "adapter", rank=EnergyRule(0.5), overrides=overrides)
    assert [module.rank for module in report.modules] == [7, 3, 3]


def uniform_size(folder: Path) -> int:
    """Bytes of an adapter's weights."""
    return (folder / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16])
def test_a_budget_beats_the_uniform_rank_of_its_size(
    spectra: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path, rank: int
) -> None:
    """In captured energy, and it is kept."""
    base, tuned, _ = spectra
    uniform = surgery.extract(base, tuned, tmp_path / "uniform", rank=rank)
    size = uniform_size(tmp_path / "uniform") + 600  # what the header is held to be at most
    spent = surgery.extract(base, tuned, tmp_path / "spent", rank=Budget(size))
    assert uniform_size(tmp_path / "spent") <= size
    assert spent.energy >= uniform.energy - 1e-6
    assert rank == 1 or spent.energy > uniform.energy


def test_a_budget_measures_as_far_as_it_spends(tmp_path: Path) -> None:
    """One weight takes all the rank, more than was measured of it at first."""
    base = {name: torch.zeros(200, 300) for name in ("a.weight", "b.weight")}
    generator = torch.Generator().manual_seed(0)
    tuned = {
        "a.weight": torch.randn(200, 80, generator=generator) @ torch.randn(80, 300, generator=generator),
        "b.weight": 1e-6 * torch.randn(200, 300, generator=generator),
    }
    save_file(base, tmp_path / "base.st")
    save_file(tuned, tmp_path / "tuned.st")
    report = surgery.extract(tmp_path / "base.st", tmp_path / "tuned.st", tmp_path / "a", rank=Budget(4 * 500 * 82))
    ranks = {module.name: module.rank for module in report.modules}
    assert ranks["a.weight"] >= 80 > 1 == ranks["b.weight"]
    assert report.energy > 1 - 1e-6


def test_a_budget_counts_what_goes_in_full(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The biases and norms of the miniature come first; bounds and overrides hold."""
    report = surgery.extract(*pair, tmp_path / "adapter", rank=Budget(9000, maximum=6), overrides={"*.up.weight": 2})
    assert uniform_size(tmp_path / "adapter") <= 9000
    ranks = {module.name: module.rank for module in report.modules}
    assert ranks["layers.0.up.weight"] == 2
    assert max(ranks.values()) == 6
    with pytest.raises(ReportedError, match="too small for the least ranks") as caught:
        surgery.extract(*pair, tmp_path / "small", rank=Budget(1000))
    assert "at least" in str(caught.value)
    assert not (tmp_path / "small").exists()


def test_what_is_not_chosen_is_left_behind_and_counted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The ledger still has every tensor; merging leaves those as base has them."""
    report = surgery.extract(*pair, tmp_path / "adapter", rank=2, include=["layers.*"], exclude=["*.bias"])
    assert {module.name for module in report.modules} == {"layers.0.up.weight", "layers.0.down.weight"}
    assert sum(report.ledger.values()) == len(weights())
    assert report.ledger["refused"] == 4
    assert any("are left out" in note for note in report.notes)
    surgery.merge(pair[0], tmp_path / "adapter", tmp_path / "merged.st")
    assert torch.equal(load_file(tmp_path / "merged.st")["layers.0.up.bias"], weights()["layers.0.up.bias"])


@pytest.mark.parametrize(
    "how",
    [{"include": ["*.nothing"]}, {"exclude": ["nothing.*"]}, {"overrides": {"*nothing": 4}}, {"kinds": {"no": "full"}}],
    ids=["include", "exclude", "override", "kind"],
)
def test_a_pattern_without_a_match_is_an_error(pair: tuple[Path, Path], tmp_path: Path, how: dict[str, Any]) -> None:
    """Before anything is read."""
    with pytest.raises(UnknownTensor, match="matches no tensor"):
        surgery.extract(*pair, tmp_path / "adapter", rank=2, **how)


def test_a_doubtful_kind_is_asked_for(tmp_path: Path) -> None:
    """With the flag that settles it."""
    square = {"q.weight": torch.randn(16, 16), "q.bias": torch.randn(16)}
    save_file(square, tmp_path / "base.st")
    save_file(perturbed(square), tmp_path / "tuned.st")
    with pytest.raises(ReportedError, match="is ambiguous") as caught:
        surgery.extract(tmp_path / "base.st", tmp_path / "tuned.st", tmp_path / "a", rank=2)
    assert "--kind 'q.weight=KIND'" in str(caught.value)
    surgery.extract(tmp_path / "base.st", tmp_path / "tuned.st", tmp_path / "a", rank=2, kinds={"q.*t": "transposed"})
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_dora_refuses_what_peft_has_no_form_for(tmp_path: Path) -> None:
    """Parameters outside of layers, with what to do instead."""
    tensors = {"up.weight": torch.randn(24, 16), "experts.w": torch.randn(3, 24, 16)}
    save_file(tensors, tmp_path / "base.st")
    save_file(perturbed(tensors), tmp_path / "tuned.st")
    paths = (tmp_path / "base.st", tmp_path / "tuned.st", tmp_path / "adapter")
    with pytest.raises(ReportedError, match="peft has no DoRA for parameters") as caught:
        surgery.extract(*paths, rank=2, method="dora", kinds={"experts.w": "experts"})
    assert "--kind 'experts.w=full'" in str(caught.value)
    surgery.extract(*paths, rank=2, method="dora", kinds={"experts.w": "full"})


def test_the_options_of_the_command(pair: tuple[Path, Path], tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Each reaches the library."""
    done = cli(
        "extract", *pair, "-o", tmp_path / "a", "--energy", 0.5, "--max-rank", 5, "--rank", "*.up.*=3", "--exclude",
        "*.norm.*", "--kind", "embed.*=full", "--dtype", "float32", "--exact", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["rule"] == "energy ≥ 0.5, at most 5"
    ranks = {module["name"]: module["rank"] for module in report["modules"]}
    assert ranks["layers.0.up.weight"] == 3
    assert ranks.keys() == {"layers.0.up.weight", "layers.0.down.weight"}
    assert cli("extract", *pair, "-o", tmp_path / "b", "--budget", "9kB").exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [["--rank", 4, "--energy", 0.9], ["--energy", 1.5], ["--rank", "*.x="], ["--budget", "9kB", "--rank", 4],
     ["--rank", 0], ["--kind", "linear", "--rank", 4], ["--min-rank", 9, "--max-rank", 3, "--energy", 0.5]],
    ids=lambda arguments: " ".join(map(str, arguments)),
)  # fmt: skip
def test_contradictions_are_usage_errors(
    pair: tuple[Path, Path], cli: Callable[..., Result], arguments: list[Any]
) -> None:
    """Exit code 2."""
    assert cli("extract", *pair, *arguments).exit_code == 2
