"""LyCORIS's files, with lycoris-lora itself as the judge: the outputs of its modules, and its own loader.

Its `get_diff_weight` and `get_merged_weight` scale LoHa and LoKr twice (4.1.3); what was trained is what forward does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dialect_models import KINDS, PART, Net, made_by_peft
from lycoris import LycorisNetwork, create_lycoris
from lycoris.functional.boft import diff_weight
from lycoris.modules import get_module, make_module
from lycoris.modules.ia3 import IA3Module
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from formats.adapter import AdapterModule
from formats.layers import LayerKind
from formats.spec import DType
from surgery.methods.lycoris import OutputBoft

TOLD = surgery.Told(component=PART)
ALGORITHMS: dict[str, dict[str, Any]] = {
    "locon": {"algo": "locon"},
    "locon, a core": {"algo": "locon", "use_tucker": True},
    "locon, rsLoRA": {"algo": "locon", "rs_lora": True},
    "locon, DoRA": {"algo": "locon", "dora_wd": True},
    "loha": {"algo": "loha"},
    "loha, cores": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 2},
    "lokr, both decomposed": {"algo": "lokr", "decompose_both": True, "linear_dim": 1, "conv_dim": 1},
    "lokr, whole": {"algo": "lokr", "full_matrix": True},
    "lokr, a core": {"algo": "lokr", "use_tucker": True, "conv_dim": 1},
    "loha, DoRA": {"algo": "loha", "dora_wd": True},
    "loha, cores and DoRA": {"algo": "loha", "use_tucker": True, "dora_wd": True},
    "lokr, DoRA": {"algo": "lokr", "factor": 2, "dora_wd": True},
    "locon, a core and DoRA": {"algo": "locon", "use_tucker": True, "dora_wd": True},
    "full": {"algo": "full"},
    "oft": {"algo": "diag-oft"},
    "oft, rescaled": {"algo": "diag-oft", "rescaled": True},
    "oft, constrained": {"algo": "diag-oft", "constraint": 0.02},
    "boft": {"algo": "boft", "linear_dim": 6, "conv_dim": 6, "rescaled": True},
    "boft, constrained": {"algo": "boft", "linear_dim": 6, "conv_dim": 6, "constraint": 0.02},
    "glora": {"algo": "glora"},
    "ia3": {"algo": "ia3"},
    "ia3 on the input": {"algo": "ia3", "on_input": True},
}
PRESET = {
    "enable_conv": True,
    "target_module": ["Linear", "Conv2d", "LayerNorm"],
    "target_name": [],
    "module_algo_map": {},
    "name_algo_map": {},
}


def outputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """What every layer that may be adapted makes of the same input."""
    torch.manual_seed(1)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = module(torch.randn(3, module.in_features))
        elif isinstance(module, nn.LayerNorm):
            found[name] = module(torch.randn(3, 12))
        elif isinstance(module, nn.Conv2d):
            found[name] = module(torch.randn(2, module.in_channels, 5, 5))
    return found


def made_by_lycoris(folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Saves base.st and a file of LyCORIS with random factors; gives the layers' outputs with them applied."""
    torch.manual_seed(0)
    model = Net()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "base.st")
    # The keyword does not reach the modules; the map by which LyCORIS's own presets say it does.
    inputs = {"algo": "ia3", "train_on_input": True}
    by_class = {"Linear": inputs, "Conv2d": inputs} if settings.pop("on_input", False) else {}
    LycorisNetwork.apply_preset(PRESET | {"module_algo_map": by_class})
    how = {"linear_dim": 2, "conv_dim": 2, "linear_alpha": 3, "conv_alpha": 1, "train_norm": True, **settings}
    network = create_lycoris(model, 1.0, **how)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        found = outputs(model)
    network.save_weights(str(folder / "lycoris.safetensors"), None, {})
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_files_merge_as_lycoris_applies_them(tmp_path: Path, algorithm: str) -> None:
    """Linear layers, convolutions and norms: the merged model's layers give what LyCORIS's own forward gives."""
    expected = made_by_lycoris(tmp_path, **ALGORITHMS[algorithm])
    report = surgery.merge(tmp_path / "base.st", tmp_path / "lycoris.safetensors", tmp_path / "merged.st")
    assert report.ledger["merged"] > 10
    merged = Net()
    merged.load_state_dict(load_file(tmp_path / "merged.st"))
    with torch.no_grad():
        for name, output in outputs(merged).items():
            torch.testing.assert_close(output, expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_they_are_taken_off_and_verified(tmp_path: Path, algorithm: str) -> None:
    """The replay agrees; the base comes back bit for bit with an undo file, and without one where nothing is lost."""
    made_by_lycoris(tmp_path, **ALGORITHMS[algorithm])
    base, adapter, merged = tmp_path / "base.st", tmp_path / "lycoris.safetensors", tmp_path / "merged.st"
    surgery.merge(base, adapter, merged, undo=tmp_path / "undo.st")
    assert surgery.verify(merged, base, adapter).verdict == "exact"
    assert surgery.unmerge(merged, adapter, tmp_path / "exact.st", undo=tmp_path / "undo.st").bit_exact
    assert (tmp_path / "exact.st").read_bytes() == base.read_bytes()
    if "DoRA" not in algorithm:
        surgery.unmerge(merged, adapter, tmp_path / "back.st")
        before = load_file(base)
        for name, tensor in load_file(tmp_path / "back.st").items():
            torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(16, 5), (16, 3, 2, 2)])
def test_a_butterfly_of_four_levels_is_lycoris_own(shape: tuple[int, ...]) -> None:
    """Its function of ΔW, with lengths and a constraint that is felt; and the way back."""
    torch.manual_seed(0)
    weight, blocks = torch.randn(shape), torch.randn(4, 8, 2, 2)
    rescale = 1 + 0.3 * torch.rand(16, *(1 for _ in shape[1:]))
    kind = LayerKind.CONV if len(shape) > 2 else LayerKind.LINEAR
    module = AdapterModule("weight", "lycoris_boft", kind, {}, 1, 1.0, settings={"constraint": 0.2})
    factors = {"oft_blocks": blocks, "rescale": rescale}
    expected = weight + diff_weight(weight, blocks, rescale, constraint=0.2 * 16)
    merged = OutputBoft().transform(module, weight, factors, DType.F64)
    torch.testing.assert_close(merged.float(), expected, atol=1e-5, rtol=1e-5)
    back = OutputBoft().transform(module, merged, factors, DType.F64, back=True)
    torch.testing.assert_close(back, weight.double(), atol=1e-12, rtol=0)


# What ComfyUI leaves aside, or reads as something else.
NOT_IN_COMFYUI = {"oft, rescaled", "oft, constrained", "boft, constrained", "ia3", "ia3 on the input"}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_they_come_back_through_comfyui(tmp_path: Path, algorithm: str) -> None:
    """lycoris → comfyui → lycoris: every tensor is the one that LyCORIS wrote, alpha in float32."""
    made_by_lycoris(tmp_path, **ALGORITHMS[algorithm])
    base, source = tmp_path / "base.st", tmp_path / "lycoris.safetensors"
    if algorithm in NOT_IN_COMFYUI:
        with pytest.raises(surgery.ReportedError, match="comfyui cannot express"):
            surgery.convert(source, tmp_path / "c.safetensors", "comfyui", base=base, told=TOLD)
        return
    surgery.convert(source, tmp_path / "c.safetensors", "comfyui", base=base, told=TOLD)
    surgery.convert(tmp_path / "c.safetensors", tmp_path / "l.safetensors", "lycoris", base=base, told=TOLD)
    before = {name.replace("lycoris_", "lora_unet_", 1): tensor for name, tensor in load_file(source).items()}
    after = load_file(tmp_path / "l.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        layer = name.rpartition(".")[0]
        if name.endswith(".alpha") and {f"{layer}.lokr_w1", f"{layer}.lokr_w2"} <= after.keys():
            continue  # it scales nothing
        torch.testing.assert_close(tensor, before[name].to(tensor.dtype), atol=0, rtol=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_as_a_lora_they_do_the_same(tmp_path: Path, algorithm: str) -> None:
    """convert --to lora at full rank, norms included: the layers give what LyCORIS's own forward gives."""
    expected = made_by_lycoris(tmp_path, **ALGORITHMS[algorithm])
    base, out = tmp_path / "base.st", tmp_path / "lora"
    report = surgery.to_lora(tmp_path / "lycoris.safetensors", out, rank=64, base=base, dtype="float32")
    assert all(module.exact for module in report.modules)
    surgery.merge(base, out, tmp_path / "merged.st")
    merged = Net()
    merged.load_state_dict(load_file(tmp_path / "merged.st"))
    with torch.no_grad():
        for name, output in outputs(merged).items():
            torch.testing.assert_close(output, expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["linear", "conv", "ranks", "rsLoRA", "DoRA", "LoHa", "LoKr"])
def test_lycoris_builds_its_modules_from_ours(tmp_path: Path, kind: str) -> None:
    """A converted adapter of peft's gives, in LyCORIS's own modules, the outputs of the model that peft merges."""
    expected = outputs(made_by_peft(tmp_path, kind))
    surgery.convert(tmp_path / "peft", tmp_path / "l.safetensors", "lycoris", base=tmp_path / "base.st")
    model = Net()
    model.load_state_dict(load_file(tmp_path / "base.st"))
    state = load_file(tmp_path / "l.safetensors")
    built = {}
    for name, layer in model.named_modules():
        key = f"lycoris_{name.replace('.', '_')}"
        kind_of, params = get_module(state, key)
        if kind_of is not None:
            with torch.no_grad():
                built[name] = make_module(kind_of, params, key, layer)
    assert len(built) == len({name.partition(".")[0] for name in state})
    assert len(built) == len(KINDS[kind]["target_modules"])
    for module in built.values():
        module.apply_to()
    with torch.no_grad():
        for name, output in outputs(model).items():
            torch.testing.assert_close(output, expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# What peft's one config for all layers cannot say of them: where a weight is split otherwise than its rule splits it.
NOT_IN_PEFT = {
    "full", "loha, DoRA", "loha, cores and DoRA", "lokr, DoRA", "locon, a core and DoRA", "oft", "oft, rescaled",
    "oft, constrained", "boft", "boft, constrained", "glora", "ia3",
}  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_peft_loads_what_lycoris_made(tmp_path: Path, algorithm: str) -> None:
    """Converted, without the norms: exactly these layers, with the outputs of LyCORIS's own forward."""
    expected = made_by_lycoris(tmp_path, **ALGORITHMS[algorithm], train_norm=False)
    base, source, out = tmp_path / "base.st", tmp_path / "lycoris.safetensors", tmp_path / "peft"
    if algorithm in NOT_IN_PEFT:
        with pytest.raises(surgery.ReportedError, match="cannot express"):
            surgery.convert(source, out, "peft", base=base)
        return
    surgery.convert(source, out, "peft", base=base)
    model = Net()
    model.load_state_dict(load_file(base))
    adapted = peft.PeftModel.from_pretrained(model, out)
    roles = ("lora_", "hada_", "lokr_", "ia3_")
    ours = {name for name, _ in adapted.named_parameters() if any(each in name for each in roles)}
    assert len(ours) == len(load_file(out / "adapter_model.safetensors"))
    with torch.no_grad():
        for name, output in outputs(adapted.merge_and_unload()).items():
            torch.testing.assert_close(output, expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("inputs", [True, False], ids=["inputs", "outputs"])
def test_scaled_layers_of_peft_become_lycoris_own(tmp_path: Path, inputs: bool) -> None:
    """(IA)³ of inputs, and of outputs where there is no bias: what peft merges; with a bias it is refused, and the same
    for the weights alone when the biases are left behind."""
    torch.manual_seed(0)
    model = Net()
    base, source, out = tmp_path / "base.st", tmp_path / "peft", tmp_path / "l.safetensors"
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, base)
    layers = ["blocks.1.attn.to_out.0"] if not inputs else ["blocks.0.attn.to_q", "blocks.1.conv_in"]
    adapted = peft.get_peft_model(
        model, peft.IA3Config(target_modules=layers, feedforward_modules=layers if inputs else [])
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "ia3_l" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(source)
    expected = adapted.merge_and_unload().state_dict()
    surgery.convert(source, out, "lycoris", base=base)
    surgery.merge(base, out, tmp_path / "merged.st")
    for name, tensor in load_file(tmp_path / "merged.st").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)
    state, net = load_file(out), Net()
    net.load_state_dict(load_file(base))
    for layer in layers:  # LyCORIS's own module; its loader of files fails on any (IA)³ (4.1.3)
        key = f"lycoris_{layer.replace('.', '_')}"
        module = IA3Module(key, net.get_submodule(layer), train_on_input=bool(state[f"{key}.on_input"]))
        with torch.no_grad():
            module.weight.copy_(state[f"{key}.weight"])
            theirs = module.get_merged_weight()[0]
        torch.testing.assert_close(theirs, expected[f"{layer}.weight"], atol=1e-6, rtol=1e-6)
    surgery.convert(out, tmp_path / "back", "peft", base=base)
    vectors = (load_file(path / "adapter_model.safetensors") for path in (source, tmp_path / "back"))
    before, after = ({key: tensor.flatten() for key, tensor in tensors.items()} for tensors in vectors)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, atol=1e-7, rtol=1e-7)
    if not inputs:
        layer = peft.get_peft_model(
            Net(), peft.IA3Config(target_modules=["blocks.0.attn.to_q"], feedforward_modules=[])
        )
        layer.save_pretrained(source)
        with pytest.raises(surgery.ReportedError, match="the change of a bias") as caught:
            surgery.convert(source, out, "lycoris", base=base, force=True)
        assert "--drop bias" in str(caught.value)
        surgery.convert(source, out, "lycoris", base=base, drop=["bias"], force=True)
