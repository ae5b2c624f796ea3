"""Merged weights in graphs that other exporters made: found in the base byte for byte, or refused."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from formats.errors import OutputExists
from surgery.errors import TemplateMismatch
from surgery.operations.export.into_template import reweigh
from surgery.operations.look.prove import prove
from surgery.operations.merge.merge import merge

Exporter = Callable[[str, Path], None]

KINDS = ("bert", "gpt2", "llama", "vit")
ADAPTED = {
    "bert": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "wte"],
    "llama": ["q_proj", "v_proj", "down_proj", "lm_head"],
    "vit": ["q_proj", "v_proj", "fc1"],
}


def _model(kind: str) -> Any:
    """A tiny random model of one of the classes, every parameter unlike the others."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
    }  # fmt: skip
    text = {**sizes, "vocab_size": 100, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
    model: Any
    if kind == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**text))
    elif kind == "gpt2":
        small = {"vocab_size": 100, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, bos_token_id=0, eos_token_id=0))
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text, num_key_value_heads=2))
    else:
        model = transformers.ViTForImageClassification(
            transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.config.use_cache = False
    return model.eval()


def _inputs(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(0, 100, (2, 8), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _by_torch(kind: str, path: Path) -> None:
    """torch's default export: optimised, weights transposed and renamed."""
    inputs = _inputs(kind)
    axes = {name: dict.fromkeys(range(1 if kind == "vit" else 2), torch.export.Dim.DYNAMIC) for name in inputs}
    torch.onnx.export(_model(kind), (), str(path), kwargs=inputs, dynamo=True, dynamic_shapes=axes, verbose=False)


def _by_transformers(kind: str, path: Path) -> None:
    """transformers' exporter with ONNX Runtime's fusions: query, key and value in one product."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    exporter, config = OnnxExporter(), OnnxConfig(dynamic=True, ort_fusions="cpu")
    exporter.export(_model(kind), _inputs(kind), config=config).save_pretrained(str(path.parent))


@dataclass(frozen=True)
class Case:
    """A class's base and adapter as folders, the merged folder, and what torch makes of that."""

    base: Path
    adapter: Path
    merged: Path
    logits: np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """By class; made when asked for."""
    made: dict[str, Case] = {}

    def case(kind: str) -> Case:
        if kind not in made:
            import peft

            root = tmp_path_factory.mktemp(kind)
            model = _model(kind)
            model.save_pretrained(root / "base")
            config = peft.LoraConfig(r=2, target_modules=ADAPTED[kind], init_lora_weights=False)
            torch.manual_seed(1)
            peft.get_peft_model(model, config).save_pretrained(root / "adapter")
            merge(root / "base", root / "adapter", root / "merged")
            merged = type(_model(kind)).from_pretrained(root / "merged").eval()
            with torch.no_grad():
                logits = merged(**_inputs(kind)).logits.numpy()
            made[kind] = Case(root / "base", root / "adapter", root / "merged", logits)
        return made[kind]

    return case


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Exporter], Path]:
    """A class's graph by an exporter, made when asked for; to be copied, not changed."""
    made: dict[tuple[str, Exporter], Path] = {}

    def template(kind: str, exporter: Exporter) -> Path:
        if (kind, exporter) not in made:
            made[kind, exporter] = tmp_path_factory.mktemp("graph") / "model.onnx"
            exporter(kind, made[kind, exporter])
        return made[kind, exporter]

    return template


@pytest.fixture
def bert(templates: Callable[[str, Exporter], Path]) -> Path:
    """BERT's graph by torch's exporter."""
    return templates("bert", _by_torch)


def _run(path: Path, kind: str) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(str(path))
    inputs = _inputs(kind)
    outputs = session.run(None, {each.name: inputs[each.name].numpy() for each in session.get_inputs()})
    return np.asarray(outputs[0])


def _close(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return float(np.abs(a - b).max()) <= 1e-5 * float(np.abs(b).max())


@pytest.mark.parametrize("exporter", [_by_torch, _by_transformers], ids=["torch", "transformers"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_exporters_graphs(
    tmp_path: Path,
    cases: Callable[[str], Case],
    templates: Callable[[str, Exporter], Path],
    kind: str,
    exporter: Exporter,
) -> None:
    """For four classes: the merged graph gives what torch makes of the merged model, whether its weights come from a
    merged folder or from adapters, and it is the template's program."""
    case, template = cases(kind), templates(kind, exporter)
    report = reweigh(template, case.merged, tmp_path / "a" / "model.onnx", base=case.base)
    assert _close(_run(tmp_path / "a" / "model.onnx", kind), case.logits)
    assert not _close(_run(template, kind), case.logits)
    proof = prove(template, tmp_path / "a" / "model.onnx", shape=(2, 8))
    assert (proof.level, proof.notes, proof.cost_a.uncounted) == ("bytes", (), ())
    assert report.same_graph
    assert sum(report.ledger.values()) == len(load_file(case.base / "model.safetensors"))
    assert report.ledger["unused"] == 0
    if exporter is _by_transformers and kind != "gpt2":
        assert any(recipe.count(";") == 2 for recipe in report.recipes.values())  # query, key and value
    again = reweigh(template, case.base, tmp_path / "b" / "model.onnx", adapters=case.adapter)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert again.surviving.keys()
    assert again.changed == report.changed


class _Logits(torch.nn.Module):
    """What torch's old exporter can trace: tensors in, one tensor out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits


@pytest.mark.filterwarnings("ignore")
def test_torchs_old_exporter(tmp_path: Path, cases: Callable[[str], Case]) -> None:
    """It names folded weights by numbers and says nothing of where they come from: the bytes do."""
    case, template = cases("gpt2"), tmp_path / "model.onnx"
    inputs = _inputs("gpt2")
    model, names = _Logits(_model("gpt2")), list(inputs)
    torch.onnx.export(model, tuple(inputs.values()), str(template), dynamo=False, input_names=names)
    reweigh(template, case.merged, tmp_path / "merged" / "model.onnx", base=case.base)
    assert _close(_run(tmp_path / "merged" / "model.onnx", "gpt2"), case.logits)
    assert prove(template, tmp_path / "merged" / "model.onnx", shape=(2, 8)).level == "graph"


def _bytes(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.iterdir())]


def test_the_command_line(tmp_path: Path, cases: Callable[[str], Case], bert: Path, cli: Callable[..., Result]) -> None:
    """A merged checkpoint and adapters give the same files; options that mean nothing there are refused."""
    case = cases("bert")
    one, two, three, out = (tmp_path / name / "m.onnx" for name in ("one", "two", "three", "x"))
    done = cli("export-onnx", case.merged, "--template", bert, "--base", case.base, "-o", one)
    assert done.exit_code == 0, done.output
    assert "the template's, byte for byte" in done.output
    done = cli("export-onnx", case.base, "--template", bert, "--adapter", case.adapter, "-o", two)
    assert done.exit_code == 0, done.output
    assert "survives rounding" in done.output
    both = ("--base", case.base, "--adapter", case.adapter)
    assert cli("export-onnx", case.base, "--template", bert, *both, "-o", three).exit_code == 0
    assert _bytes(one.parent) == _bytes(two.parent) == _bytes(three.parent)
    for arguments in (
        (case.merged, "--template", bert),
        (case.merged, "--base", case.base),
        (case.merged, "--template", bert, "--base", case.base, "--no-verify"),
        (case.base, "--template", bert, "--adapter", case.adapter, "--as", "branch"),
        (case.base, "--adapter", f"{case.adapter}:0.5"),
    ):
        assert cli("export-onnx", *arguments, "-o", out).exit_code == 2
    assert not out.parent.exists()


def test_adapters_into_another_model_than_the_graphs(tmp_path: Path, cases: Callable[[str], Case], bert: Path) -> None:
    """The graph gets what merging them into that model gives."""
    case = cases("bert")
    weights = load_file(case.base / "model.safetensors")
    shutil.copytree(case.base, tmp_path / "tuned")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, tmp_path / "tuned" / "model.safetensors")
    merge(tmp_path / "tuned", case.adapter, tmp_path / "merged")
    reweigh(bert, tmp_path / "merged", tmp_path / "a" / "m.onnx", base=case.base)
    reweigh(bert, tmp_path / "tuned", tmp_path / "b" / "m.onnx", base=case.base, adapters=case.adapter)
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")


def test_merge_of_a_graph_says_where_to_go(
    tmp_path: Path, cases: Callable[[str], Case], bert: Path, cli: Callable[..., Result]
) -> None:
    """The command that it names does it, with the weights that the user gave."""
    case, out = cases("bert"), tmp_path / "to here" / "m.onnx"
    done = cli("merge", bert, f"{case.adapter}:3", "--weight", 0.5, "--base", case.base, "-o", out)
    assert done.exit_code == 2
    assert not out.parent.exists()
    command = shlex.split(done.stderr.split("`")[1])
    assert command[:2] == ["surgery", "export-onnx"]
    done = cli(*command[1:])
    assert done.exit_code == 0, done.output
    reweigh(bert, case.base, tmp_path / "b" / "m.onnx", adapters=(case.adapter, 1.5))
    assert _bytes(out.parent) == _bytes(tmp_path / "b")
    asked = cli("merge", bert, case.adapter, "--alpha", 8, "--enable-lora", "1,0,1", "--fan-in-fan-out", "-o", out)
    assert asked.exit_code == 2
    assert "export-onnx BASE --template" in asked.stderr
    assert "--alpha 8.0 --enable-lora 1,0,1 --fan-in-fan-out -o" in asked.stderr
    assert cli("merge", case.base, case.adapter, "--base", case.base, "-o", tmp_path / "x").exit_code == 2


def test_every_method_that_merge_knows(tmp_path: Path, cases: Callable[[str], Case], bert: Path) -> None:
    """DoRA, a head in full and two adapters at once: the files are those of the merged checkpoint."""
    import peft

    case = cases("bert")
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules=["key"], use_dora=True, modules_to_save=["classifier"])
    tuned = peft.get_peft_model(_model("bert"), config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "dora")
    adapters = [(case.adapter, 0.5), tmp_path / "dora"]
    merge(case.base, adapters, tmp_path / "merged")
    reweigh(bert, tmp_path / "merged", tmp_path / "a" / "m.onnx", base=case.base)
    report = reweigh(bert, case.base, tmp_path / "b" / "m.onnx", adapters=adapters)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert {"classifier.weight", "classifier.bias"} <= set(report.changed)


def test_another_base_is_refused(tmp_path: Path, cases: Callable[[str], Case], bert: Path) -> None:
    """A checkpoint of the same shapes and other values, in all tensors or in one, is not what the graph was made of."""
    case = cases("bert")
    other = load_file(case.base / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.bias"
    save_file(other | {name: other[name] + 1}, tmp_path / "bias.safetensors")
    save_file({key: tensor + 1 for key, tensor in other.items()}, tmp_path / "all.safetensors")
    for base in ("bias", "all"):
        with pytest.raises(TemplateMismatch, match="has other values than") as caught:
            reweigh(bert, case.merged, tmp_path / "out" / "m.onnx", base=tmp_path / f"{base}.safetensors")
        assert "bert." in caught.value.details["found"]
        assert not (tmp_path / "out").exists()


def test_beside_the_template(tmp_path: Path, cases: Callable[[str], Case], bert: Path) -> None:
    """In the template's own folder the weights get a file called after the output; nothing is replaced unasked."""
    case, folder = cases("bert"), tmp_path / "g"
    folder.mkdir()
    for file in bert.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    report = reweigh(folder / bert.name, case.merged, folder / "merged.onnx", base=case.base)
    assert sorted(file.name for file in folder.iterdir()) == sorted([*before, "merged.onnx", "merged.onnx.data"])
    assert all((folder / name).read_bytes() == data for name, data in before.items())
    assert not report.same_graph
    assert _close(_run(folder / "merged.onnx", "bert"), case.logits)
    assert prove(folder / bert.name, folder / "merged.onnx").level == "graph"
    with pytest.raises(OutputExists):
        reweigh(folder / bert.name, case.merged, folder / "merged.onnx", base=case.base)
    reweigh(folder / bert.name, case.merged, folder / "merged.onnx", base=case.base, force=True)
    with pytest.raises(OutputExists):
        reweigh(folder / bert.name, case.merged, folder / bert.name, base=case.base, force=True)
    with pytest.raises(OutputExists):  # merged.onnx.data is what this template's weights lie in
        reweigh(folder / "merged.onnx", case.base, folder / "merged.onnx", base=case.merged, force=True)
    (folder / "other.onnx").write_bytes((folder / "merged.onnx").read_bytes())
    (folder / "merged.onnx").unlink()
    with pytest.raises(OutputExists):
        reweigh(folder / "other.onnx", case.base, folder / "merged.onnx", base=case.merged, force=True)


def test_our_own_export_as_template(tmp_path: Path, twins: Callable[[str], Any]) -> None:
    """The files are those that exporting the merged model gives, the safetensors header included."""
    base, merged = twins("bert")
    reweigh(base.onnx, merged.model, tmp_path / "new" / "model.onnx", base=base.model)
    for file in merged.onnx.parent.iterdir():
        assert (tmp_path / "new" / file.name).read_bytes() == file.read_bytes()
