"""Every method of peft but LoRA: each merges as peft merges it, or is refused with its reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import surgery
from formats.adapter import AdapterModule
from formats.dialects.peft_methods import REFUSED, REPLACING, SCHEMES
from formats.errors import AdapterFormatError, ReportedError
from formats.layers import LayerKind
from formats.spec import DType
from surgery.errors import NotMergeable, NotMerged
from surgery.methods.boft import Boft

pytestmark = pytest.mark.filterwarnings("ignore")


class Layers(nn.Module):
    """Linear layers with a bias and without, higher than wide and wider than high, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.square = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 8)."""
        return self.square(self.norm(self.down(self.up(x))))


class Pictures(nn.Module):
    """Convolutions in two dimensions, of one and of more points, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 6, 3)
        self.point = nn.Conv2d(6, 8, 1, bias=False)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 8), which becomes a picture of 5 × 5."""
        x = x[:, :4, None, None] * torch.linspace(-1, 1, 25).view(5, 5)
        return self.linear(self.point(self.one(x)).mean((2, 3)))


class Series(nn.Module):
    """A convolution in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 8)."""
        return self.one(x.view(-1, 4, 2).repeat(1, 1, 3))


class Turned(nn.Module):
    """GPT-2's Conv1D, which stores (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Conv1D(12, 8)
        self.square = Conv1D(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 8)."""
        return self.square(self.up(x))


class Words(nn.Module):
    """An embedding and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 6)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 8), which tells the words."""
        return self.linear(self.emb((x.abs() * 10).long() % 7))


@dataclass(frozen=True)
class Case:
    """One method with one set of settings."""

    config: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)
    build: Callable[[], nn.Module] = Layers
    targets: tuple[str, ...] = ("up", "down")
    unmerges: bool = True


PICTURES: dict[str, Any] = {"build": Pictures, "targets": ("one", "point", "linear")}
TURNED: dict[str, Any] = {"build": Turned, "targets": ("up", "square")}
BY_ROTATION = {"build": Pictures, "targets": ("one",)}
CASES = {
    "adalora": Case(peft.AdaLoraConfig, {"init_r": 4, "target_r": 3, "total_step": 9, "lora_alpha": 5}),
    "adalora conv1d": Case(peft.AdaLoraConfig, {"init_r": 4, "target_r": 3, "total_step": 9}, **TURNED),
    "beft": Case(peft.BeftConfig, targets=("up", "square")),
    "boft": Case(peft.BOFTConfig, {"boft_block_size": 4, "boft_n_butterfly_factor": 1}),
    "boft blocks": Case(peft.BOFTConfig, {"boft_block_size": 0, "boft_block_num": 2, "boft_n_butterfly_factor": 0}),
    "boft conv": Case(peft.BOFTConfig, {"boft_block_size": 6, "boft_n_butterfly_factor": 1}, **BY_ROTATION),
    "c3a": Case(peft.C3AConfig, {"block_size": 4}, targets=("up", "down", "square")),
    "deft": Case(peft.DeftConfig, {"r": 2, "alpha": 5}, unmerges=False),
    "deft para": Case(peft.DeftConfig, {"r": 2, "para": True}, unmerges=False),
    "deft conv1d": Case(peft.DeftConfig, {"r": 2, "fan_in_fan_out": True}, unmerges=False, **TURNED),
    "delora": Case(peft.DeloraConfig, {"r": 3, "delora_lambda": 7}),
    "fourierft": Case(peft.FourierFTConfig, {"n_frequency": 20, "scaling": 40.0}),
    "fourierft conv1d": Case(peft.FourierFTConfig, {"n_frequency": 20, "fan_in_fan_out": True}, **TURNED),
    "glora": Case(peft.GloraConfig, {"r": 2}, targets=("up", "down", "square")),
    "glora by products": Case(peft.GloraConfig, {"r": 2, "config_D_E": "vector"}),
    "glora by vectors": Case(peft.GloraConfig, {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    "glora by numbers": Case(peft.GloraConfig, {"config_A_B": "constant", "config_C": "none"}),
    "glora by bias": Case(peft.GloraConfig, {"config_A_B": "none", "config_C": "vector"}, targets=("up",)),
    "gralora": Case(peft.GraloraConfig, {"r": 4, "gralora_k": 2, "alpha": 6}),
    "gralora hybrid": Case(peft.GraloraConfig, {"r": 4, "gralora_k": 4, "hybrid_r": 3}),
    "gralora conv1d": Case(peft.GraloraConfig, {"r": 4, "gralora_k": 2, "fan_in_fan_out": True}, **TURNED),
    "hira": Case(peft.HiraConfig, {"r": 3, "rank_pattern": {"up": 2}}),
    "hira conv": Case(peft.HiraConfig, {"r": 3}, **PICTURES),
    "hira conv1d": Case(peft.HiraConfig, {"r": 3, "fan_in_fan_out": True}, **TURNED),
    "hira embedding": Case(peft.HiraConfig, {"r": 3}, build=Words, targets=("emb", "linear")),
    "hra": Case(peft.HRAConfig, {"r": 3}),
    "hra orthonormal": Case(peft.HRAConfig, {"r": 4, "apply_GS": True}),
    "hra conv": Case(peft.HRAConfig, {"r": 4}, **BY_ROTATION),
    "ia3": Case(peft.IA3Config, {"feedforward_modules": ["down"]}),
    "ia3 conv": Case(peft.IA3Config, {"feedforward_modules": ["point"]}, **PICTURES),
    "ia3 conv1d": Case(peft.IA3Config, {"feedforward_modules": ["square"], "fan_in_fan_out": True}, **TURNED),
    "ln_tuning": Case(peft.LNTuningConfig, targets=("norm",)),
    "loha": Case(peft.LoHaConfig, {"r": 3, "alpha": 5, "rank_pattern": {"up": 2}, "alpha_pattern": {"down": 7}}),
    "loha conv": Case(peft.LoHaConfig, {"r": 3, "alpha": 5}, **PICTURES),
    "loha effective": Case(peft.LoHaConfig, {"r": 3, "alpha": 5, "use_effective_conv2d": True}, **PICTURES),
    "loha series": Case(peft.LoHaConfig, {"r": 3, "use_effective_conv2d": True}, Series, ("one",)),
    "lokr": Case(peft.LoKrConfig, {"r": 1, "alpha": 5}),
    "lokr whole": Case(peft.LoKrConfig, {"r": 8, "alpha": 5, "decompose_factor": 2}),
    "lokr both": Case(peft.LoKrConfig, {"r": 1, "decompose_both": True, "rank_pattern": {"up": 2}}),
    "lokr conv": Case(peft.LoKrConfig, {"r": 1, "alpha": 5}, **PICTURES),
    "lokr conv whole": Case(peft.LoKrConfig, {"r": 9}, **PICTURES),
    "lokr effective": Case(peft.LoKrConfig, {"r": 1, "use_effective_conv2d": True}, **PICTURES),
    "lokr series": Case(peft.LoKrConfig, {"r": 1, "decompose_both": True}, Series, ("one",)),
    "lokr series whole": Case(peft.LoKrConfig, {"r": 9}, Series, ("one",)),
    "miss": Case(peft.MissConfig, {"r": 5}),
    "miss bat": Case(peft.MissConfig, {"r": 4, "init_weights": "bat"}, unmerges=False),
    "miss mini": Case(peft.MissConfig, {"r": 4, "mini_r": 2, "init_weights": "mini"}),
    "oft": Case(peft.OFTConfig, {"r": 0, "oft_block_size": 4}),
    "oft cayley": Case(peft.OFTConfig, {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False}),
    "oft constrained": Case(peft.OFTConfig, {"r": 0, "oft_block_size": 4, "coft": True, "eps": 0.3}),
    "oft shared": Case(peft.OFTConfig, {"r": 0, "oft_block_size": 4, "block_share": True}),
    "oft three terms": Case(peft.OFTConfig, {"r": 0, "oft_block_size": 4, "num_cayley_neumann_terms": 3}),
    "oft six terms": Case(peft.OFTConfig, {"r": 0, "oft_block_size": 4, "num_cayley_neumann_terms": 6}),
    "oft point": Case(peft.OFTConfig, {"r": 0, "oft_block_size": 3}, Pictures, ("point",)),
    "peanut": Case(peft.PeanutConfig, {"r": 3, "scaling": 0.7}, unmerges=False),
    "peanut deep": Case(peft.PeanutConfig, {"r": 3, "depth": 2, "act_fn": "tanh"}, unmerges=False),
    "pvera": Case(peft.PveraConfig, {"r": 3}),
    "randlora": Case(peft.RandLoraConfig, {"r": 3, "randlora_alpha": 6}),
    "randlora conv1d": Case(peft.RandLoraConfig, {"r": 3, "randlora_alpha": 6, "fan_in_fan_out": True}, **TURNED),
    "randlora sparse": Case(peft.RandLoraConfig, {"r": 3, "randlora_alpha": 6, "sparse": True}),
    "road 1": Case(peft.RoadConfig, {"group_size": 4}),
    "road 2": Case(peft.RoadConfig, {"group_size": 4, "variant": "road_2"}),
    "road 4": Case(peft.RoadConfig, {"group_size": 2, "variant": "road_4"}),
    "shira": Case(peft.ShiraConfig, {"r": 2}),
    "supertuning": Case(peft.SupertuningConfig, {"sparsity": 0.8}),
    "supertuning with lora": Case(peft.SupertuningConfig, {"sparsity": 0.8, "r": 2, "lora_alpha": 5}),
    "trainable_tokens": Case(peft.TrainableTokensConfig, {"token_indices": [5, 0]}, Words, ("emb",)),
    "unilora": Case(peft.UniLoraConfig, {"r": 2, "theta_d_length": 30, "save_indices": True}),
    "vblora": Case(peft.VBLoRAConfig, {"r": 2, "num_vectors": 6, "vector_length": 4}),
    "vblora best only": Case(
        peft.VBLoRAConfig, {"r": 2, "num_vectors": 6, "vector_length": 4, "topk": 3, "save_only_topk_weights": True}
    ),
    "vblora conv1d": Case(
        peft.VBLoRAConfig, {"r": 2, "num_vectors": 6, "vector_length": 4, "fan_in_fan_out": True}, **TURNED
    ),
    "vera": Case(peft.VeraConfig, {"r": 4}),
    "vera conv1d": Case(peft.VeraConfig, {"r": 4, "fan_in_fan_out": True}, **TURNED),
    "vera from its seed": Case(peft.VeraConfig, {"r": 4, "save_projection": False, "projection_prng_key": 5}),
    "waveft": Case(peft.WaveFTConfig, {"n_frequency": 60, "scaling": 3.0}, targets=("up", "down", "square")),
    "waveft sparse": Case(peft.WaveFTConfig, {"n_frequency": 20, "use_idwt": False}),
    "waveft conv1d": Case(peft.WaveFTConfig, {"n_frequency": 60, "fan_in_fan_out": True}, **TURNED),
    "waveft odd": Case(peft.WaveFTConfig, {"n_frequency": 20}, Words, ("linear",)),
}


def made_by_peft(folder: Path, case: Case) -> peft.PeftModel:
    """Saves a base and an adapter that peft made for it; every trained tensor is random and not small."""
    torch.manual_seed(0)
    model = case.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_file(model.state_dict(), folder / "base.st")
    config = case.config(target_modules=list(case.targets), **case.settings)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "adapter")
    return adapted


@pytest.mark.parametrize("name", CASES)
def test_methods_merge_as_peft_merges_them(tmp_path: Path, name: str) -> None:
    """Within 1e-6 of the largest weight, and the merged model gives the adapted model's outputs. By peft in float64 as
    the judge, ours are off by little more than their one rounding, 6e-8; docs/methods.md has peft's."""
    case = CASES[name]
    adapted = made_by_peft(tmp_path, case)
    x = torch.randn(3, 8)
    with torch.no_grad():
        output = adapted(x)
    exact = copy.deepcopy(adapted).double().merge_and_unload().state_dict()
    surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")
    merged, base = load_file(tmp_path / "merged.st"), load_file(tmp_path / "base.st")
    expected = adapted.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys() == exact.keys()
    for tensor in merged:
        error = (merged[tensor] - expected[tensor]).abs().max() / expected[tensor].abs().max().clamp_min(1e-30)
        assert error <= 1e-6, (tensor, float(error))
        wrong = (merged[tensor].double() - exact[tensor]).abs().max() / exact[tensor].abs().max().clamp_min(1e-30)
        assert wrong <= 1.2e-7, (tensor, float(wrong))
    changed = {tensor for tensor in base if not torch.equal(base[tensor], merged[tensor])}
    assert {tensor.partition(".")[0] for tensor in changed} == set(case.targets)
    model = case.build().eval()
    model.load_state_dict(merged)
    with torch.no_grad():
        torch.testing.assert_close(model(x), output, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_methods_are_taken_off_again_or_say_why_not(tmp_path: Path, name: str) -> None:
    """The base comes back within float32's rounding; where the result forgets W0, unmerge is refused."""
    case = CASES[name]
    made_by_peft(tmp_path, case)
    surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")
    if not case.unmerges:
        with pytest.raises(NotMerged, match="cannot be taken off"):
            surgery.unmerge(tmp_path / "merged.st", tmp_path / "adapter", tmp_path / "back.st")
        return
    surgery.unmerge(tmp_path / "merged.st", tmp_path / "adapter", tmp_path / "back.st")
    base, back = load_file(tmp_path / "base.st"), load_file(tmp_path / "back.st")
    assert back.keys() == base.keys()
    for tensor in base:
        torch.testing.assert_close(back[tensor], base[tensor], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["loha", "lokr", "boft", "hira conv1d", "miss", "c3a", "fourierft", "hra", "ia3", "glora"]
)
def test_threads_and_blocks_do_not_show(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes for any of them."""
    made_by_peft(tmp_path, CASES[name])
    outputs = set()
    for jobs, block in [(1, 1 << 17), (2, 64), (3, 1)]:
        monkeypatch.setattr("surgery.exact.rounding._BLOCK_ELEMENTS", block)
        monkeypatch.setattr("surgery.exact.rounded_sum.BLOCK_ELEMENTS", block)
        monkeypatch.setattr("surgery.operations.merge.rows.BLOCK_ELEMENTS", block)
        merged = tmp_path / f"{jobs}.st"
        surgery.merge(tmp_path / "base.st", tmp_path / "adapter", merged, resources=surgery.Resources(jobs, 1 << 30))
        outputs.add(merged.read_bytes())
    assert len(outputs) == 1


@pytest.mark.parametrize("name", CASES)
def test_a_factor_of_another_shape_is_refused_while_planning(tmp_path: Path, name: str) -> None:
    """Each factor in turn, with too few dimensions and too many."""
    made_by_peft(tmp_path, CASES[name])
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    for key, tensor in tensors.items():
        if key.endswith(("spectrum", "randlora_A", "randlora_B")):  # of any length; in several copies
            continue
        for wrong in (torch.ones(3), torch.ones(2, 1, 1, 1, 5)):
            save_file(tensors | {key: wrong.to(tensor.dtype)}, file)
            with pytest.raises(ReportedError):
                surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")
            assert not (tmp_path / "merged.st").exists()


def test_butterflies_of_several_levels_are_the_product_that_peft_describes() -> None:
    """peft multiplies them on a GPU only, so its permutations and its rotations are put together here."""
    layer, blocks, size, levels = peft.tuners.boft.layer.BOFTLayer, 8, 4, 3
    width = blocks * size
    torch.manual_seed(0)
    rotations, scale = 0.3 * torch.randn(levels, blocks, size, size).double(), 2 + torch.rand(6, 1).double()
    weight = torch.randn(6, width)
    whole = torch.eye(width).double()
    for level in range(levels):
        order = layer.block_butterfly_perm(None, width, blocks >> level, size // 2, levels - 1)
        place = layer.perm2mat(None, order).double()
        turned = torch.block_diag(*layer.cayley_batch(None, rotations[level]))
        whole = place @ turned @ place.T @ whole
    module = AdapterModule("weight", "boft", LayerKind.LINEAR, {}, 1, 1.0)
    factors = {"boft_R": rotations, "boft_s": scale}
    ours = Boft().transform(module, weight, factors, DType.F64)
    torch.testing.assert_close(ours, (weight.double() @ whole.T) * scale, atol=1e-12, rtol=0)
    back = Boft().transform(module, ours, factors, DType.F64, back=True)
    torch.testing.assert_close(back, weight.double(), atol=1e-12, rtol=0)


def test_a_method_that_reads_the_weight_for_the_bias_comes_off_and_is_verified(tmp_path: Path) -> None:
    """GLoRA's bias gets W0 C: the base's weight in merging, the merged one in coming off; exact with an undo file."""
    made_by_peft(tmp_path, CASES["glora by products"])
    base, adapter, merged = (tmp_path / name for name in ("base.st", "adapter", "merged.st"))
    report = surgery.merge(base, adapter, merged, undo=tmp_path / "undo.st")
    assert report.ledger["merged"] == 3
    assert surgery.verify(merged, base, adapter).verdict == "exact"
    assert surgery.unmerge(merged, adapter, tmp_path / "back.st", undo=tmp_path / "undo.st").bit_exact
    assert (tmp_path / "back.st").read_bytes() == base.read_bytes()
    made_by_peft(tmp_path, Case(peft.GloraConfig, {"config_A_B": "constant"}))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.up.glora_A.X"].fill_(-1)
    save_file(tensors, file)
    surgery.merge(base, adapter, merged, force=True)
    with pytest.raises(NotMerged, match="nothing is left to divide"):
        surgery.unmerge(merged, adapter, tmp_path / "again.st")


UNSAVED = {
    "randlora": (Case(peft.RandLoraConfig, {"r": 3, "save_projection": False}), NotMergeable, "bfloat16 or float16"),
    "supertuning": (
        Case(peft.SupertuningConfig, {"sparsity": 0.8, "save_precomputed_indices": False}),
        AdapterFormatError,
        "lacks some of its factors",
    ),
    "unilora": (Case(peft.UniLoraConfig, {"r": 2}), AdapterFormatError, "save_indices"),
    "pvera": (Case(peft.PveraConfig, {"r": 2, "sample_at_inference": True}), NotMergeable, "for each input"),
    "deft": (Case(peft.DeftConfig, {"r": 2, "decomposition_method": "qr"}), NotMergeable, "signs"),
    "waveft": (Case(peft.WaveFTConfig, {"n_frequency": 9, "wavelet_family": "db3"}), NotMergeable, "only Haar"),
}


@pytest.mark.parametrize("name", UNSAVED)
def test_what_the_file_does_not_determine_is_refused(tmp_path: Path, name: str) -> None:
    """Bases that no seed gives back, places that are not in the file, latents drawn for each input."""
    case, error, reason = UNSAVED[name]
    made_by_peft(tmp_path, case)
    with pytest.raises(error, match=reason):
        surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")


def test_what_has_become_zero_cannot_be_divided_again(tmp_path: Path) -> None:
    """(IA)³ merges a factor of zero; the way back is refused, and nothing is written."""
    made_by_peft(tmp_path, CASES["ia3"])
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.up.ia3_l"][3] = 0
    save_file(tensors, file)
    surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")
    with pytest.raises(NotMerged, match="nothing is left to divide"):
        surgery.unmerge(tmp_path / "merged.st", tmp_path / "adapter", tmp_path / "back.st")
    assert not (tmp_path / "back.st").exists()


def test_every_method_of_the_installed_peft_is_merged_or_refused() -> None:
    """A new version of peft with a new method fails here. We may have schemes that peft lacks, tested elsewhere."""
    ours, of_peft = {"LORA", *SCHEMES, *REPLACING, *REFUSED}, {member.value for member in peft.PeftType}
    assert of_peft <= ours
    assert not set(REFUSED) & {"LORA", *SCHEMES, *REPLACING}
    tested = {
        case.config(target_modules=list(case.targets), **case.settings).peft_type.value for case in CASES.values()
    }
    assert tested == {*SCHEMES, *REPLACING} & of_peft


def test_oft_on_a_convolution_of_many_points_is_refused(tmp_path: Path) -> None:
    """peft's own merge of it gives other outputs than the adapter was trained with."""
    adapted = made_by_peft(tmp_path, Case(peft.OFTConfig, {"r": 0, "oft_block_size": 6}, Pictures, ("one",)))
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert not torch.allclose(adapted(x), adapted.merge_and_unload()(x), atol=1e-2)
    with pytest.raises(NotMergeable, match="overlapping patches"):
        surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")


@pytest.mark.parametrize("peft_type", REFUSED)
def test_what_no_weight_can_express_is_refused_with_its_reason(tmp_path: Path, peft_type: str) -> None:
    """Before anything is read but the config."""
    made_by_peft(tmp_path, CASES["ia3"])
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": peft_type}))
    with pytest.raises(AdapterFormatError, match="cannot be merged into weights"):
        surgery.merge(tmp_path / "base.st", tmp_path / "adapter", tmp_path / "merged.st")
    assert not (tmp_path / "merged.st").exists()
