"""`surgery fold`: what it refuses, what it leaves behind, and its command."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bottleneck_models import GOLDEN, MODELS, saved
from click.testing import CliRunner
from places import ROOT
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli import main

BASE = GOLDEN / "bert" / "base.st"
LAYER = "encoder.layer.0.output.adapters.style"
Change = Callable[[dict[str, torch.Tensor]], None]


def same(tensors: dict[str, torch.Tensor]) -> None:
    """Changes nothing."""


def without(*prefixes: str) -> Change:
    """Takes tensors away."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefixes)]:
            del tensors[name]

    return change


def edited(folder: Path, name: str, change: Change = same, **settings: Any) -> Path:
    """A copy of a golden adapter of BERT with other tensors and settings."""
    copy = folder / "adapter"
    shutil.copytree(GOLDEN / "bert" / name, copy)
    tensors = load_file(copy / "adapter.safetensors")
    change(tensors)
    save_file(tensors, copy / "adapter.safetensors")
    config = json.loads((copy / "adapter_config.json").read_text())
    config["config"] |= settings
    (copy / "adapter_config.json").write_text(json.dumps(config))
    return copy


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    """As a diverged training leaves it."""
    tensors[f"{LAYER}.adapter_up.bias"][0] = torch.inf


@pytest.mark.parametrize(
    ("name", "change", "settings", "message"),
    [
        ("double_seq_bn_linear", same, {"non_linearity": "snake"}, "unknown non-linearity"),
        ("double_seq_bn_linear", same, {"use_gating": True}, "depends on the input"),
        ("double_seq_bn_linear", same, {"inv_adapter": "nice"}, "invertible"),
        ("double_seq_bn_linear", same, {"ln_before": True}, "a separate norm"),
        ("double_seq_bn_linear", same, {"original_ln_after": False}, "own residual and norm"),
        ("double_seq_bn_linear", without(LAYER), {}, "disagree about a bottleneck"),
        ("double_seq_bn_linear", without("encoder.layer.1"), {}, "or the base has another number of layers"),
        ("double_seq_bn_linear", without(f"{LAYER}.adapter_up.weight"), {}, "a part of the adapter is missing"),
        ("double_seq_bn_linear", same, {"reduction_factor": 4}, "does not fit the base"),
        ("double_seq_bn_linear", infinite, {}, "NaN or Inf"),
        ("seq_bn", same, {"architecture": "reft"}, "at chosen positions"),
        ("prompt_tuning", same, {"prompt_length": 2}, "does not fit the base"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str, change: Change, settings: dict[str, Any], message: str
) -> None:
    """With the reason."""
    adapter = edited(tmp_path, name, change, **settings)
    with pytest.raises(surgery.ReportedError, match=message):
        surgery.fold(BASE, adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_another_model_s_adapter_is_refused(tmp_path: Path) -> None:
    """Of another architecture or width."""
    with pytest.raises(surgery.ReportedError, match="match nothing in the base"):
        surgery.fold(GOLDEN / "gpt2" / "base.st", GOLDEN / "bert" / "seq_bn", tmp_path / "out")
    wide = {name: tensor.repeat(*[2] * tensor.dim()) for name, tensor in load_file(BASE).items()}
    save_file(wide, tmp_path / "wide.st")
    with pytest.raises(surgery.ReportedError, match="does not fit the base"):
        surgery.fold(tmp_path / "wide.st", GOLDEN / "bert" / "seq_bn", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "other", "name"),
    [
        (model, other, name)
        for name in ("double_seq_bn", "prefix_tuning")
        for model in MODELS
        for other in MODELS
        if model != other
    ],
)
def test_no_family_takes_another_s_adapter(tmp_path: Path, model: str, other: str, name: str) -> None:
    """Though the projections of some have the same names, or their prefixes the same keys."""
    if (model, other) in (("bert", "roberta"), ("roberta", "bert")):  # the same layers, and both say so
        assert surgery.prepare_fold(GOLDEN / model / "base.st", GOLDEN / other / name, tmp_path / "out").verdicts
        return
    with pytest.raises(
        surgery.ReportedError, match=r"match nothing|norms are at other places|for another type of model"
    ):
        surgery.fold(GOLDEN / model / "base.st", GOLDEN / other / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_which_the_library_knows_other_sums_is_refused(tmp_path: Path) -> None:
    """By its model type, or by norms and factors that only it has."""
    adapter = tmp_path / "adapter"
    shutil.copytree(GOLDEN / "llama" / "seq_bn", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    with pytest.raises(surgery.ReportedError, match="place that is not supported"):
        surgery.fold(GOLDEN / "llama" / "base.st", adapter, tmp_path / "out")
    for model, extra in (
        ("llama", "layers.{}.post_feedforward_layernorm.weight"),
        ("vit", "encoder.layer.{}.lambda_1"),
    ):
        more = {extra.format(layer): torch.ones(8) for layer in (0, 1)}
        save_file({**load_file(GOLDEN / model / "base.st"), **more}, tmp_path / "other.st")
        with pytest.raises(surgery.ReportedError, match="another number of layers"):
            surgery.fold(tmp_path / "other.st", GOLDEN / model / "seq_bn", tmp_path / "out")


def test_an_early_file_calls_gelu_otherwise(tmp_path: Path) -> None:
    """Without a version "gelu" is the tanh form and "gelu_orig" the exact one, as the library reads it."""
    adapter = edited(tmp_path, "par_bn_gelu")
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["version"]
    for name, meant in (("gelu", "gelu_new"), ("gelu_orig", "gelu"), ("relu", "relu")):
        config["config"]["non_linearity"] = name
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        found = surgery.prepare_fold(BASE, adapter, tmp_path / "out").verdicts
        assert {each.what for each in found} == {f"parallel bottleneck, {meant}"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_plus", "own residual and norm"),
        ("double_seq_bn_gated", "gate depends on the input"),
        ("fusion", "weights depend on the input"),
        ("loreft", "at chosen positions"),
        ("parallel", "not a single adapter"),
        ("prefix_tuning_gated", "gate depends on the input"),
        ("seq_bn_inv", "invertible adapters, which change the embeddings"),
        ("stack", "not a single adapter"),
        ("unipelt", "gate depends on the input"),
    ],
)
def test_what_no_fold_can_express_is_refused(tmp_path: Path, name: str, message: str) -> None:
    """As the library saves it, with the reason; nothing is written, and --dry-run and export-onnx say the same."""
    adapter = GOLDEN / "refused" / name
    base = saved("bert", tmp_path / "base")
    with pytest.raises(surgery.ReportedError, match=message):
        surgery.fold(base, adapter, tmp_path / "out")
    with pytest.raises(surgery.ReportedError, match=message):
        surgery.prepare_fold(base, adapter, tmp_path / "out")
    with pytest.raises(surgery.ReportedError, match=message):
        surgery.export_onnx(base, tmp_path / "out.onnx", adapters=[adapter])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_union_with_lora_is_refused(tmp_path: Path) -> None:
    """Also where UniPELT's gates are switched off."""
    union = tmp_path / "union"
    shutil.copytree(GOLDEN / "refused" / "unipelt", union)
    config = json.loads((union / "adapter_config.json").read_text())
    for part in config["config"]["configs"]:
        part["use_gating"] = False
    (union / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(surgery.ReportedError, match="at most one of each"):
        surgery.fold(BASE, union, tmp_path / "out")


class Runs:
    """What a pickle may carry."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_a_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that holds more than tensors is refused."""
    adapter = edited(tmp_path, "seq_bn")
    (adapter / "adapter.safetensors").unlink()
    torch.save({"x": Runs()}, adapter / "pytorch_adapter.bin", pickle_module=pickle)
    with pytest.raises(surgery.ReportedError):
        surgery.fold(BASE, adapter, tmp_path / "out")
    assert "run" not in capsys.readouterr().out


def test_the_names_of_adapter_bert_are_mapped_as_documented(tmp_path: Path) -> None:
    """The code in docs/fold.md, run: variables in TensorFlow's layout, and what their adapter adds."""
    text = (ROOT / "docs" / "fold.md").read_text()
    scope: dict[str, Any] = {}
    exec(text.split("```python")[1].split("```")[0], scope)
    generator = torch.Generator().manual_seed(0)
    shapes = {"weights1": (8, 4), "biases1": (1, 4), "weights2": (4, 8), "biases2": (1, 8)}
    variables = {
        f"bert/encoder/layer_{layer}/{place}output/adapters/{name}": torch.randn(*shape, generator=generator).numpy()
        for layer in (0, 1)
        for place in ("attention/", "")
        for name, shape in shapes.items()
    }
    scope["write_adapter"](variables, tmp_path / "adapter")
    report = surgery.fold(BASE, tmp_path / "adapter", tmp_path / "out")
    assert [each.what for each in report.verdicts] == ["bottleneck, gelu_new"] * 4
    base, grafts = load_file(BASE), load_file(tmp_path / "out" / "grafts.safetensors")
    module, x = "encoder.layer.1.output", torch.randn(3, 12, generator=generator)
    h = torch.nn.functional.linear(x, base[f"{module}.dense.weight"], base[f"{module}.dense.bias"])
    w1, b1, w2, b2 = (torch.from_numpy(variables[f"bert/encoder/layer_1/output/adapters/{name}"]) for name in shapes)
    path = f"{module}.dense.output_adapter"
    plain = h - base[f"{module}.dense.bias"]  # W x, narrower than x: D stays, and its bias takes the projection's
    torch.testing.assert_close(
        torch.nn.functional.linear(plain, grafts[f"{path}.down"], grafts[f"{path}.down_bias"]), h @ w1 + b1[0]
    )
    torch.testing.assert_close(grafts[f"{path}.up"], w2.T.contiguous())
    torch.testing.assert_close(grafts[f"{path}.up_bias"], b2[0])


@pytest.mark.parametrize("name", ["double_seq_bn_linear", "compacter_linear"])
def test_a_llama_gets_the_biases_that_a_fold_needs(tmp_path: Path, name: str) -> None:
    """By its config, in every layer: zeros but for what the adapter has; where nothing makes room, one node is left."""
    base, adapter = saved("llama", tmp_path / "base"), GOLDEN / "llama" / name
    report = surgery.fold(base, adapter, tmp_path / "out")
    assert report.settings == {"attention_bias": True, "mlp_bias": True}
    assert {each.way for each in report.verdicts} == {"folded"}
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    biases = {tensor: bool(after[tensor].any()) for tensor in after.keys() - before.keys()}
    assert {tensor for tensor, any_of_it in biases.items() if any_of_it} == {
        f"layers.{layer}.{module}.bias" for layer in (0, 1) for module in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert len(biases) == 2 * 7
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    found = surgery.prepare_fold(base, adapter, tmp_path / "other").verdicts
    assert {(each.way, each.reason) for each in found} == {
        ("half-folded", "linear, but the projection has no bias for s(U b_D + b_U)")
    }


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    """To the nearest of what float64 gives; float8 is refused."""
    base = load_file(BASE)
    adapter = edited(tmp_path, "double_seq_bn_linear")
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in base.items()}, tmp_path / "half.st")
    save_file({name: tensor.to(torch.bfloat16).double() for name, tensor in base.items()}, tmp_path / "wide.st")
    for name in ("half", "wide"):
        surgery.fold(tmp_path / f"{name}.st", adapter, tmp_path / f"{name}-out.st")
    half, wide = load_file(tmp_path / "half-out.st"), load_file(tmp_path / "wide-out.st")
    for name, tensor in half.items():
        torch.testing.assert_close(tensor.double(), wide[name], rtol=2.0**-8, atol=0)
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in base.items()}, tmp_path / "eight.st")
    with pytest.raises(surgery.ReportedError, match="plain floating-point weights"):
        surgery.fold(tmp_path / "eight.st", adapter, tmp_path / "out.st")


def test_a_fold_is_recorded(tmp_path: Path) -> None:
    """A second one of the same adapter is refused, and nothing pretends to take it off."""
    adapter = GOLDEN / "bert" / "double_seq_bn_linear"
    report = surgery.fold(BASE, adapter, tmp_path / "out.st")
    assert report.ledger["merged"] == 8
    with pytest.raises(surgery.ReportedError, match="already merged"):
        surgery.fold(tmp_path / "out.st", adapter, tmp_path / "again.st")
    with pytest.raises(surgery.ReportedError):
        surgery.unmerge(tmp_path / "out.st", adapter, tmp_path / "base.st")


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    """As merge refuses it."""

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.zero_()

    with pytest.raises(surgery.ReportedError, match="rounds to zero"):
        surgery.fold(BASE, edited(tmp_path, "double_seq_bn_linear", zero), tmp_path / "out.st")
    assert not (tmp_path / "out.st").exists()


def test_the_output_never_replaces_an_input(tmp_path: Path) -> None:
    """Neither the model nor the adapter."""
    adapter = edited(tmp_path, "double_seq_bn_linear")
    for out in (BASE, adapter):
        with pytest.raises(surgery.ReportedError):
            surgery.fold(BASE, adapter, out, force=True)


def test_the_command_says_what_becomes_of_what(tmp_path: Path) -> None:
    """As a table, a plan or JSON."""
    adapter, out = GOLDEN / "gpt2" / "par_bn", tmp_path / "out"
    arguments = ["fold", str(GOLDEN / "gpt2" / "base.st"), str(adapter), "-o", str(out)]
    dry = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "h.N.mlp.c_proj" in dry.output
    assert not out.exists()
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "grafts.safetensors" in done.output
    document = json.loads(CliRunner().invoke(main, [*arguments, "--force", "--json"]).output)
    assert [each["way"] for each in document["verdicts"]] == ["graph", "graph"]
    plan = json.loads(CliRunner().invoke(main, [*arguments, "--force", "--json", "--dry-run"]).output)
    assert plan["verdicts"] == document["verdicts"]
    assert plan["bytes_written"] > 0


def test_the_command_refuses_with_exit_code_1(tmp_path: Path) -> None:
    """And says why on stderr."""
    adapter = edited(tmp_path, "seq_bn", use_gating=True)
    done = CliRunner().invoke(main, ["fold", str(BASE), str(adapter), "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "depends on the input" in done.stderr


@pytest.mark.parametrize("option", [["--approximate"], ["--calibration", "rows.st"], ["--max-error", "0.1"]])
def test_an_option_that_was_taken_away_says_where_to_go(tmp_path: Path, option: list[str]) -> None:
    """A usage error in one sentence; nothing is written."""
    arguments = ["fold", str(BASE), str(GOLDEN / "bert" / "par_bn"), "-o", str(tmp_path / "out"), *option]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert "were taken away: fold without them" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["bert/par_bn", "heads/bert_static_lora"])
def test_a_prepared_fold_is_what_fold_does(tmp_path: Path, name: str) -> None:
    """Of bottlenecks, and of what is merged: nothing is written until it runs, and then the same bytes."""
    base, adapter = saved("bert", tmp_path / "base"), GOLDEN / name
    job = surgery.prepare_fold(base, adapter, tmp_path / "a")
    plan = job.summary
    assert (plan.operation, plan.inputs, plan.outputs) == ("fold", (str(base), str(adapter)), (str(tmp_path / "a"),))
    assert plan.verdicts == job.verdicts
    assert not (tmp_path / "a").exists()
    report, again = job.run(), surgery.fold(base, adapter, tmp_path / "b")
    assert (report.operation, report.verdicts, report.digest) == ("fold", plan.verdicts, again.digest)
    written = [{file.name: file.read_bytes() for file in (tmp_path / out).iterdir()} for out in "ab"]
    assert written[0] == written[1]


def test_the_plan_refuses_a_file_that_has_no_room_for_grafts(tmp_path: Path) -> None:
    """As the run does, in the same words."""
    words = ["fold", str(BASE), str(GOLDEN / "bert" / "seq_bn"), "-o", str(tmp_path / "out.st")]
    run, dry = CliRunner().invoke(main, words), CliRunner().invoke(main, [*words, "--dry-run"])
    assert run.exit_code == dry.exit_code == 1
    assert run.stderr == dry.stderr
    assert "must stay in the graph" in dry.stderr
