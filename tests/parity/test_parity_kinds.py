"""Convolutions, stacks of experts and parameters, with peft itself as the judge: it makes adapters that we merge, and
loads adapters written with our keys and config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import (
    Convolutions,
    Everything,
    Mixture,
    assert_merges_like_peft,
    assert_peft_agrees,
    described,
    made_by_peft,
    random,
    save_base,
)
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from formats.dialects.peft_writing import (
    bias_key,
    factor_keys,
    full_key,
    parameter_keys,
)
from formats.errors import AdapterFormatError
from formats.layers import LayerKind
from surgery.methods.lora import pack_experts

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"lora_bias": True, "target_modules": ["one", "two", "three"]},
     {"rank_pattern": {"two": 3}, "alpha_pattern": {"three": 5}}],
    ids=["plain", "rslora", "lora_bias", "patterns"],
)  # fmt: skip
def test_convolutions_merge_as_peft_merges_them(tmp_path: Path, settings: dict[str, Any]) -> None:
    """ΔW of a convolution is BA with the kernel among A's columns, in one, two and three dimensions."""
    settings = {"target_modules": ["one", "two", "point", "three"], **settings}
    assert_merges_like_peft(tmp_path, Convolutions, torch.randn(2, 4, 9), **settings)


def test_lora_on_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    """Its BA connects channels of different groups, for which the weight has no place; peft does not merge it."""
    adapted = made_by_peft(tmp_path, Convolutions, target_modules=["grouped"])
    with pytest.raises(NotImplementedError, match="groups"):
        adapted.merge_and_unload()
    with pytest.raises(AdapterFormatError, match="grouped convolution"):
        surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{"target_parameters": ["experts.down", "experts.up", "experts.also"]},
     {"target_parameters": ["experts.down", "experts.up"], "use_rslora": True, "target_modules": ["inside", "out"]},
     {"target_parameters": ["up", "experts.down"], "rank_pattern": {"experts.up": 3}, "alpha_pattern": {"down": 5}},
     {"target_parameters": ["into.weight", "experts.also"], "target_modules": ["out"]}],
    ids=["nested", "with layers", "patterns", "weights"],
)  # fmt: skip
def test_parameters_merge_as_peft_merges_them(tmp_path: Path, transposed: bool, settings: dict[str, Any]) -> None:
    """Stacks of experts in both orientations and matrices of no layer; which factors are whose is told by shape."""
    settings = {"target_modules": [], **settings}
    assert_merges_like_peft(tmp_path, lambda: Mixture(transposed=transposed), torch.randn(2, 4), **settings)


def test_square_experts_are_decided_by_what_stands_beside_them(tmp_path: Path) -> None:
    """Another parameter of the module that is adapted and not square, or the bias of one; else they are refused."""
    for index, (targets, bias) in enumerate([(["experts.down", "experts.up"], False), (["experts.down"], True)]):
        folder = tmp_path / str(index)
        folder.mkdir()
        assert_merges_like_peft(
            folder,
            lambda bias=bias: Mixture(transposed=True, width=5, bias=bias),
            torch.randn(2, 5),
            target_parameters=targets,
            target_modules=[],
        )
    made_by_peft(
        tmp_path, lambda: Mixture(transposed=True, width=5), target_parameters=["experts.down"], target_modules=[]
    )
    with pytest.raises(AdapterFormatError, match="square"):
        surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")


def test_parameters_of_one_shape_are_refused(tmp_path: Path) -> None:
    """Nothing in the file tells which factors are whose; factors that fit none are refused too."""
    targets = {"target_parameters": ["experts.down", "experts.up"], "target_modules": []}
    made_by_peft(tmp_path, lambda: Mixture(transposed=False), **targets)
    tensors = load_file(tmp_path / "base.st")
    save_file(tensors | {"experts.up": tensors["experts.down"].clone()}, tmp_path / "same.st")
    with pytest.raises(AdapterFormatError, match="fit none"):
        surgery.merge(tmp_path / "same.st", tmp_path / "adapter", tmp_path / "merged.st")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for role in ("lora_A", "lora_B"):
        inner, outer = (f"base_model.model.experts{level}.{role}.weight" for level in (".base_layer", ""))
        adapter[inner] = adapter[outer].clone()
    save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(AdapterFormatError, match="same shape"):
        surgery.merge(tmp_path / "same.st", tmp_path / "adapter", tmp_path / "merged.st")


def test_half_of_the_parameters_is_refused(tmp_path: Path) -> None:
    """One pair for two targeted parameters contradicts the config."""
    targets = {"target_parameters": ["experts.down", "experts.up"], "target_modules": []}
    made_by_peft(tmp_path, lambda: Mixture(transposed=False), **targets)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file({k: v for k, v in adapter.items() if "base_layer" in k}, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(AdapterFormatError, match="one pair for each"):
        surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_in_half_precision_they_are_within_one_unit_of_peft(tmp_path: Path, dtype: torch.dtype, ulp: float) -> None:
    """Apart by at most a unit in the last place of the largest of W0, ΔW and W."""
    models: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
        (Convolutions, {"target_modules": ["one", "two", "point", "three"]}),
        (lambda: Mixture(transposed=True), {"target_parameters": ["experts.down", "experts.up"], "target_modules": []}),
    ]
    for index, (build, settings) in enumerate(models):
        folder = tmp_path / str(index)
        folder.mkdir()
        adapted = made_by_peft(folder, build, dtype=dtype, **settings)
        surgery.merge(folder / "base.st", folder / "adapter", folder / "merged.st")
        expected = adapted.merge_and_unload().state_dict()
        base, merged = load_file(folder / "base.st"), load_file(folder / "merged.st")
        changed = [name for name in base if not torch.equal(base[name], merged[name])]
        assert len(changed) >= 2
        for name in changed:
            ours, theirs, w0 = merged[name].double(), expected[name].double(), base[name].double()
            unit = 2 * ulp * torch.stack([ours.abs(), w0.abs(), (ours - w0).abs()]).amax(dim=0)
            assert ((ours - theirs).abs() <= unit).all(), name


def test_peft_loads_convolutions_written_with_our_keys(tmp_path: Path) -> None:
    """Factors, a change of the bias and config: peft rebuilds exactly these modules, and computes what we merge."""
    ranks = {"one": 2, "two": 3}
    model = save_base(tmp_path, Convolutions)
    tensors = {}
    for module, rank in ranks.items():
        weight = model.get_submodule(module).weight
        key_a, key_b = factor_keys(module, LayerKind.CONV)
        tensors[key_a] = random(rank, *weight.shape[1:])
        tensors[key_b] = random(weight.shape[0], rank, *(1,) * (weight.dim() - 2))
        tensors[bias_key(module)] = random(weight.shape[0])
    assert_peft_agrees(tmp_path, Convolutions, tensors, described(model, ranks, lora_bias=True), torch.randn(2, 4, 9))


@pytest.mark.parametrize("transposed", [False, True])
def test_peft_loads_parameters_written_with_our_keys(tmp_path: Path, transposed: bool) -> None:
    """Two stacks of experts of different ranks, a layer and a full tensor inside their module, a layer outside."""

    def build() -> nn.Module:
        return Mixture(transposed=transposed, bias=True)

    model = save_base(tmp_path, build)
    parameters = {"experts.up": 2, "experts.down": 1}
    tensors = {}
    for name, (key_a, key_b) in parameter_keys("experts", ["up", "down"]).items():
        experts, out, into = model.get_parameter(f"experts.{name}").shape
        if transposed:
            out, into = into, out
        rank = parameters[f"experts.{name}"]
        tensors[key_a], tensors[key_b] = pack_experts(random(experts, rank, into), random(experts, out, rank))
    for module in ("experts.base_layer.base_layer.inside", "out"):
        key_a, key_b = factor_keys(module, LayerKind.LINEAR)
        tensors[key_a], tensors[key_b] = random(2, 4), random(4, 2)
    tensors[full_key("experts.up_bias", wrappers=2)] = random(3, 10)
    extracted = described(model, {"experts.inside": 2, "out": 2}, parameters=parameters)
    assert_peft_agrees(tmp_path, build, tensors, extracted, torch.randn(2, 4))


def test_peft_loads_parameters_alone(tmp_path: Path) -> None:
    """Without any adapted layer: the config targets no module, and peft takes none."""
    model = save_base(tmp_path, lambda: Mixture(transposed=False))
    (key_a, key_b) = parameter_keys("experts", ["down"])["down"]
    a, b = pack_experts(random(3, 2, 5), random(3, 4, 2))
    extracted = described(model, {}, parameters={"experts.down": 2})
    assert_peft_agrees(tmp_path, lambda: Mixture(transposed=False), {key_a: a, key_b: b}, extracted, torch.randn(2, 4))


class Attention(nn.Module):
    """torch's own attention, which holds the weights of query, key and value in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, length, 8)."""
        return self.attn(x, x, x)[0]


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["attn"]},
     {"target_modules": ["attn"], "rank_pattern": {"attn": 3}, "alpha_pattern": {"attn": 5}, "use_rslora": True},
     {"target_modules": [], "target_parameters": ["attn.in_proj_weight"]}],
    ids=["module", "patterns", "parameter"],
)  # fmt: skip
def test_torchs_attention_merges_as_peft_merges_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The fused projection alone as a parameter; as a module its out_proj goes along."""
    assert_merges_like_peft(tmp_path, Attention, torch.randn(2, 5, 8), **settings)


def test_peft_adds_the_product_of_an_attentions_out_proj_twice(tmp_path: Path) -> None:
    """In forward and in merging, so this is what such an adapter means; once peft mends it, this test fails."""
    adapted = made_by_peft(tmp_path, Attention, target_modules=["attn"])
    out = adapted.base_model.model.attn.base_layer.out_proj
    delta, before = out.get_delta_weight("default"), out.base_layer.weight.detach().clone()
    after = adapted.merge_and_unload().attn.out_proj.weight
    torch.testing.assert_close(after, before + 2 * delta)
    surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")
    surgery.unmerge(tmp_path / "merged.st", tmp_path / "adapter", tmp_path / "back.st")
    for name, tensor in load_file(tmp_path / "back.st").items():
        torch.testing.assert_close(tensor, load_file(tmp_path / "base.st")[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["convolutions", "experts"])
def test_unmerge_takes_them_off_again(tmp_path: Path, kind: str) -> None:
    """Bit for bit where nothing was lost by rounding."""
    build: Callable[[], nn.Module] = Convolutions if kind == "convolutions" else lambda: Mixture(transposed=True)
    targets = {"target_modules": ["one", "two", "three"]} if kind == "convolutions" else {
        "target_modules": [], "target_parameters": ["experts.up", "experts.down"],
    }  # fmt: skip
    made_by_peft(tmp_path, build, lora_alpha=2, **targets)
    for file in (tmp_path / "base.st", tmp_path / "adapter/adapter_model.safetensors"):
        save_file({name: (8 * tensor).round() + 0.0 for name, tensor in load_file(file).items()}, file)
    surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")
    assert surgery.unmerge(tmp_path / "merged.st", tmp_path / "adapter", tmp_path / "back.st").bit_exact is True


def test_threads_and_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA, convolutions and experts give the same bytes for any of them."""
    models: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
        (Everything, {"target_modules": ["wte", "conv1d", "linear", "conv"], "use_dora": True}),
        (Convolutions, {"target_modules": ["one", "two", "point", "three"]}),
        (lambda: Mixture(transposed=True), {"target_parameters": ["experts.down", "experts.up"], "target_modules": []}),
    ]
    for index, (build, settings) in enumerate(models):
        folder = tmp_path / str(index)
        folder.mkdir()
        made_by_peft(folder, build, dtype=torch.bfloat16, **settings)
        outputs = set()
        for jobs, block in [(1, 1 << 17), (2, 64), (3, 1)]:
            monkeypatch.setattr("surgery.exact.rounding._BLOCK_ELEMENTS", block)
            monkeypatch.setattr("surgery.exact.rounded_sum.BLOCK_ELEMENTS", block)
            monkeypatch.setattr("surgery.operations.merge.rows.BLOCK_ELEMENTS", block)
            merged = folder / f"{jobs}.st"
            surgery.merge(folder / "base.st", folder / "adapter", merged, resources=surgery.Resources(jobs, 1 << 30))
            outputs.add(merged.read_bytes())
        assert len(outputs) == 1
