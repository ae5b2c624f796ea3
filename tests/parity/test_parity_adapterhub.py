"""AdapterHub's LoRA, (IA)³, VeRA and DoRA, as tests/golden/make_adapterhub.py and make_bottleneck.py made them with the
library itself, and what the library made of files that we write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import places
import pytest
import torch
from bottleneck_models import GOLDEN as MODELS
from bottleneck_models import inputs, saved
from safetensors.torch import load_file, save_file

import surgery
from formats.errors import AdapterFormatError

GOLDEN = places.GOLDEN / "adapterhub"
WRITTEN = GOLDEN / "written"
CASES = sorted(path.name for path in WRITTEN.iterdir() if path.is_dir())
TOLD = {
    "bert-kohya": surgery.Told(component="text_encoder"),
    "gpt2-loralib": surgery.Told(alpha=5, enable_lora=(True, False, True)),
}


def edited(folder: Path, model: str, **settings: Any) -> Path:
    """A copy of an adapter with other settings."""
    copy = folder / "adapter"
    shutil.copytree(GOLDEN / model / "adapter", copy)
    file = copy / "adapter_config.json"
    config = json.loads(file.read_text())
    config["version"] = settings.pop("version", config["version"])
    config["config"] |= settings
    file.write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_it_merges_as_its_library_does(tmp_path: Path, model: str) -> None:
    """Linear layers, and two of three slices of GPT-2's fused layer, stored (in, out)."""
    base = GOLDEN / model / "base.st"
    surgery.merge(base, GOLDEN / model / "adapter", tmp_path / "m.st")
    expected, merged, before = load_file(GOLDEN / model / "merged.st"), load_file(tmp_path / "m.st"), load_file(base)
    assert {name for name in before if not torch.equal(before[name], merged[name])} == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_it_becomes_peft_s(tmp_path: Path, model: str) -> None:
    """With the same ΔW; the fused layer's slices as blocks of one B."""
    base = GOLDEN / model / "base.st"
    report = surgery.convert(GOLDEN / model / "adapter", tmp_path / "peft", "peft", base=base)
    assert report.source == "adapterhub"
    surgery.merge(base, tmp_path / "peft", tmp_path / "m.st")
    merged = load_file(tmp_path / "m.st")
    for name, tensor in load_file(GOLDEN / model / "merged.st").items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-6)


def test_older_files_are_scaled_as_they_were_trained(tmp_path: Path) -> None:
    """adapters before 1.1.0 scaled by 1, and reads such files so: 3/2 is what the golden file has."""
    adapter = edited(tmp_path, "bert", version="adapters.1.0.1")
    base = load_file(GOLDEN / "bert" / "base.st")
    surgery.merge(GOLDEN / "bert" / "base.st", adapter, tmp_path / "m.st")
    merged = load_file(tmp_path / "m.st")
    for name, tensor in load_file(GOLDEN / "bert" / "merged.st").items():
        torch.testing.assert_close(1.5 * (merged[name] - base[name]), tensor - base[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "other"}, "only LoRA and"),
        ({"architecture": "prefix_tuning"}, "surgery fold"),
        ({"composition_mode": "other"}, "only LoRA and"),
        ({"composition_mode": "scale"}, "not a factor of"),
        ({"use_gating": True}, "depends on the input"),
        ({"use_dora": True}, "a part of the adapter is missing"),
        ({"vera_d": 0.1}, "not a factor of LoRA"),
        ({"r": 4}, "rank contradicts the config"),
    ],
    ids=str,
)
def test_what_it_cannot_mean_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """With the reason."""
    adapter = edited(tmp_path, "bert", **settings)
    with pytest.raises(AdapterFormatError, match=message):
        surgery.merge(GOLDEN / "bert" / "base.st", adapter, tmp_path / "m.st")


WEIGHTS = MODELS / "weights"


@pytest.mark.parametrize("name", sorted(path.name for path in WEIGHTS.iterdir()))
def test_vera_and_dora_are_what_the_adapted_model_computes(tmp_path: Path, name: str) -> None:
    """With alpha ≠ rank, of which the library's merge of DoRA knows nothing, and the biases that its DoRA scales."""
    from transformers import AutoModel

    base, golden = saved(name.partition("_")[0], tmp_path / "base"), load_file(WEIGHTS / name / "outputs.st")
    report = surgery.merge(base, WEIGHTS / name, tmp_path / "merged")
    with torch.no_grad():
        found = AutoModel.from_pretrained(tmp_path / "merged").eval()(**inputs(golden)).last_hidden_state
    torch.testing.assert_close(found, golden["last_hidden_state"], atol=1e-5, rtol=1e-5)
    assert report.ledger["merged"] == {"bert_dora": 16, "bert_dvora": 8, "bert_vera": 4, "llama_dora": 8}.get(name, 2)
    if name.endswith("_vera"):
        surgery.unmerge(tmp_path / "merged", WEIGHTS / name, tmp_path / "back")
        back, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", base))
        for tensor in before:
            torch.testing.assert_close(back[tensor], before[tensor], atol=1e-6, rtol=1e-5)


def test_vera_and_dora_are_exact_in_float64(tmp_path: Path) -> None:
    """A merged layer against the unmerged one: W x + b, with the library's formula, relative 1e-12."""
    base = {name: tensor.double() for name, tensor in load_file(MODELS / "bert" / "base.st").items()}
    save_file(base, tmp_path / "base.st")
    surgery.merge(tmp_path / "base.st", WEIGHTS / "bert_dvora", tmp_path / "m.st")
    merged, parts = load_file(tmp_path / "m.st"), load_file(WEIGHTS / "bert_dvora" / "adapter.safetensors")
    shared = {role: parts[f"bert.shared_parameters.style.{role}"].double() for role in ("lora_A", "lora_B")}
    layer = "encoder.layer.1.attention.self.value"
    own = {role: parts[f"bert.{layer}.loras.style.{role}"].double() for role in ("vera_B", "vera_D", "m.weight")}
    product = own["vera_B"] @ shared["lora_B"] @ own["vera_D"] @ shared["lora_A"]
    weight, bias = base[f"{layer}.weight"], base[f"{layer}.bias"]
    factor = own["m.weight"][:, 0] / (weight + product).norm(dim=1)
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = factor * (x @ weight.T + bias + 5 / 2 * x @ product.T)
    found = x @ merged[f"{layer}.weight"].T + merged[f"{layer}.bias"]
    assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize(
    ("source", "drop", "message"),
    [
        ("bert_vera", "shared_parameters", "matrices that all layers share"),
        ("bert_dora", "layer.0.attention.self.query.loras.style.m.weight", "a part of the adapter is missing"),
        ("bert_vera", "layer.0.attention.self.query.loras.style.vera_D", "a part of the adapter is missing"),
    ],
)
def test_half_of_a_vera_or_a_dora_is_refused(tmp_path: Path, source: str, drop: str, message: str) -> None:
    """The library itself leaves the shared matrices out where it saves from a model without a head."""
    copy = tmp_path / "adapter"
    shutil.copytree(WEIGHTS / source, copy)
    tensors = load_file(copy / "adapter.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if drop not in name}, copy / "adapter.safetensors")
    with pytest.raises(AdapterFormatError, match=message):
        surgery.merge(MODELS / "bert" / "base.st", copy, tmp_path / "m.st")


def test_a_dora_of_a_layer_stored_the_other_way_is_refused(tmp_path: Path) -> None:
    """The library takes its norms along the wrong side."""
    copy = tmp_path / "adapter"
    shutil.copytree(WEIGHTS / "gpt2_vera", copy)
    tensors = load_file(copy / "adapter.safetensors")
    magnitudes = {f"transformer.h.{layer}.mlp.c_fc.loras.style.m.weight": torch.ones(32, 1) for layer in (0, 1)}
    save_file(tensors | magnitudes, copy / "adapter.safetensors")
    config = json.loads((copy / "adapter_config.json").read_text())
    config["config"]["use_dora"] = True
    (copy / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(surgery.ReportedError, match="not defined for this kind of layer"):
        surgery.merge(MODELS / "gpt2" / "base.st", copy, tmp_path / "m.st")


def test_other_tensors_beside_the_factors_are_refused(tmp_path: Path) -> None:
    """None is left out in silence."""
    adapter = edited(tmp_path, "bert")
    weights = adapter / "adapter.safetensors"
    save_file({**load_file(weights), "prefix_tunings.style.wte": torch.zeros(2)}, weights)
    with pytest.raises(AdapterFormatError, match="not a factor of LoRA"):
        surgery.merge(GOLDEN / "bert" / "base.st", adapter, tmp_path / "m.st")


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_scaled_outputs_merge_with_their_bias(tmp_path: Path, model: str) -> None:
    """(IA)³: the weights that the library merges, and the outputs of its adapted model; its own merge leaves the biases
    as they are, and its merged model gives others."""
    folder = GOLDEN / model
    base = load_file(folder / "ia3.st")
    surgery.merge(folder / "ia3.st", folder / "ia3", tmp_path / "m.st")
    merged, expected = load_file(tmp_path / "m.st"), load_file(folder / "ia3-merged.st")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == set(expected) | {name.replace(".weight", ".bias") for name in expected}
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-6)
    outputs = load_file(folder / "ia3-outputs.st")
    torch.testing.assert_close(forward(model, merged, outputs), outputs["last_hidden_state"], atol=1e-5, rtol=1e-5)
    theirs = forward(model, base | expected, outputs)
    assert (theirs - outputs["last_hidden_state"]).abs().max() > 1e-2


def built(model: str, tensors: dict[str, torch.Tensor]) -> Any:
    """transformers' model with these weights."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

    if model == "bert":
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
        loaded: Any = BertModel(BertConfig(**sizes, vocab_size=16, max_position_embeddings=8))
    else:
        loaded = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    loaded.load_state_dict(tensors)
    return loaded.eval()


def forward(model: str, tensors: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What it gives for the golden input."""
    with torch.no_grad():
        return built(model, tensors)(outputs["input_ids"]).last_hidden_state


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_peft_merges_it_the_same(tmp_path: Path, model: str) -> None:
    """(IA)³ in peft's form, as peft loads it: alpha and the slices that are not adapted are in the vectors."""
    import peft

    folder = GOLDEN / model
    base = folder / "ia3.st"
    report = surgery.convert(folder / "ia3", tmp_path / "peft", "peft", base=base)
    assert report.weights.keys() == {"ia3"}
    surgery.merge(base, folder / "ia3", tmp_path / "m.st")
    theirs = peft.PeftModel.from_pretrained(built(model, load_file(base)), tmp_path / "peft").merge_and_unload()
    for name, tensor in load_file(tmp_path / "m.st").items():
        torch.testing.assert_close(theirs.state_dict()[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_scaled_outputs_come_off_again(tmp_path: Path, model: str) -> None:
    """By division."""
    folder = GOLDEN / model
    surgery.merge(folder / "ia3.st", folder / "ia3", tmp_path / "m.st")
    surgery.unmerge(tmp_path / "m.st", folder / "ia3", tmp_path / "back.st")
    back = load_file(tmp_path / "back.st")
    for name, tensor in load_file(folder / "ia3.st").items():
        torch.testing.assert_close(back[name], tensor, atol=1e-6, rtol=1e-6)


def source(case: str) -> Path:
    """What a written adapter was made of."""
    return next((WRITTEN / case).glob("source*"))


@pytest.mark.parametrize("case", CASES)
def test_what_the_library_loaded_is_what_we_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Tensor by tensor and the config to the byte; the library found each of them and missed none."""
    monkeypatch.chdir(WRITTEN)
    base = f"{case.partition('-')[0]}.st"
    told = TOLD.get(case, surgery.Told())
    surgery.convert(source(case).relative_to(WRITTEN), tmp_path / "adapter", "adapterhub", base=base, told=told)
    made, golden = tmp_path / "adapter", WRITTEN / case / "adapter"
    assert (made / "adapter_config.json").read_bytes() == (golden / "adapter_config.json").read_bytes()
    found, expected = (load_file(folder / "adapter.safetensors") for folder in (made, golden))
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("case", CASES)
def test_what_the_library_merges_of_it_is_what_we_merge(tmp_path: Path, case: str) -> None:
    """Of the adapter that we wrote, and of the one that it was made of; but for the biases, which its merge forgets."""
    base = load_file(WRITTEN / f"{case.partition('-')[0]}.st")
    theirs = base | load_file(WRITTEN / case / "merged.st")
    assert any(not torch.equal(base[name], theirs[name]) for name in base)
    told = TOLD.get(case, surgery.Told())
    for adapter, said in ((WRITTEN / case / "adapter", surgery.Told()), (source(case), told)):
        surgery.merge(WRITTEN / f"{case.partition('-')[0]}.st", adapter, tmp_path / "m.st", told=said, force=True)
        merged = load_file(tmp_path / "m.st")
        for name in base:
            if not (case.endswith("ia3") and name.endswith(".bias")):
                torch.testing.assert_close(merged[name], theirs[name], atol=1e-6, rtol=1e-6)


def test_torch_s_container_is_read_too(tmp_path: Path) -> None:
    """pytorch_adapter.bin, which the library writes unless it is told otherwise."""
    adapter = edited(tmp_path, "bert")
    tensors = load_file(adapter / "adapter.safetensors")
    (adapter / "adapter.safetensors").unlink()
    torch.save(tensors, adapter / "pytorch_adapter.bin")
    surgery.merge(GOLDEN / "bert" / "base.st", adapter, tmp_path / "m.st")
    merged = load_file(tmp_path / "m.st")
    for name, tensor in load_file(GOLDEN / "bert" / "merged.st").items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-6)
