from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from click.testing import Result
from dialect_models import changes
from gguf_models import KINDS, applied, as_llama_cpp_stores, file_name, gpt2, llama, made
from safetensors.torch import load_file

import surgery
from formats.dialects.gguf_names import ARCHITECTURES, gguf_names
from formats.errors import AdapterFormatError, ReportedError

WEIGHTS = "base/model.safetensors"
PART = "text_encoder"
# What of these kinds the other dialects have.
PLAIN = {"linear", "attention", "ranks", "rsLoRA"}
HAS = {
    "peft": set(KINDS),
    "kohya": PLAIN,
    "lycoris": PLAIN,
    "comfyui": set(KINDS),
    "diffusers": PLAIN,
    "loralib": set(KINDS),
    "adapterhub": {"attention"},
    "gguf": set(KINDS),
}
PAIRS = [(kind, dialect) for dialect, kinds in HAS.items() for kind in sorted(kinds)]


def told_of(dialect: str, kind: str) -> surgery.Told:
    """What must be said of a file in a dialect."""
    return surgery.Told(alpha=12 if kind == "rsLoRA" else 6) if dialect == "loralib" else surgery.Told()


def converted(folder: Path, source: Path, dialect: str, kind: str, to: str) -> Path:
    """Converts, with the part of a pipeline where one of the two has any."""
    parts = {dialect, to} - {"peft", "loralib", "adapterhub", "gguf"}
    told = surgery.Told(alpha=told_of(dialect, kind).alpha, component=PART if parts else None)
    end = {"gguf": ".gguf", "adapterhub": ""}.get(to, ".st")
    out = folder / f"{source.name.partition('.')[0]}-{to}{end}"
    surgery.convert(source, out, to, base=folder / "base", told=told)
    return out


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], base: Path) -> None:
    """Two sets of changes, within 1e-6 of the larger of change and weight."""
    assert found.keys() == expected.keys()
    weights = load_file(base)
    for name, delta in expected.items():
        scale = max(delta.abs().max().item(), weights[name].abs().max().item())
        assert (found[name] - delta).abs().max() <= 1e-6 * scale, name


@pytest.mark.parametrize(("kind", "dialect"), PAIRS)
def test_round_trips(tmp_path: Path, kind: str, dialect: str) -> None:
    """peft → a dialect → gguf → the dialect again: the same ΔW within 1e-6 at every step."""
    made(tmp_path, kind)
    base, source = tmp_path / WEIGHTS, tmp_path / "peft"
    expected = changes(base, source, tmp_path)
    assert expected
    if dialect != "peft":
        source = converted(tmp_path, source, "peft", kind, dialect)
    written = converted(tmp_path, source, dialect, kind, "gguf")
    same(changes(base, written, tmp_path), expected, base)
    again = converted(tmp_path, written, "gguf", kind, dialect)
    same(changes(base, again, tmp_path, alpha=told_of(dialect, kind).alpha), expected, base)


@pytest.mark.parametrize("dialect", HAS)
def test_what_other_dialects_lack_is_refused_from_gguf_too(tmp_path: Path, dialect: str) -> None:
    """An embedding and a Conv1D, read from a GGUF file."""
    for kind in {"embedding", "Conv1D"} - HAS[dialect]:
        folder = tmp_path / kind
        folder.mkdir()
        made(folder, kind)
        source = converted(folder, folder / "peft", "peft", kind, "gguf")
        with pytest.raises(AdapterFormatError, match="cannot express"):
            converted(folder, source, "gguf", kind, dialect)


@pytest.mark.parametrize("kind", ["linear", "ranks", "rsLoRA", "embedding"])
def test_llama_cpp_gets_the_merged_model(tmp_path: Path, kind: str) -> None:
    """P(W0) + alpha / rank · B A is P(W) of the model that peft merges, P what llama.cpp's conversion does to a weight:
    for every weight by llama.cpp's name of it, ranks and scalings of its own included."""
    merged = made(tmp_path, kind).state_dict()
    out = converted(tmp_path, tmp_path / "peft", "peft", kind, "gguf")
    base, deltas = load_file(tmp_path / WEIGHTS), applied(out)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert deltas.keys() == {file_name(name) for name in changed}
    for name in changed:
        found = as_llama_cpp_stores(name, base[name]) + deltas[file_name(name)]
        np.testing.assert_allclose(found, as_llama_cpp_stores(name, merged[name]), atol=2e-6)


def test_gpt2_is_stored_as_llama_cpp_stores_it(tmp_path: Path) -> None:
    """Its Conv1D turned: lora_a has the inputs, lora_b the outputs, as llama-adapter.cpp checks."""
    merged = made(tmp_path, "Conv1D").state_dict()
    deltas = applied(converted(tmp_path, tmp_path / "peft", "peft", "Conv1D", "gguf"))
    base = load_file(tmp_path / WEIGHTS)
    name = "transformer.h.0.attn.c_attn.weight"
    found = base[name].numpy().T + deltas["blk.0.attn_qkv.weight"]
    np.testing.assert_allclose(found, merged[name].numpy().T, atol=2e-6)
    assert deltas.keys() == {f"blk.0.{each}.weight" for each in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")}


def test_the_gguf_package_would_write_the_same_bytes(tmp_path: Path) -> None:
    """Key-values, names, shapes, values, padding: what its own writer makes of the tensors that its reader finds."""
    made(tmp_path, "ranks")
    out = converted(tmp_path, tmp_path / "peft", "peft", "ranks", "gguf")
    reader = gguf.GGUFReader(out)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert values["general.architecture"] == "llama"
    assert values["general.type"] == "adapter"
    assert values["adapter.type"] == "lora"
    assert values["adapter.lora.alpha"] == 6.0
    assert values["surgery"].endswith("convert")
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", values.pop("general.architecture"))
    for name, value in values.items():
        writer.add_float32(name, value) if name == "adapter.lora.alpha" else writer.add_string(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert out.read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_one_scaling_keeps_the_bytes(tmp_path: Path, cli_json: Callable[..., Any]) -> None:
    """Only the rows of queries and keys move; where scalings differ, the report says how many layers are multiplied."""
    made(tmp_path, "linear")
    out = tmp_path / "a.gguf"
    report = cli_json("convert", tmp_path / "peft", "--to", "gguf", "--base", tmp_path / "base", "-o", out)
    assert (report["copied"], report["computed"]) == (20, 4)  # 12 layers; lora_b of queries and keys in two of each
    factors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out).tensors}
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    assert stored["blk.1.ffn_down.weight.lora_b"].tobytes() == factors[key].numpy().tobytes()
    made(tmp_path / "ranks", "ranks")
    report = cli_json(
        "convert", tmp_path / "ranks/peft", "--to", "gguf", "--base", tmp_path / "ranks/base", "-o", tmp_path / "r.gguf"
    )
    assert report["notes"] == ["2 layers have another alpha: the difference is multiplied into their lora_b"]


@pytest.mark.parametrize(
    ("dtype", "kind"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32"), ("float64", "F32")]
)
def test_dtypes(tmp_path: Path, dtype: str, kind: str) -> None:
    """Kept where llama.cpp multiplies them; float64 becomes float32, rounded once."""
    made(tmp_path, "linear")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    from safetensors.torch import save_file

    save_file({name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(path).items()}, path)
    out = converted(tmp_path, tmp_path / "peft", "peft", "linear", "gguf")
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors} == {kind}
    base = tmp_path / WEIGHTS
    same(changes(base, out, tmp_path), changes(base, tmp_path / "peft", tmp_path), base)


def test_threads_do_not_show(tmp_path: Path) -> None:
    """The same bytes for any number of them, and for factors in another order."""
    made(tmp_path, "ranks")
    outputs = set()
    for jobs in (1, 3):
        out = tmp_path / f"{jobs}.gguf"
        how = surgery.Resources(jobs=jobs)
        surgery.convert(tmp_path / "peft", out, "gguf", base=tmp_path / "base", resources=how)
        outputs.add(out.read_bytes())
    assert len(outputs) == 1


def test_the_whole_way_on_the_command_line(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """inspect names the dialect; merge, verify and unmerge take the file as any adapter, beside a config.json."""
    made(tmp_path, "embedding")
    base, out, merged = tmp_path / "base", tmp_path / "a.gguf", tmp_path / "merged"
    assert cli("convert", tmp_path / "peft", "--to", "gguf", "--base", base, "-o", out).exit_code == 0
    shown = cli("inspect", out).stdout
    assert "gguf" in shown
    assert "llama" in shown
    assert cli("merge", base, out, "-o", merged).exit_code == 0
    assert cli("verify", merged, "--base", base, "--adapter", out).exit_code == 0
    assert cli("unmerge", merged, out, "-o", tmp_path / "again").exit_code == 0
    before, after = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    alone = tmp_path / "alone.st"
    assert cli("merge", base, out, "-o", alone).exit_code == 0
    assert "put its config.json next to" in cli("unmerge", alone, out, "-o", tmp_path / "once-more.st").stderr


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, "LoHa"])
def test_what_gguf_has_no_place_for(tmp_path: Path, settings: Any) -> None:
    """DoRA, biases, whole tensors, other methods: refused, or left behind where that was asked for."""
    torch.manual_seed(0)
    model = llama(attention_bias=True)
    model.save_pretrained(tmp_path / "base")
    targets = {"target_modules": ["q_proj", "v_proj"]}
    config = peft.LoHaConfig(r=2, **targets) if settings == "LoHa" else peft.LoraConfig(r=2, **targets, **settings)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "peft")
    with pytest.raises(AdapterFormatError, match="gguf cannot express") as caught:
        converted(tmp_path, tmp_path / "peft", "peft", "linear", "gguf")
    flag = str(caught.value).rpartition("--drop ")[2]
    if flag == "layer":
        with pytest.raises(AdapterFormatError, match="nothing is left"):
            surgery.convert(tmp_path / "peft", tmp_path / "a.gguf", "gguf", base=tmp_path / "base", drop=[flag])
    else:
        surgery.convert(tmp_path / "peft", tmp_path / "a.gguf", "gguf", base=tmp_path / "base", drop=[flag])
        assert len(applied(tmp_path / "a.gguf")) == 4


def test_an_embedding_that_is_the_head(tmp_path: Path) -> None:
    """llama.cpp has factors of the token embedding for tokens only, and would take them for the head's too."""
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["wte"])).save_pretrained(tmp_path / "peft")
    with pytest.raises(ReportedError, match="the head too"):
        converted(tmp_path, tmp_path / "peft", "peft", "embedding", "gguf")


def test_layers_that_llama_cpp_does_not_adapt_can_be_left_behind(tmp_path: Path, cli_json: Callable[..., Any]) -> None:
    """GPT-2's tied embedding and its positions, by --drop layer; what is left is written."""
    made(tmp_path, "Conv1D", target_modules=["wte", "wpe", "c_attn"])
    how = ("--to", "gguf", "--base", tmp_path / "base", "-o", tmp_path / "a.gguf", "--drop", "layer")
    assert cli_json("convert", tmp_path / "peft", *how)["ledger"]["refused"] == 4
    assert applied(tmp_path / "a.gguf").keys() == {"blk.0.attn_qkv.weight"}
    made(tmp_path, "Conv1D", target_modules=["wte", "wpe"])
    with pytest.raises(AdapterFormatError, match="nothing is left"):
        surgery.convert(tmp_path / "peft", tmp_path / "b.gguf", "gguf", base=tmp_path / "base", drop=["layer"])


@pytest.mark.parametrize(("whole", "inner"), [("LlamaForCausalLM", "LlamaModel"), ("Qwen3ForCausalLM", "Qwen3Model")])
def test_a_model_without_its_head_has_the_same_names(whole: str, inner: str) -> None:
    """As transformers saves the two: with `model.` before the layers, and without."""
    names = list(llama().state_dict())
    found = gguf_names(ARCHITECTURES[whole], names)
    assert len(found) == 2 * 7 + 2  # what is no norm
    inside = [name.removeprefix("model.") for name in names if name != "lm_head.weight"]
    assert set(gguf_names(ARCHITECTURES[inner], inside).values()) == set(found.values()) - {"output.weight"}
