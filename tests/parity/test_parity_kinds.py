"""Convolutions, stacks of experts and DoRA, with peft itself as the judge: it makes adapters that we merge, and loads
adapters written with our keys and config."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import surgery
from formats.dialects.peft_writing import (
    Extracted,
    bias_key,
    factor_keys,
    full_key,
    lora_config,
    magnitude_key,
    magnitude_shape,
    parameter_keys,
)
from formats.errors import AdapterFormatError, ShapeMismatch, UnmatchedKeys
from formats.layers import LayerKind
from surgery.errors import NotFinite, NotMergeable, NotMerged
from surgery.methods.lora import pack_experts

pytestmark = pytest.mark.filterwarnings("ignore")


class Convolutions(nn.Module):
    """One convolution of every dimension, a kernel of 1, and one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 5, (3, 2), stride=2)
        self.point = nn.Conv2d(5, 8, 1, bias=False)
        self.three = nn.Conv3d(8, 3, 2)
        self.grouped = nn.Conv1d(4, 6, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 4, 9)."""
        x = self.one(x)[..., None].expand(-1, -1, -1, 5)
        return self.three(self.point(self.two(x))[..., None].expand(-1, -1, -1, -1, 3))


class Experts(nn.Module):
    """Experts as a mixture holds them, with names in no alphabetical order, a matrix of no layer and a layer inside."""

    def __init__(self, transposed: bool, experts: int = 3, width: int = 4, inner: int = 5, bias: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = (width, 2 * inner), (inner, width)
        self.up = nn.Parameter(torch.randn(experts, *(up if transposed else up[::-1])))
        if bias:
            self.up_bias = nn.Parameter(torch.randn(experts, 2 * inner))
        self.down = nn.Parameter(torch.randn(experts, *(down if transposed else down[::-1])))
        self.also = nn.Parameter(torch.randn(width, 7))
        self.inside = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, width)."""
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        hidden = torch.einsum("bi,eio->beo", self.inside(x), up)
        hidden = hidden + getattr(self, "up_bias", 0)
        hidden = torch.tanh(hidden[..., ::2]) * hidden[..., 1::2]
        return torch.einsum("bei,eio->bo", hidden, down) @ self.also @ self.also.mT


class Mixture(nn.Module):
    """Experts between two layers."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        width = settings.get("width", 4)
        self.into = nn.Linear(width, width)
        self.experts = Experts(**settings)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, width)."""
        return self.out(self.experts(self.into(x)))


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


def test_torchs_attention_is_refused_as_a_module_and_merged_as_a_parameter(tmp_path: Path) -> None:
    """peft applies the factors of its out_proj twice, in forward and in merging: what an adapter of it means depends
    on peft's version. The fused projection alone can be targeted as a parameter."""
    adapted = made_by_peft(tmp_path, Attention, target_modules=["attn"])
    out = adapted.base_model.model.attn.base_layer.out_proj
    delta, before = out.get_delta_weight("default"), out.base_layer.weight.detach().clone()
    after = adapted.merge_and_unload().attn.out_proj.weight
    torch.testing.assert_close(after, before + 2 * delta)  # once peft mends it, this adapter can be merged
    with pytest.raises(UnmatchedKeys, match="in_proj_weight"):
        surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")
    targets = {"target_modules": [], "target_parameters": ["attn.in_proj_weight"]}
    assert_merges_like_peft(tmp_path, Attention, torch.randn(2, 5, 8), **targets)


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


class Everything(nn.Module):
    """A layer of each kind that DoRA knows."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(7, 6)
        self.conv1d = Conv1D(9, 6)  # GPT-2's, which stores (in, out)
        self.linear = nn.Linear(9, 5)
        self.conv = nn.Conv2d(5, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, length) token ids."""
        hidden = self.linear(self.conv1d(self.wte(x)))
        return self.conv(hidden.mT[..., None].expand(-1, -1, -1, 3))


IDS = torch.tensor([[0, 3, 6, 2], [5, 5, 1, 4]])


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["wte", "conv1d", "linear", "conv"]},
     {"target_modules": ["wte", "conv1d", "conv"], "fan_in_fan_out": True, "use_rslora": True},
     {"target_modules": ["linear", "conv"], "rank_pattern": {"conv": 3}, "alpha_pattern": {"linear": 5}}],
    ids=["plain", "fan_in_fan_out", "patterns"],
)  # fmt: skip
def test_dora_merges_as_peft_merges_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    """m · (W0 + ΔW) / ‖W0 + ΔW‖ with the norm over the inputs of each output, whichever way these are stored."""
    assert_merges_like_peft(tmp_path, Everything, IDS, use_dora=True, **settings)


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_dora_in_half_precision_is_nearer_to_float64_than_peft(tmp_path: Path, dtype: torch.dtype, ulp: float) -> None:
    """peft rounds ΔW, the norm, the quotient and the product; ours is the value of float64, rounded once."""
    targets = ["wte", "conv1d", "linear", "conv"]
    adapted = made_by_peft(tmp_path, Everything, dtype=dtype, target_modules=targets, use_dora=True)
    surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")
    merged = load_file(tmp_path / "merged.st")
    theirs = adapted.merge_and_unload().state_dict()
    exact = made_by_peft(tmp_path, Everything, dtype=dtype, target_modules=targets, use_dora=True).double()
    truth = exact.merge_and_unload().state_dict()
    for module in targets:
        name = f"{module}.weight"
        ours, peer = ((each[name].double() - truth[name]).abs() for each in (merged, theirs))
        assert (ours <= 1.01 * ulp * truth[name].abs()).all(), name
        assert ours.norm() <= peer.norm(), name


def test_peft_loads_dora_written_with_our_keys(tmp_path: Path) -> None:
    """Magnitudes of every kind of layer in the shapes that peft gives them."""
    model = save_base(tmp_path, Everything)
    tensors = {}
    kinds = {"wte": LayerKind.EMBEDDING, "conv1d": LayerKind.TRANSPOSED, "conv": LayerKind.CONV}
    for module, kind in kinds.items():
        shape = model.get_submodule(module).weight.shape
        out, *into = shape if kind is LayerKind.CONV else shape[::-1]
        key_a, key_b = factor_keys(module, kind)
        tensors[key_a] = random(2, *into)
        tensors[key_b] = random(out, 2, *(1,) * (len(shape) - 2))
        tensors[magnitude_key(module)] = 2 + random(*magnitude_shape(kind, tuple(shape)))
    extracted = Extracted(dict.fromkeys(kinds, 2), (), False, True, frozenset({*kinds, "linear"}), 2, "base", dora=True)
    assert_peft_agrees(tmp_path, Everything, tensors, extracted, IDS)


def test_dora_stands_alone_and_cannot_be_taken_off(tmp_path: Path) -> None:
    """No strength but 1, no way back from the merged weight, no module without magnitudes; all before any work."""
    made_by_peft(tmp_path, Everything, use_dora=True, target_modules=["linear"])
    base, adapter, merged = tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st"
    with pytest.raises(NotMergeable, match="more strongly or weakly"):
        surgery.merge(base, adapter, merged, weight=0.5)
    surgery.merge(base, adapter, merged)
    with pytest.raises(NotMerged, match="length of W0"):
        surgery.unmerge(merged, adapter, tmp_path / "back.st")
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(AdapterFormatError, match="contradict each other"):
        surgery.merge(base, adapter, tmp_path / "other.st")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    kept = {key: tensor for key, tensor in tensors.items() if "magnitude" not in key}
    save_file(kept, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterFormatError, match="contradict each other"):
        surgery.merge(base, adapter, tmp_path / "other.st")
    wrong = {magnitude_key("linear"): torch.ones(4)}
    save_file(tensors | wrong, adapter / "adapter_model.safetensors")
    with pytest.raises(ShapeMismatch, match="one for each output"):
        surgery.merge(base, adapter, tmp_path / "other.st")


def test_a_row_without_direction_is_named(tmp_path: Path) -> None:
    """Where W0 + ΔW is zero peft divides by zero."""
    made_by_peft(tmp_path, Everything, use_dora=True, target_modules=["linear"])
    adapter, base = load_file(tmp_path / "adapter/adapter_model.safetensors"), load_file(tmp_path / "base.st")
    base["linear.weight"][2] = 0
    adapter["base_model.model.linear.lora_B.weight"][2] = 0
    save_file(base, tmp_path / "base.st")
    save_file(adapter, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(NotFinite, match="no direction"):
        surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")


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
            monkeypatch.setattr("surgery.rounding._BLOCK_ELEMENTS", block)
            merged = folder / f"{jobs}.st"
            surgery.merge(folder / "base.st", folder / "adapter", merged, resources=surgery.Resources(jobs, 1 << 30))
            outputs.add(merged.read_bytes())
        assert len(outputs) == 1


def random(*shape: int) -> torch.Tensor:
    """Factors that change a weight visibly."""
    return 0.3 * torch.randn(*shape)


def described(model: nn.Module, ranks: dict[str, int], **settings: Any) -> Extracted:
    """What the config of a hand-written adapter must say."""
    modules = frozenset(name for name, _ in model.named_modules() if name)
    return Extracted(ranks, (), False, False, modules, 2, "base", **settings)


def save_base(folder: Path, build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Saves a seeded model."""
    torch.manual_seed(0)
    model = build().to(dtype).eval()
    save_file(model.state_dict(), folder / "base.st")
    return model


def made_by_peft(
    folder: Path, build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, **settings: Any
) -> peft.PeftModel:
    """Saves a base and a LoRA that peft made for it; every factor is random."""
    model = save_base(folder, build, dtype)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **settings})).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + random(*parameter.shape).to(dtype))
            elif "lora_" in name:
                parameter.copy_(random(*parameter.shape))
    adapted.save_pretrained(folder / "adapter")
    return adapted


def assert_merges_like_peft(folder: Path, build: Callable[[], nn.Module], x: torch.Tensor, **settings: Any) -> None:
    """The merged weights are peft's within 1e-6 of the largest, and give the outputs of the adapted model."""
    adapted = made_by_peft(folder, build, **settings)
    with torch.no_grad():
        output = adapted(x)
    surgery.merge(folder / "base.st", folder / "adapter", folder / "merged.st")
    merged, base = load_file(folder / "merged.st"), load_file(folder / "base.st")
    touched = {name.replace(".base_layer", "").removeprefix("base_model.model.") for name, _ in wrappers(adapted)}
    expected = adapted.merge_and_unload().state_dict()
    for name in merged.keys() & expected.keys():  # peft leaves a layer inside adapted parameters' module unmerged
        error = (merged[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-30)
        assert error <= 1e-6, name
    changed = {name.rpartition(".")[0] for name in base if not torch.equal(base[name], merged[name])}
    assert changed == touched
    model = build()
    model.load_state_dict(merged)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), output, atol=1e-4, rtol=1e-4)


def wrappers(adapted: peft.PeftModel) -> list[tuple[str, nn.Module]]:
    """peft's own layers."""
    return [(name, module) for name, module in adapted.named_modules() if hasattr(module, "get_delta_weight")]


def assert_peft_agrees(
    folder: Path,
    build: Callable[[], nn.Module],
    tensors: dict[str, torch.Tensor],
    extracted: Extracted,
    x: torch.Tensor,
) -> None:
    """peft loads the tensors with our config, every one and no other, and its outputs are those of our merge."""
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(lora_config(extracted)))
    base = build()
    base.load_state_dict(load_file(folder / "base.st"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = peft.PeftModel.from_pretrained(base.eval(), adapter).eval()
    loaded = peft.get_peft_model_state_dict(adapted)
    assert loaded.keys() == {key for key in tensors if "lora_" in key}
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in loaded.items())
    surgery.merge(folder / "base.st", adapter, folder / "merged.st")
    model = build()
    model.load_state_dict(load_file(folder / "merged.st"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), adapted(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(x), adapted.merge_and_unload()(x), atol=1e-5, rtol=1e-5)
