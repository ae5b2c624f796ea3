"""combine: several adapters into one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from peft_oracle import Everything, Mixture
from recasting import PLAIN, adapter, deltas, loaded, matrix
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import NothingToDo, NotMergeable, SurgeryError, Unsupported

X = torch.randint(0, 7, (3, 4), generator=torch.Generator().manual_seed(5))
DENSE = ("ties", "dare", "magnitude-prune")


def two(folder: Path, **settings: Any) -> tuple[Path, Path]:
    """Adapters of one base, of different ranks and scalings, not of the same layers."""
    one = adapter(folder, "a", 1, r=3, lora_alpha=5, **settings)
    other = adapter(folder, "b", 2, r=4, use_rslora=True, **{"target_modules": PLAIN, **settings})
    return one, other


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-6) -> None:
    """Within so much of each delta's norm."""
    assert found.keys() == expected.keys()
    for name in found:
        assert float((found[name] - expected[name]).norm()) <= rtol * float(expected[name].norm()), name


def test_cat_is_the_sum(tmp_path: Path) -> None:
    """Merging it is merging all at once, to float32's rounding of its factors; the ranks add up."""
    one, other = two(tmp_path)
    report = surgery.combine([(one, 0.7), (other, -0.3)], tmp_path / "c", how="cat")
    assert_same(deltas(tmp_path, tmp_path / "c"), deltas(tmp_path, (one, 0.7), (other, -0.3)))
    assert {module.name: module.rank for module in report.modules} == {
        "wte.weight": 3,
        "conv1d.weight": 7,
        "linear.weight": 7,
        "conv.weight": 3,
    }
    assert report.residual < 1e-7
    assert report.rule is None
    surgery.merge(tmp_path / "base.st", tmp_path / "c", tmp_path / "merged.st")
    model, adapted = Everything(), loaded(tmp_path, tmp_path / "c")
    model.load_state_dict(load_file(tmp_path / "merged.st"))
    with torch.no_grad():
        torch.testing.assert_close(model(X), adapted(X), atol=1e-5, rtol=1e-4)


def products(path: Path, scale: float) -> dict[str, torch.Tensor]:
    """scale · BA of each layer, in float64 from the stored factors."""
    tensors = load_file(path / "adapter_model.safetensors")
    pairs = {key: key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B") for key in tensors}
    return {
        key.partition(".lora_")[0]: scale * (tensors[b].double().flatten(1) @ tensors[key].double().flatten(1))
        for key, b in pairs.items()
        if key != b
    }


def test_cat_equals_adding_one_after_another_in_float64(tmp_path: Path) -> None:
    """Factors in float64: one product for two, within its rounding, also with a negative weight."""
    one, other = two(tmp_path)
    for path in (one, other):
        file = path / "adapter_model.safetensors"
        save_file({key: tensor.double() for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    report = surgery.combine([(one, 0.7), (other, -0.3)], tmp_path / "c", how="cat")
    assert report.residual < 1e-15
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    expected = products(one, 0.7 * 5 / 3)
    for layer, product in products(other, -0.3 * 6 / 4**0.5).items():
        expected[layer] = expected[layer] + product
    found = products(tmp_path / "c", 1.0)
    assert found.keys() == expected.keys()
    for layer, product in expected.items():
        torch.testing.assert_close(found[layer], product, atol=1e-14, rtol=1e-13)


def test_the_order_does_not_show(tmp_path: Path) -> None:
    """The same bytes whichever adapter comes first, for any number of threads."""
    one, other = two(tmp_path)
    for how, settings in (("cat", {}), ("svd", {"rank": 2}), ("dare", {"rank": 2}), ("ties", {"rank": 2})):
        for jobs, pair in enumerate([[(one, 0.7), (other, 0.3)], [(other, 0.3), (one, 0.7)]], start=1):
            resources = surgery.Resources(jobs=jobs)
            surgery.combine(pair, tmp_path / f"{how}{jobs}.st", how=how, resources=resources, **settings)
        assert (tmp_path / f"{how}1.st").read_bytes() == (tmp_path / f"{how}2.st").read_bytes()


def test_cat_rounds_nothing_it_need_not(tmp_path: Path) -> None:
    """bfloat16 factors stay bfloat16 where every scaling is a power of two, and become float32 otherwise."""
    paths = []
    for seed, name in enumerate("ab"):
        path = adapter(tmp_path, name, seed, lora_alpha=8)
        tensors = {key: tensor.bfloat16() for key, tensor in load_file(path / "adapter_model.safetensors").items()}
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        paths.append(path)
    for weight, dtype in ((0.5, torch.bfloat16), (0.3, torch.float32)):
        report = surgery.combine([(path, weight) for path in paths], tmp_path / f"{weight}", how="cat")
        found = load_file(tmp_path / f"{weight}" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in found.values()} == {dtype}
        assert report.residual == 0 or dtype is torch.float32
    report = surgery.combine([(path, 0.3) for path in paths], tmp_path / "c", how="cat", dtype="bfloat16")
    assert 0 < report.residual < 1e-2


def test_svd_is_the_optimum_of_the_sum(tmp_path: Path) -> None:
    """At rank 2, within 1e-6 of the dense SVD's residual."""
    one, other = two(tmp_path)
    report = surgery.combine([(one, 0.7), (other, -0.3)], tmp_path / "c", how="svd", rank=2)
    total, found = deltas(tmp_path, (one, 0.7), (other, -0.3)), deltas(tmp_path, tmp_path / "c")
    for module in report.modules:
        optimum = float(torch.linalg.svdvals(matrix(total[module.name]))[2:].square().sum().sqrt())
        left = float((total[module.name] - found[module.name]).norm())
        assert left == pytest.approx(optimum, rel=1e-6)
        assert module.residual * module.delta_norm == pytest.approx(optimum, rel=1e-6)


@pytest.mark.parametrize("how", DENSE)
def test_dense_ways_reach_their_sum_at_the_whole_rank(tmp_path: Path, how: str) -> None:
    """At the full rank of each weight what is written is the pruned sum itself, which the report's norm is of."""
    one, other = two(tmp_path)
    settings: dict[str, Any] = {"how": how, "density": 0.5, "rank": 64, "dtype": "float32"}
    report = surgery.combine([one, other], tmp_path / "c", **settings)
    found = deltas(tmp_path, tmp_path / "c")
    for module in report.modules:
        assert module.residual < 1e-5
        assert float(found[module.name].norm()) == pytest.approx(module.delta_norm, rel=1e-5)
    first = deltas(tmp_path, one)["wte.weight"]  # only one adapter has it
    if how != "dare":
        kept = first.abs() >= first.abs().flatten().sort(descending=True).values[first.numel() // 2 - 1]
        torch.testing.assert_close(found["wte.weight"], first * kept, rtol=1e-4, atol=1e-5)
    else:
        share = found["wte.weight"] / first
        assert (((share.abs() < 1e-4) | ((share - 2).abs() < 1e-3)).float().mean()) == 1


def test_dare_has_a_seed(tmp_path: Path) -> None:
    """Another seed drops other elements."""
    one, other = two(tmp_path)
    for seed in (0, 1):
        surgery.combine([one, other], tmp_path / f"{seed}.st", how="dare", rank=3, seed=seed)
    assert (tmp_path / "0.st").read_bytes() != (tmp_path / "1.st").read_bytes()


@pytest.mark.parametrize("how", ["svd", "ties"])
def test_a_budget_is_kept(tmp_path: Path, how: str) -> None:
    """Of thin products and of formed deltas."""
    one, other = two(tmp_path)
    report = surgery.combine([one, other], tmp_path / "c", how=how, rank=surgery.Budget(3000))
    assert report.nbytes <= 3000
    assert report.energy > 0.3


def test_experts(tmp_path: Path) -> None:
    """Each expert's sum, with the base named."""

    def build() -> torch.nn.Module:
        return Mixture(transposed=False)

    settings: dict[str, Any] = {"target_modules": ["into"], "target_parameters": ["experts.up", "experts.down"]}
    paths = [adapter(tmp_path, name, seed, build=build, **settings) for seed, name in enumerate("ab")]
    surgery.combine([(paths[0], 2.0), paths[1]], tmp_path / "c", how="cat", base=tmp_path / "base.st")
    assert_same(deltas(tmp_path, tmp_path / "c"), deltas(tmp_path, (paths[0], 2.0), paths[1]))
    with torch.no_grad():
        assert loaded(tmp_path, tmp_path / "c", build)(torch.ones(2, 4)).isfinite().all()


def test_biases(tmp_path: Path) -> None:
    """lora_bias adds up; a mix of adapters with and without is refused."""
    settings: dict[str, Any] = {"target_modules": ["linear"], "lora_bias": True}
    one, other = (adapter(tmp_path, name, seed, **settings) for seed, name in enumerate("ab"))
    surgery.combine([(one, 0.7), (other, -0.3)], tmp_path / "c", how="cat")
    assert_same(deltas(tmp_path, tmp_path / "c"), deltas(tmp_path, (one, 0.7), (other, -0.3)))
    plain = adapter(tmp_path, "d", target_modules=["linear"])
    with pytest.raises(Unsupported, match="lora_bias"):
        surgery.combine([one, plain], tmp_path / "e", how="cat")


def test_what_one_carries_in_full(tmp_path: Path) -> None:
    """It is taken over, and the report says so; what two carry is refused."""
    one = adapter(tmp_path, "a", target_modules=["linear"], modules_to_save=["conv"])
    other = adapter(tmp_path, "b", 2, target_modules=["linear"])
    report = surgery.combine([one, other], tmp_path / "c", how="cat")
    assert any("in full" in note for note in report.notes)
    assert report.ledger["copied"] == 2
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["conv"]
    assert_same(deltas(tmp_path, tmp_path / "c"), deltas(tmp_path, one, other))
    loaded(tmp_path, tmp_path / "c")
    third = adapter(tmp_path, "d", 3, target_modules=["linear"], modules_to_save=["conv"])
    with pytest.raises(NotMergeable, match="two adapters replace the same tensor"):
        surgery.combine([one, third], tmp_path / "e", how="cat")


def test_single_tokens(tmp_path: Path) -> None:
    """The rows that one adapter replaces go along; those of two are refused."""
    settings: dict[str, Any] = {"target_modules": ["linear"], "trainable_token_indices": {"wte": [1, 5]}}
    one = adapter(tmp_path, "a", **settings)
    key = "base_model.model.wte.token_adapter.trainable_tokens_delta"
    tensors = load_file(one / "adapter_model.safetensors")
    tensors[key] += 1
    save_file(tensors, one / "adapter_model.safetensors", metadata={"format": "pt"})
    other, base = adapter(tmp_path, "b", 2, target_modules=["linear"]), tmp_path / "base.st"
    surgery.combine([one, other], tmp_path / "c", how="cat", base=base)
    assert_same(deltas(tmp_path, tmp_path / "c"), deltas(tmp_path, one, other))
    surgery.resize(one, tmp_path / "d", rank=4, base=base)
    assert_same(deltas(tmp_path, tmp_path / "d"), deltas(tmp_path, one))
    loaded(tmp_path, tmp_path / "c")
    with pytest.raises(Unsupported, match="replaces tokens"):
        surgery.combine([one, adapter(tmp_path, "e", 3, **settings)], tmp_path / "f", how="cat", base=base)


def test_refused(tmp_path: Path) -> None:
    """What is no combination, or of different models: each with its reason."""
    one, other = two(tmp_path)
    out = tmp_path / "c"
    with pytest.raises(NothingToDo, match="a combination needs more than one adapter"):
        surgery.combine([one], out, how="cat")
    with pytest.raises(NothingToDo, match="weight 0"):
        surgery.combine([one, (other, 0.0)], out, how="cat")
    with pytest.raises(NotMergeable, match="the same adapter is given twice"):
        surgery.combine([one, one], out, how="cat")
    with pytest.raises(NotMergeable, match="DoRA"):
        surgery.combine([one, adapter(tmp_path, "d", use_dora=True)], out, how="cat")
    for settings, said in (
        ({"how": "cat", "rank": 3}, "ranks"),
        ({"how": "svd"}, "needs a rank"),
        ({"how": "mean"}, "no such way"),
        ({"how": "svd", "rank": 3, "density": 0.5}, "every element"),
        ({"how": "ties", "rank": 3, "density": 2.0}, "density"),
    ):
        with pytest.raises(SurgeryError, match=said):
            surgery.combine([one, other], out, **settings)
    assert not out.exists()


def test_other_bases_are_refused(tmp_path: Path) -> None:
    """By the shapes of their weights, and by the names of their bases unless one is given."""

    class Wider(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(10, 5)

    one = adapter(tmp_path, "a", target_modules=["linear"])
    (tmp_path / "wider").mkdir()
    wider = adapter(tmp_path / "wider", "b", build=Wider, target_modules=["linear"])
    with pytest.raises(surgery.FormatError, match="different shapes"):
        surgery.combine([one, wider], tmp_path / "c", how="cat")
    other = adapter(tmp_path, "d", 2, target_modules=["linear"])
    for path, name in ((one, "this"), (other, "that")):
        config = json.loads((path / "adapter_config.json").read_text()) | {"base_model_name_or_path": name}
        (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(surgery.FormatError, match="different bases"):
        surgery.combine([one, other], tmp_path / "c", how="cat")
    surgery.combine([one, other], tmp_path / "c", how="cat", base=tmp_path / "base.st")


def test_command(tmp_path: Path, cli: Callable[..., Result], cli_json: Callable[..., dict[str, Any]]) -> None:
    """Weights behind the paths; a rank where one is needed and none where it is not."""
    one, other = two(tmp_path)
    report = cli_json("combine", f"{one}:0.7", f"{other}:-0.3", "--how", "cat", "-o", tmp_path / "c")
    assert report["how"] == "cat"
    assert len(report["adapters"]) == 2
    report = cli_json("combine", one, other, "--how", "ties", "--density", 0.3, "--rank", 2, "-o", tmp_path / "d.st")
    assert report["rule"] == "rank 2"
    shown = cli("combine", one, other, "--how", "svd", "--energy", 0.9, "-o", tmp_path / "e")
    assert shown.exit_code == 0
    assert any(ranks in shown.stdout for ranks in ("3 + 4 → ", "4 + 3 → "))
    assert cli("combine", one, other, "--how", "svd", "-o", tmp_path / "f").exit_code == 2
    assert cli("combine", one, other, "--how", "cat", "--rank", 2, "-o", tmp_path / "f").exit_code == 2
    planned = cli("combine", one, other, "--how", "cat", "-o", tmp_path / "f", "--dry-run")
    assert planned.exit_code == 0
    assert not (tmp_path / "f").exists()
