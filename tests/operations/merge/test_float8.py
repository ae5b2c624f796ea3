"""float8 bases with scales: W0 = q · s exactly, one rounding, scales kept where they can be, and every way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from float8_models import E4M3, E5M2, FINE, LAYOUTS, NAME, Base, Tensors, half_a_step, quantise, spread
from lora_by_hand import lora
from safetensors.torch import load_file, save_file

import surgery
from formats import open_checkpoint
from formats.errors import CorruptFile, Quantised, ShapeMismatch
from formats.spec import DType
from surgery.errors import NotFinite, NotMergeable, NotMerged, UndoMismatch
from surgery.exact import scaled
from surgery.exact.rounding import round_once
from surgery.receipts.undo_file import UNDO


@pytest.mark.parametrize("strength", [0.0002, 0.5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_within_half_a_step(tmp_path: Path, layout: str, strength: float) -> None:
    """Of W0 + ΔW, for small deltas and for those that no old scale holds; activations and the rest stay."""
    base = Base(tmp_path, layout, strength)
    report = surgery.merge(base.path, base.adapter, tmp_path / "m")
    merged, scales = base.stored(tmp_path / "m")
    error = (merged - base.exact).abs()
    assert bool((error <= half_a_step(base.exact, scales, base.q.dtype) * (1 + 1e-9)).all())
    kept = strength < 0.01
    assert torch.equal(scales, spread(base.s, base.block, base.shape)) is kept
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for name in ("model.norm.weight", "model.up.input_scale", "model.up.bias"):
        assert torch.equal(tensors[name], base.tensors[name])
    assert tensors[base.scale].shape == base.tensors[base.scale].shape
    delta = base.exact - base.w0
    survived = report.surviving[NAME].survived
    assert survived == pytest.approx(float((merged - base.w0).norm() / delta.norm()), rel=1e-5)


def test_what_transformers_dequantises_is_what_we_add_to(tmp_path: Path) -> None:
    """W0, and the merge, against transformers' own dequantisation of fine-grained float8."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    base = Base(tmp_path, "fine-grained")
    theirs = Fp8Dequantize(None)._dequantize_one(base.q, base.s, torch.float32)
    assert torch.equal(theirs, base.w0.float())
    surgery.merge(base.path, base.adapter, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    merged = Fp8Dequantize(None)._dequantize_one(tensors[NAME], tensors[base.scale], torch.float32)
    step = half_a_step(base.exact, spread(tensors[base.scale], base.block, base.shape), E4M3)
    assert bool(((merged.double() - base.exact).abs() <= step * (1 + 1e-5)).all())


def test_a_grown_block_gets_the_quantisers_own_scale(tmp_path: Path) -> None:
    """As transformers' quantiser would choose, to a unit in the last place; others keep theirs, bit for bit."""
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    base = Base(tmp_path, "fine-grained")
    base.b[128:] = 0
    base.b[:128] *= 100
    (tmp_path / "other").mkdir()
    adapter = lora(tmp_path / "other" / "a", {"model.up.lora_A.weight": base.a, "model.up.lora_B.weight": base.b})
    surgery.merge(base.path, adapter, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    how = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=[128, 128], scale_fmt=None))
    theirs = Fp8Quantize(how)._quantize_one(NAME, base.exact.float())
    assert torch.allclose(tensors[base.scale][0], theirs[base.scale][0], rtol=2.0**-22, atol=0)
    assert torch.equal(tensors[base.scale][1], base.s[1])
    assert torch.equal(tensors[NAME][128:].view(torch.uint8), base.q[128:].view(torch.uint8))


def test_scales_that_are_powers_of_two_stay_so(tmp_path: Path) -> None:
    """config.json's scale_fmt ue8m0: the next power of two that holds the block."""
    base = Base(tmp_path, "fine-grained", 1.0)
    config = {"quantization_config": FINE | {"scale_fmt": "ue8m0"}}
    (base.path / "config.json").write_text(json.dumps(config))
    surgery.merge(base.path, base.adapter, tmp_path / "m")
    scales = load_file(tmp_path / "m" / "model.safetensors")[base.scale]
    assert bool((torch.frexp(scales).mantissa == 0.5).all())
    _, spread_out = base.stored(tmp_path / "m")
    assert bool((base.exact.abs() <= 464 * spread_out).all())
    assert bool(base.exact.abs().max() > 224 * spread_out.max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_blocks_and_budget_do_not_show(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes, and the same report; also where a block is too large to be held."""
    base = Base(tmp_path, layout)
    outputs, reports = [], []
    for index, (jobs, memory, held) in enumerate([(1, 1 << 30, 1 << 20), (3, 1, 1 << 20), (1, 1 << 30, 100)]):
        monkeypatch.setattr(scaled, "_HELD", held)
        done = surgery.merge(base.path, base.adapter, tmp_path / str(index), resources=surgery.Resources(jobs, memory))
        outputs.append((tmp_path / str(index) / "model.safetensors").read_bytes())
        reports.append(done.surviving)
    assert outputs[0] == outputs[1] == outputs[2]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("strength", [0.0002, 0.5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_undo_is_bit_exact(tmp_path: Path, layout: str, strength: float) -> None:
    """Weight and scales, whether the scales have grown or not."""
    base = Base(tmp_path, layout, strength)
    surgery.merge(base.path, base.adapter, tmp_path / "m", undo=tmp_path / "u.st")
    report = surgery.unmerge(tmp_path / "m", base.adapter, tmp_path / "b", undo=tmp_path / "u.st")
    assert report.bit_exact is True
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (base.path / "model.safetensors").read_bytes()
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors[base.scale] = tensors[base.scale] * 2
    save_file(tensors, tmp_path / "other.st")
    with pytest.raises(UndoMismatch):
        surgery.unmerge(tmp_path / "other.st", base.adapter, tmp_path / "c.st", undo=tmp_path / "u.st")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unmerge_without_undo_is_within_rounding(tmp_path: Path, layout: str) -> None:
    """The nearest float8 under the scales there are; whether that is the base is said."""
    base = Base(tmp_path, layout)
    surgery.merge(base.path, base.adapter, tmp_path / "m")
    report = surgery.unmerge(tmp_path / "m", base.adapter, tmp_path / "b")
    assert report.bit_exact is False
    back, scales = base.stored(tmp_path / "b")
    merged, _ = base.stored(tmp_path / "m")
    bound = half_a_step(torch.maximum(merged.abs(), base.w0.abs()) * 1.2, scales, base.q.dtype)
    assert bool(((back - base.w0).abs() <= 2.5 * bound).all())


def test_verify_replays_weight_and_scales(tmp_path: Path) -> None:
    """Exact; and one bit of a scale is enough."""
    base = Base(tmp_path, "fine-grained")
    surgery.merge(base.path, base.adapter, tmp_path / "m")
    assert surgery.verify(tmp_path / "m", base.path, base.adapter).verdict == "exact"
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors[base.scale].view(torch.int32)[0, 0] ^= 1
    save_file(tensors, tmp_path / "bare.st")
    report = surgery.verify(tmp_path / "bare.st", base.path, base.adapter)
    assert report.differing == (base.scale,)


def test_an_untouched_float8_weight_is_copied(tmp_path: Path) -> None:
    """With its scales, and the ledger accounts for every tensor."""
    base = Base(tmp_path, "fine-grained", 1e-4)
    other = {name.replace("up", "gate"): tensor.clone() for name, tensor in base.tensors.items() if "up" in name}
    save_file(base.tensors | other, base.path / "model.safetensors")
    report = surgery.merge(base.path, base.adapter, tmp_path / "m")
    assert report.ledger["merged"] == 1
    assert sum(report.ledger.values()) == len(base.tensors) + len(other)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_plain_float8_base_is_rounded_like_any_other(tmp_path: Path, dtype: torch.dtype) -> None:
    """No scale, no quantization_config: W0 is what is stored. Undo as ever; beyond the range is an error."""
    base = Base(tmp_path, "per tensor, a scalar", 0.1)
    plain = base.w0.to(dtype)
    save_file({NAME: plain}, tmp_path / "base.st")
    surgery.merge(tmp_path / "base.st", base.adapter, tmp_path / "m.st", undo=tmp_path / "u.st")
    exact = plain.double() + 2 * base.b.double() @ base.a.double()
    ours = DType.F8_E4M3 if dtype is E4M3 else DType.F8_E5M2
    merged = load_file(tmp_path / "m.st")[NAME]
    assert int((merged.view(torch.uint8) != round_once(exact, ours).view(torch.uint8)).sum()) <= 1
    report = surgery.unmerge(tmp_path / "m.st", base.adapter, tmp_path / "b.st", undo=tmp_path / "u.st")
    assert report.bit_exact is True
    with pytest.raises(NotFinite, match="exceeds the range"):
        surgery.merge(tmp_path / "base.st", base.adapter, tmp_path / "n.st", weight=1e7)


def broken(base: Base, change: Callable[[Tensors], object]) -> Path:
    """The base with its tensors changed."""
    tensors = dict(base.tensors)
    change(tensors)
    save_file(tensors, base.path / "model.safetensors")
    return base.path


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    """Missing scales, other blocks, a zero point, a scale below zero, a tensor in full over a scaled one."""
    base = Base(tmp_path, "fine-grained")
    merged = tmp_path / "m"
    with pytest.raises(Quantised, match="has no scales"):
        surgery.merge(broken(base, lambda t: t.pop(base.scale)), base.adapter, merged)
    with pytest.raises(ShapeMismatch, match="do not divide") as caught:
        surgery.merge(broken(base, lambda t: t.update({base.scale: torch.ones(4, 3)})), base.adapter, merged)
    assert "128 × 128" in str(caught.value)
    with pytest.raises(Quantised, match="zero point"):
        surgery.merge(broken(base, lambda t: t.update({f"{NAME}_zero_point": torch.ones(1)})), base.adapter, merged)
    with pytest.raises(Quantised, match="dtype"):
        surgery.merge(broken(base, lambda t: t.update({base.scale: base.s.int()})), base.adapter, merged)
    with pytest.raises(NotFinite, match="scale that is negative"):
        surgery.merge(broken(base, lambda t: t.update({base.scale: -base.s})), base.adapter, merged)
    bad = base.q.clone()
    bad.view(torch.uint8)[3, 3] = 0x7F
    with pytest.raises(NotFinite, match="NaN") as found:
        surgery.merge(broken(base, lambda t: t.update({NAME: bad})), base.adapter, merged)
    assert NAME in str(found.value)
    full = lora(tmp_path / "full", {NAME: base.w0.bfloat16()}, modules_to_save=["up"])
    with pytest.raises(NotMergeable, match="in full"):
        surgery.merge(broken(base, dict), full, merged)
    assert not merged.exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dequantised_by_dtype(tmp_path: Path, layout: str) -> None:
    """The way out: plain bfloat16, no scales, no quantization_config; rounded once; undo gives float8 back."""
    base = Base(tmp_path, layout)
    undo = tmp_path / "u.st"
    report = surgery.merge(base.path, base.adapter, tmp_path / "m", dtype="bfloat16", undo=undo)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert set(tensors) == {NAME, "model.norm.weight", "model.up.bias"}
    assert int((tensors[NAME] != round_once(base.exact, DType.BF16)).sum()) <= 1
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    assert report.ledger["removed"] == 2
    assert surgery.verify(tmp_path / "m", base.path, base.adapter).verdict == "exact"
    with pytest.raises(NotMerged, match="dequantised"):
        surgery.unmerge(tmp_path / "m", base.adapter, tmp_path / "no")
    back = surgery.unmerge(tmp_path / "m", base.adapter, tmp_path / "b", undo=undo)
    assert back.bit_exact is True
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (base.path / name).read_bytes()


def test_a_block_of_zeros_gets_a_scale_of_its_own(tmp_path: Path) -> None:
    """A placeholder of 1 would flush a small delta to zero."""
    base = Base(tmp_path, "fine-grained")
    base.q[:128, :128] = 0
    base.s[0, 0] = 1.0
    tensors = base.tensors | {NAME: base.q, base.scale: base.s}
    save_file(tensors, base.path / "model.safetensors")
    surgery.merge(base.path, base.adapter, tmp_path / "m")
    merged, scales = base.stored(tmp_path / "m")
    step = half_a_step(base.exact, scales, E4M3)
    assert bool(((merged - base.exact).abs() <= step * (1 + 1e-6)).all())


def test_stacked_experts_with_blocks(tmp_path: Path) -> None:
    """(experts, out, in) with (experts, out/128, in/128) scales: the stack is a matrix of matrices."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 128, 256, generator=generator).to(E4M3)
    s = torch.rand(2, 1, 2, generator=generator) * 0.01 + 0.001
    name = "model.experts.up_proj"
    save_file({name: q, f"{name}_scale_inv": s}, tmp_path / "base.st")
    factors = {
        "model.experts.lora_A.weight": torch.randn(4, 256, generator=generator),
        "model.experts.lora_B.weight": torch.randn(128, 4, generator=generator) * 1e-3,
    }
    adapter = lora(tmp_path / "a", factors, target_parameters=["experts.up_proj"], target_modules=[])
    surgery.merge(tmp_path / "base.st", adapter, tmp_path / "m.st", undo=tmp_path / "u.st")
    merged = load_file(tmp_path / "m.st")
    a, b = factors["model.experts.lora_A.weight"].reshape(2, 2, 256), factors["model.experts.lora_B.weight"]
    delta = 2 * torch.stack([b.reshape(128, 2, 2)[:, :, e].double() @ a[e].double() for e in range(2)])
    wide = s.double().repeat_interleave(128, 1).repeat_interleave(128, 2)
    exact = q.double() * wide + delta
    scales = merged[f"{name}_scale_inv"].double().repeat_interleave(128, 1).repeat_interleave(128, 2)
    step = half_a_step(exact, scales, E4M3)
    assert bool(((merged[name].double() * scales - exact).abs() <= step * (1 + 1e-6)).all())
    assert surgery.unmerge(tmp_path / "m.st", adapter, tmp_path / "b.st", undo=tmp_path / "u.st").bit_exact is True


def test_a_method_without_a_delta_works_on_what_the_scales_make(tmp_path: Path) -> None:
    """DoRA on float8: m · (W0 + ΔW) / ‖W0 + ΔW‖ to half a step; undo gives the base back."""
    base = Base(tmp_path, "fine-grained, cut blocks")
    magnitude = base.w0.norm(dim=1).float() * 1.5
    factors = {
        "model.up.lora_A.weight": base.a,
        "model.up.lora_B.weight": base.b,
        "model.up.lora_magnitude_vector.weight": magnitude,
    }
    adapter = lora(tmp_path / "dora", factors, use_dora=True)
    surgery.merge(base.path, adapter, tmp_path / "m", undo=tmp_path / "u.st")
    exact = magnitude.double()[:, None] * base.exact / base.exact.norm(dim=1, keepdim=True)
    merged, scales = base.stored(tmp_path / "m")
    assert bool(((merged - exact).abs() <= half_a_step(exact, scales, E4M3) * (1 + 1e-6)).all())
    report = surgery.unmerge(tmp_path / "m", adapter, tmp_path / "b", undo=tmp_path / "u.st")
    assert report.bit_exact is True


def test_two_adapters_are_summed_before_the_one_rounding(tmp_path: Path) -> None:
    """Nearly opposite deltas leave their small difference, which rounding one after the other would lose."""
    base = Base(tmp_path, "fine-grained")
    minus = {"model.up.lora_A.weight": base.a, "model.up.lora_B.weight": -base.b * 1.0001}
    other = lora(tmp_path / "minus", minus)
    report = surgery.merge(base.path, [base.adapter, other], tmp_path / "m", dtype="float32")
    merged = load_file(tmp_path / "m" / "model.safetensors")[NAME].double()
    exact = base.w0 - 2 * 0.0001 * base.b.double() @ base.a.double()
    assert torch.allclose(merged, exact, rtol=0, atol=1e-6)
    assert set(report.surviving) == {NAME}


def test_an_undo_record_that_names_no_blocks_is_damaged(tmp_path: Path) -> None:
    """A size of zero, a weight without a correction of its own: one error, before anything is allocated."""
    base = Base(tmp_path, "fine-grained")
    surgery.merge(base.path, base.adapter, tmp_path / "m", undo=tmp_path / "u.st")
    tensors, metadata = load_file(tmp_path / "u.st"), open_checkpoint(tmp_path / "u.st").metadata
    for scaled_as in ({NAME: [base.scale, 0, 128]}, {NAME: ["nowhere", 128, 128]}):
        document = json.loads(metadata[UNDO])
        document["receipt"] = json.dumps(json.loads(document["receipt"]) | {"scaled": scaled_as})
        save_file(tensors, tmp_path / "bad.st", metadata={UNDO: json.dumps(document)})
        with pytest.raises(CorruptFile, match="contradict"):
            surgery.unmerge(tmp_path / "m", base.adapter, tmp_path / "b", undo=tmp_path / "bad.st")


def test_experts_one_by_one_with_scales(tmp_path: Path) -> None:
    """A file that holds each expert as float8 under scales of its own; the adapter adapts the stack."""
    generator = torch.Generator().manual_seed(3)
    stem, tensors, w0 = "model.layers.0.mlp.experts", {}, []
    for expert in range(3):
        made = quantise(torch.randn(32, 24, generator=generator) * 0.05, (16, 24), torch.float32)
        name = f"{stem}.{expert}.down_proj.weight"
        tensors |= {name: made["q"], f"{name}_scale_inv": made["s"]}
        w0.append(made["q"].double() * spread(made["s"], (16, 24), (32, 24)))
    base = tmp_path / "base"
    base.mkdir()
    save_file(tensors, base / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 24]}}
    (base / "config.json").write_text(json.dumps(config))
    a, b = torch.randn(6, 24, generator=generator), torch.randn(32, 6, generator=generator) * 1e-3
    factors = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    adapter = lora(tmp_path / "a", factors, target_parameters=["mlp.experts.down_proj"], target_modules=[])
    report = surgery.merge(base, adapter, tmp_path / "m")
    assert len(report.surviving) == 3
    merged = load_file(tmp_path / "m" / "model.safetensors")
    for expert in range(3):
        name = f"{stem}.{expert}.down_proj.weight"
        scales = spread(merged[f"{name}_scale_inv"], (16, 24), (32, 24))
        delta = 2 * b.reshape(32, 2, 3)[:, :, expert].double() @ a.reshape(3, 2, 24)[expert].double()
        exact = w0[expert] + delta
        step = half_a_step(exact, scales, E4M3)
        assert bool(((merged[name].double() * scales - exact).abs() <= step * (1 + 1e-6)).all())
