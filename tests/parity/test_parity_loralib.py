"""loralib's state dicts, with loralib itself as the judge: the weights it merges in eval mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from formats.errors import AdapterFormatError, ReportedError, ShapeMismatch, UnmatchedKeys

R, ALPHA = 4, 6
TOLD = surgery.Told(alpha=ALPHA)
QV = (True, False, True)


class Layers(nn.Module):
    """Every layer of loralib: some with factors, some without; (in, out) weights where told."""

    def __init__(self, r: int, turned: bool = False, slices: tuple[bool, ...] = QV) -> None:
        super().__init__()
        rank: dict[str, Any] = {"r": r, "lora_alpha": ALPHA}
        self.emb = loralib.Embedding(11, 8, **rank)
        self.fused = loralib.MergedLinear(8, 12, enable_lora=list(slices), fan_in_fan_out=turned, **rank)
        self.up = loralib.Linear(12, 20, fan_in_fan_out=turned, **rank)
        self.square = loralib.Linear(20, 20, fan_in_fan_out=turned, **rank)
        self.conv = loralib.Conv2d(4, 6, 3, **rank)
        self.grouped = loralib.Conv2d(6, 4, 3, groups=2, **rank)  # a row of the weight is 1½ of BA's
        self.norm = nn.LayerNorm(20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, 6) token ids."""
        hidden = self.norm(self.square(self.up(self.fused(self.emb(x)))))  # (batch, 6, 20)
        return self.grouped(self.conv(hidden[:, :4, :, None].expand(-1, -1, -1, 5)))


def made_by_loralib(folder: Path, bias: str = "none", inner: bool = True, **settings: Any) -> nn.Module:
    """Saves the plain model and a loralib adapter of it; every factor and trained bias is random."""
    torch.manual_seed(0)
    model = Layers(R, **settings)
    loralib.mark_only_lora_as_trainable(model, bias)
    plain = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    if not inner:  # as the model was before loralib's convolutions took the place of torch's
        plain = {name.replace(".conv.", "."): tensor for name, tensor in plain.items()}
    save_file(plain, folder / "base.st")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    save_file({name: t.contiguous() for name, t in loralib.lora_state_dict(model, bias).items()}, folder / "lora.st")
    return model


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("slices", [QV, (True, True, True), (False, True)])
@pytest.mark.parametrize("turned", [False, True])
def test_adapters_merge_as_loralib_merges_them(
    tmp_path: Path, turned: bool, slices: tuple[bool, ...], bias: str, inner: bool
) -> None:
    """Linear, fused, embedding and convolution, in both orientations, within 1e-6 of the largest weight."""
    model = made_by_loralib(tmp_path, bias, inner, turned=turned, slices=slices)
    told = surgery.Told(alpha=ALPHA, enable_lora=() if all(slices) else slices)
    surgery.merge(tmp_path / "base.st", tmp_path / "lora.st", tmp_path / "merged.st", told=told)
    merged, base = load_file(tmp_path / "merged.st"), load_file(tmp_path / "base.st")
    x = torch.randint(0, 11, (3, 6))
    model.train()
    with torch.no_grad():
        output = model(x)
    expected = {k: v for k, v in model.eval().state_dict().items() if "lora_" not in k}  # eval merges
    if not inner:
        expected = {name.replace(".conv.", "."): tensor for name, tensor in expected.items()}
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert (tensor - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name
    changed = {name.partition(".")[0] for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {"emb", "fused", "up", "square", "conv", "grouped"} | ({"norm"} if bias == "all" else set())
    if inner:
        without = Layers(0, turned=turned, slices=slices)
        without.load_state_dict(merged)
        with torch.no_grad():
            torch.testing.assert_close(without(x), output, atol=1e-5, rtol=1e-5)


def test_they_are_taken_off_and_verified(tmp_path: Path) -> None:
    """Within rounding, bit for bit with an undo file; the replay agrees, another alpha's does not."""
    made_by_loralib(tmp_path, "all")
    base, adapter, merged = tmp_path / "base.st", tmp_path / "lora.st", tmp_path / "merged.st"
    told = surgery.Told(alpha=ALPHA, enable_lora=QV)
    surgery.merge(base, adapter, merged, told=told, undo=tmp_path / "undo.st")
    assert surgery.verify(merged, base, adapter, told=told).verdict == "exact"
    assert not surgery.verify(merged, base, adapter, told=surgery.Told(alpha=2 * ALPHA, enable_lora=QV)).agrees
    surgery.unmerge(merged, adapter, tmp_path / "back.st", told=told)
    for name, tensor in load_file(tmp_path / "back.st").items():
        torch.testing.assert_close(tensor, load_file(base)[name], atol=1e-6, rtol=1e-6)
    assert surgery.unmerge(merged, adapter, tmp_path / "exact.st", told=told, undo=tmp_path / "undo.st").bit_exact
    assert (tmp_path / "exact.st").read_bytes() == base.read_bytes()


def test_threads_and_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused layers in both orientations and convolutions in groups give the same bytes for any of them."""
    for turned in (False, True):
        made_by_loralib(tmp_path, turned=turned)
        told = surgery.Told(alpha=ALPHA, enable_lora=QV)
        outputs = set()
        for jobs, block in [(1, 1 << 17), (2, 64), (3, 1)]:
            monkeypatch.setattr("surgery.exact.rounding._BLOCK_ELEMENTS", block)
            monkeypatch.setattr("surgery.exact.rounded_sum.BLOCK_ELEMENTS", block)
            monkeypatch.setattr("surgery.operations.merge.rows.BLOCK_ELEMENTS", block)
            resources = surgery.Resources(jobs, 1 << 30)
            out = tmp_path / "merged.st"
            surgery.merge(tmp_path / "base.st", tmp_path / "lora.st", out, told=told, force=True, resources=resources)
            outputs.add(out.read_bytes())
        assert len(outputs) == 1


def test_what_the_file_does_not_say_is_asked_for(tmp_path: Path) -> None:
    """Alpha always; the slices of a fused layer only where the shapes leave a choice, and they must fit."""
    made_by_loralib(tmp_path)

    def merge(told: surgery.Told) -> None:
        surgery.merge(tmp_path / "base.st", tmp_path / "lora.st", tmp_path / "merged.st", told=told)

    for alpha in (None, float("nan")):
        with pytest.raises(AdapterFormatError, match="alpha") as caught:
            merge(surgery.Told(alpha=alpha))
        assert "--alpha" in caught.value.details["next"]
    for slices in ((), (True, False), (True, True, True), (True, False, False)):
        with pytest.raises(AdapterFormatError, match="slices of a fused layer") as caught:
            merge(surgery.Told(alpha=ALPHA, enable_lora=slices))
        assert "--enable-lora" in caught.value.details["next"]


def test_a_square_weight_of_which_nothing_tells_is_as_the_caller_says(tmp_path: Path) -> None:
    """loralib's own default is (out, in)."""
    for turned in (False, True):
        torch.manual_seed(0)
        layer = loralib.Linear(6, 6, r=2, lora_alpha=3, fan_in_fan_out=turned)
        nn.init.normal_(layer.lora_B)
        save_file({"weight": layer.weight.data.contiguous(), "bias": layer.bias.data}, tmp_path / "base.st")
        save_file(loralib.lora_state_dict(layer), tmp_path / "lora.st")
        told = surgery.Told(alpha=3, fan_in_fan_out=turned)
        surgery.merge(tmp_path / "base.st", tmp_path / "lora.st", tmp_path / "merged.st", told=told, force=True)
        layer.eval()
        torch.testing.assert_close(load_file(tmp_path / "merged.st")["weight"], layer.weight.data)


def test_a_whole_models_state_dict_is_no_adapter(tmp_path: Path) -> None:
    """In eval mode loralib has merged already, and the file does not tell."""
    model = made_by_loralib(tmp_path)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "whole.st")
    with pytest.raises(AdapterFormatError, match="whole model") as caught:
        surgery.merge(tmp_path / "base.st", tmp_path / "whole.st", tmp_path / "merged.st", told=TOLD)
    assert "lora_state_dict" in caught.value.details["next"]


def _wrong(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> ReportedError:
    made_by_loralib(folder, slices=(True, True, True))
    save_file(change(load_file(folder / "lora.st")), folder / "lora.st")
    with pytest.raises(ReportedError) as caught:
        surgery.merge(folder / "base.st", folder / "lora.st", folder / "merged.st", told=TOLD)
    assert not (folder / "merged.st").exists()
    return caught.value


def test_wrong_files_are_refused_while_planning(tmp_path: Path) -> None:
    """Half a pair, another architecture's names, other shapes, a bias of no layer."""
    error = _wrong(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != "up.lora_B"})
    assert isinstance(error, AdapterFormatError)
    assert "one factor of a pair" in error.what
    error = _wrong(tmp_path, lambda tensors: {f"else.where.{k}": v for k, v in tensors.items()})
    assert isinstance(error, UnmatchedKeys)
    for key, shape in [("up.lora_A", (4, 13)), ("up.lora_B", (21, 4)), ("up.lora_A", (3, 12)),
                       ("up.lora_A", (4, 12, 1)), ("conv.lora_A", (12, 13)), ("conv.lora_B", (17, 12)),
                       ("emb.lora_A", (4, 12)), ("fused.lora_A", (13, 8))]:  # fmt: skip
        error = _wrong(tmp_path, lambda tensors, key=key, shape=shape: tensors | {key: torch.ones(shape)})
        assert isinstance(error, ShapeMismatch), (key, shape)
    error = _wrong(tmp_path, lambda tensors: tensors | {"nowhere.bias": torch.ones(3)})
    assert isinstance(error, UnmatchedKeys)


def test_the_command_line_takes_them(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """--alpha and --enable-lora for merge, unmerge and verify; a usage error for a list that is none."""
    made_by_loralib(tmp_path)
    base, adapter, merged = (tmp_path / name for name in ("base.st", "lora.st", "merged.st"))
    told = ("--alpha", ALPHA, "--enable-lora", "1,0,1")
    assert cli("merge", base, adapter, "-o", merged).exit_code == 1
    assert cli("merge", base, adapter, "-o", merged, "--alpha", 6, "--enable-lora", "q,v").exit_code == 2
    assert cli("merge", base, adapter, "-o", merged, "--dry-run", *told).exit_code == 0
    assert cli("merge", base, adapter, "-o", merged, *told).exit_code == 0
    assert cli("verify", merged, "--base", base, "--adapter", adapter, *told).exit_code == 0
    assert cli("unmerge", merged, adapter, "-o", tmp_path / "back.st", *told).exit_code == 0


def test_they_go_together_with_adapters_of_peft(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Deltas of both on one weight are summed; without a loralib adapter there is nothing to tell."""
    made_by_loralib(tmp_path)
    base, ours = tmp_path / "base.st", load_file(tmp_path / "lora.st")
    factors = {"lora_A": torch.randn(2, 12), "lora_B": torch.randn(20, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up"]}
    keys = {f"base_model.model.up.{role}.weight": tensor for role, tensor in factors.items()}
    save_file(keys, tmp_path / "peft.st", metadata={"adapter_config": json.dumps(config)})
    told = surgery.Told(alpha=ALPHA, enable_lora=QV)
    surgery.merge(base, [tmp_path / "lora.st", (tmp_path / "peft.st", 0.5)], tmp_path / "merged.st", told=told)
    delta = ALPHA / R * ours["up.lora_B"] @ ours["up.lora_A"] + 0.5 * factors["lora_B"] @ factors["lora_A"]
    torch.testing.assert_close(load_file(tmp_path / "merged.st")["up.weight"], load_file(base)["up.weight"] + delta)
    with pytest.raises(AdapterFormatError, match="gives its alpha"):
        surgery.merge(base, tmp_path / "peft.st", tmp_path / "other.st", told=TOLD)
    assert "loralib" in cli("inspect", tmp_path / "lora.st").stdout


def test_gpt2s_fused_attention_is_found_under_its_prefix(tmp_path: Path) -> None:
    """The paper's own case: query and value of c_attn, which stores (in, out), in a file without the model's head."""
    torch.manual_seed(0)
    layer = loralib.MergedLinear(8, 24, r=R, lora_alpha=ALPHA, enable_lora=list(QV), fan_in_fan_out=True)
    nn.init.normal_(layer.lora_B)
    base = {"h.0.attn.c_attn.weight": layer.weight.data.contiguous().clone(), "h.0.attn.c_attn.bias": layer.bias.data}
    save_file(base, tmp_path / "base.st")
    factors = {f"transformer.h.0.attn.c_attn.{name}": tensor for name, tensor in loralib.lora_state_dict(layer).items()}
    save_file(factors, tmp_path / "lora.st")
    told = surgery.Told(alpha=ALPHA, enable_lora=QV)
    surgery.merge(tmp_path / "base.st", tmp_path / "lora.st", tmp_path / "merged.st", told=told)
    layer.eval()
    torch.testing.assert_close(load_file(tmp_path / "merged.st")["h.0.attn.c_attn.weight"], layer.weight.data)
