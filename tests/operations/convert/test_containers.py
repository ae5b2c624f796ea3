"""convert between containers, and the other verbs on torch's; the oracles are torch, transformers and peft."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from click.testing import Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Cli = Callable[..., Result]
CliJson = Callable[..., dict[str, Any]]


def as_torch(folder: Path, shards: int = 1) -> dict[str, torch.Tensor]:
    """Turns a saved model's weights into torch's container, as transformers before 5 wrote it: tied names and all."""
    state = tiny_models_state(folder)
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return state
    names = list(state)
    files = {
        name: f"pytorch_model-{1 + at * shards // len(names):05}-of-{shards:05}.bin" for at, name in enumerate(names)
    }
    for file in set(files.values()):
        torch.save({name: state[name] for name in names if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return state


def tiny_models_state(folder: Path) -> dict[str, torch.Tensor]:
    """All the names that the model has, those of tied weights included."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    return dict(tiny_models.load(kind, folder).state_dict())


@pytest.mark.parametrize("kind", tiny_models.CLASSES)
def test_transformers_loads_a_converted_folder_with_equal_logits(cli_json: CliJson, tmp_path: Path, kind: str) -> None:
    """And a tied embedding stands in it once: the names are those that save_pretrained writes."""
    model, folder = tiny_models.build(kind), tmp_path / "m"
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    saved = set(load_file(folder / "model.safetensors"))
    state = as_torch(folder)
    report = cli_json("convert", folder, "-o", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == saved
    assert torch.equal(tiny_models.logits(tiny_models.load(kind, tmp_path / "out")), tiny_models.logits(model))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(
        {file.name for file in folder.iterdir()} - {"pytorch_model.bin"} | {"model.safetensors"}
    )
    assert (report["source"], report["container"]) == ("torch", "safetensors")
    tied = sorted(state.keys() - saved)
    assert tied == (["lm_head.weight"] if kind == "gpt2" else [])
    assert all(any(name in note and "ties" in note for note in report["notes"]) for name in tied)


TIED = {
    "DistilBertForMaskedLM": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48},
    "GPTNeoXForCausalLM": {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
        "tie_word_embeddings": True,
    },
    "OPTForCausalLM": {
        "hidden_size": 32, "num_hidden_layers": 1, "ffn_dim": 32, "num_attention_heads": 2, "word_embed_proj_dim": 32,
    },
    "T5ForConditionalGeneration": {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TIED)
def test_names_left_out_are_those_that_transformers_leaves_out(tmp_path: Path, name: str) -> None:
    """Whatever the embedding and what is tied to it are called; the file loads the same weights."""
    import transformers

    from surgery import convert_container

    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(vocab_size=60, **TIED[name]))
    model.save_pretrained(tmp_path)
    saved = set(load_file(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    convert_container(tmp_path, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == saved < set(model.state_dict())
    loaded = model_class.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())


def test_untied_weights_keep_both_names(cli: Cli, tmp_path: Path) -> None:
    """A file by itself has no config.json that would bring a name back."""
    weight = torch.randn(4, 3)
    torch.save({"embed.weight": weight, "head.weight": weight}, tmp_path / "a.pt")
    done = cli("convert", tmp_path / "a.pt", "-o", tmp_path / "a.safetensors")
    assert done.exit_code == 0, done.output
    assert "are one tensor in this file" in done.output
    assert set(load_file(tmp_path / "a.safetensors")) == {"embed.weight", "head.weight"}


def test_shards_become_shards(cli_json: CliJson, tmp_path: Path) -> None:
    """Called as transformers calls them, with an index that it loads; the digest is the same in any container."""
    model, folder = tiny_models.build("llama", tie_word_embeddings=False), tmp_path / "m"
    model.save_pretrained(folder)
    as_torch(folder, shards=3)
    digest = cli_json("convert", folder, "-o", tmp_path / "out")["digest"]
    names = {f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)}
    assert {file.name for file in (tmp_path / "out").glob("*model*")} == {*names, "model.safetensors.index.json"}
    assert torch.equal(tiny_models.logits(tiny_models.load("llama", tmp_path / "out")), tiny_models.logits(model))
    for source, out in (("out", "one.st"), ("one.st", "one.bin"), ("one.bin", "two.pt"), ("two.pt", "three.st")):
        assert cli_json("convert", tmp_path / source, "-o", tmp_path / out)["digest"] == digest
    with safe_open(tmp_path / "three.st", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    loaded = torch.load(tmp_path / "two.pt", weights_only=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_torchs_container_in_shards(cli: Cli, cli_json: CliJson, tmp_path: Path) -> None:
    """transformers loads them with equal logits; each is a file of torch's; and back they are what they were."""
    model, folder, out = tiny_models.build("bert"), tmp_path / "m", tmp_path / "out"
    model.save_pretrained(folder)
    first = cli_json("convert", folder, "-o", out, "--container", "torch", "--max-shard-size", "20kB")
    assert first["container"].startswith("torch, ")
    index = json.loads((out / "pytorch_model.bin.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"pytorch_model-00001-of-{len(files):05}.bin"
    assert len(files) > 2
    shards = [torch.load(out / file, weights_only=True) for file in files]
    before = load_file(folder / "model.safetensors")
    assert {name: file for shard, file in zip(shards, files, strict=True) for name in shard} == index["weight_map"]
    assert all(torch.equal(tensor, before[name]) for shard in shards for name, tensor in shard.items())
    nbytes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    assert index["metadata"]["total_size"] == sum(nbytes)
    assert all(size <= 20_000 or len(shard) == 1 for size, shard in zip(nbytes, shards, strict=True))
    assert torch.equal(tiny_models.logits(tiny_models.load("bert", out)), tiny_models.logits(model))
    same = cli_json("convert", out, "-o", tmp_path / "same")
    again = cli_json("convert", tmp_path / "same", "-o", tmp_path / "again", "--container", "torch")
    assert same["container"] == f"safetensors, {len(files)} shards"
    assert again["container"] == first["container"]
    assert first["digest"] == same["digest"] == again["digest"]
    assert (tmp_path / "again/pytorch_model.bin.index.json").read_bytes() == (
        out / "pytorch_model.bin.index.json"
    ).read_bytes()
    whole = cli_json("convert", out, "-o", tmp_path / "whole", "--container", "torch", "--max-shard-size", "1GB")
    assert whole["digest"] == first["digest"]
    assert (tmp_path / "whole/pytorch_model.bin").exists()
    assert not (tmp_path / "whole/pytorch_model.bin.index.json").exists()


def test_containers_are_planned_and_contradictions_refused(cli: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A dry run writes nothing; a file's name beats --container; one file has no shards."""
    planned = cli("convert", pair[0], "-o", tmp_path / "out.bin", "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    assert "copy" in planned.stdout
    assert not (tmp_path / "out.bin").exists()
    refused = cli("convert", pair[0], "-o", tmp_path / "out.st", "--container", "torch")
    assert refused.exit_code == 1
    assert "contradicts --container" in refused.stderr
    for name in ("out.st", "out.bin"):
        refused = cli("convert", pair[0], "-o", tmp_path / name, "--max-shard-size", "2kB")
        assert refused.exit_code == 1
        assert "a single file has no shards" in refused.stderr
    assert cli("convert", pair[0], "--to", "peft", "-o", tmp_path / "o", "--container", "torch").exit_code == 2
    assert sorted(tmp_path.glob("out*")) == []


def test_what_torchs_container_cannot_keep_is_told(cli_json: CliJson, tmp_path: Path) -> None:
    """Metadata."""
    save_file({"w": torch.ones(2)}, tmp_path / "a.st", metadata={"format": "pt", "title": "t", "author": "a"})
    (note,) = cli_json("convert", tmp_path / "a.st", "-o", tmp_path / "a.pth")["notes"]
    assert "author, title" in note
    assert cli_json("inspect", tmp_path / "a.pth")["container"] == "torch"


def test_an_adapter_in_torchs_container_merges_and_converts(cli: Cli, cli_json: CliJson, tmp_path: Path) -> None:
    """adapter_model.bin, as peft wrote it, on a base in pytorch_model.bin: as peft merges it, into safetensors."""
    import peft

    model, base = tiny_models.build("llama", tie_word_embeddings=False), tmp_path / "base"
    model.save_pretrained(base)
    as_torch(base)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert (tmp_path / "old" / "adapter_model.bin").exists()
    assert cli_json("inspect", tmp_path / "old")["adapter"]["dialect"] == "peft"
    cli_json("convert", tmp_path / "old", "-o", tmp_path / "new")
    assert {file.name for file in (tmp_path / "new").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    cli_json("convert", tmp_path / "old", "-o", tmp_path / "one.st")  # its config goes into the metadata
    cli_json("convert", tmp_path / "old" / "adapter_model.bin", "-o", tmp_path / "lone.st")
    (note,) = cli_json("convert", tmp_path / "new", "-o", tmp_path / "one.pt")["notes"]
    assert "were dropped: adapter_config" in note
    sources = ("old", "new", "one.st", "lone.st")
    found = [cli_json("merge", base, tmp_path / one, "-o", tmp_path / f"merged-{one}") for one in sources]
    assert len({report["digest"] for report in found}) == 1
    merged = tiny_models.load("llama", tmp_path / "merged-old")
    expected = tuned.merge_and_unload()
    assert torch.allclose(tiny_models.logits(merged), tiny_models.logits(expected), atol=1e-5)
    back = cli_json("unmerge", tmp_path / "merged-old", tmp_path / "old", "-o", tmp_path / "back")
    assert back["ledger"]["unmerged"] == 2
    verified = cli("verify", tmp_path / "merged-old", "--base", base, "--adapter", tmp_path / "old")
    assert verified.exit_code == 0, verified.output
    differ = cli_json("diff", base, tmp_path / "merged-old")["changes"]
    assert {change["name"] for change in differ} == {f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)}


def test_loralibs_own_files_merge(cli_json: CliJson, tmp_path: Path) -> None:
    """torch.save(lora_state_dict(model)), and what a training script keeps beside it."""
    import loralib

    layer = loralib.Linear(6, 4, r=2, lora_alpha=8, merge_weights=False)
    torch.nn.init.normal_(layer.lora_B)
    model = torch.nn.ModuleDict({"proj": layer})
    save_file({"proj.weight": layer.weight.detach(), "proj.bias": layer.bias.detach()}, tmp_path / "base.st")
    torch.save({"model_state_dict": loralib.lora_state_dict(model), "step": 7}, tmp_path / "ckpt.pt")
    arguments = (tmp_path / "base.st", tmp_path / "ckpt.pt", "-o", tmp_path / "merged.st", "--alpha", 8)
    assert any("left behind: step" in note for note in cli_json("merge", *arguments)["notes"])
    expected = layer.weight + 4.0 * layer.lora_B @ layer.lora_A
    assert torch.allclose(load_file(tmp_path / "merged.st")["proj.weight"], expected, atol=1e-6)


def test_files_that_are_not_converted_are_named(cli_json: CliJson, tmp_path: Path) -> None:
    """A Trainer's folder: its weights and its configs come along, its optimiser stays."""
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        torch.save({"w": torch.ones(3)}, folder / name)
    (folder / "trainer_state.json").write_text("{}")
    (note,) = cli_json("convert", folder, "-o", tmp_path / "out")["notes"]
    assert note.endswith(": optimizer.pt, training_args.bin")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.safetensors", "trainer_state.json"}


def test_extract_takes_torch_files_as_it_takes_safetensors(cli_json: CliJson, tmp_path: Path) -> None:
    """The same adapter, tied embedding included."""
    model = tiny_models.build("gpt2")
    model.save_pretrained(tmp_path / "base")
    tiny_models.shift(model).save_pretrained(tmp_path / "tuned")
    cli_json("extract", "--rank", 2, tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "a")
    for name in ("base", "tuned"):
        as_torch(tmp_path / name)
    cli_json("extract", "--rank", 2, tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "b")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_only_convert_writes_torchs_container(cli: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """No folder called x.bin appears."""
    for suffix in ("bin", "pt", "pth", "ckpt"):
        done = cli("extract", "--rank", 2, *pair, "-o", tmp_path / f"x.{suffix}")
        assert done.exit_code == 1
        assert "surgery convert" in done.stderr
        assert not (tmp_path / f"x.{suffix}").exists()


def test_inputs_are_never_replaced(cli: Cli, tmp_path: Path) -> None:
    """Not by --force, not by a file's name inside of the input folder; beside the input's file there is room."""
    model = tmp_path / "m"
    model.mkdir()
    torch.save({"w": torch.ones(3)}, model / "pytorch_model.bin")
    before = (model / "pytorch_model.bin").read_bytes()
    for source in (model, model / "pytorch_model.bin"):
        done = cli("convert", source, "-o", model / "pytorch_model.bin", "--force")
        assert done.exit_code == 1
        assert "overwrite an input" in done.stderr
    assert (model / "pytorch_model.bin").read_bytes() == before
    assert cli("convert", model, "-o", model / "model.safetensors").exit_code == 0
    assert torch.equal(load_file(model / "model.safetensors")["w"], torch.ones(3))


def test_a_harmful_file_fails_every_verb_with_one_error(cli: Cli, tmp_path: Path) -> None:
    """Exit code 1, the name in the message, nothing written."""
    import os
    import pickle
    import zipfile

    class Runs:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'harm'}",)

    with zipfile.ZipFile(tmp_path / "a.bin", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"w": Runs()}, 2))
    for arguments in (
        ["inspect", tmp_path / "a.bin"],
        ["convert", tmp_path / "a.bin", "-o", tmp_path / "out.st"],
        ["diff", tmp_path / "a.bin", tmp_path / "a.bin"],
        ["extract", "--rank", 2, tmp_path / "a.bin", tmp_path / "a.bin", "-o", tmp_path / "out"],
    ):
        done = cli(*arguments)
        assert done.exit_code == 1
        assert "system" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]


def test_inspect_of_a_torch_file_loads_no_torch(tmp_path: Path) -> None:
    """Headers alone."""
    torch.save({"w": torch.ones(3)}, tmp_path / "a.bin")
    program = (
        "import sys\nfrom surgery.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "inspect", tmp_path / "a.bin"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("zipped", [True, False])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, zipped: bool) -> None:
    """34 MB in one tensor, and as much again transposed, there and back: little more than the pages of the latter."""
    matrix = torch.randn(4096, 2048)
    state = {"large": matrix, "turned": matrix.clone().T}
    torch.save(state, tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
    program = """
import sys, resource, torch
from surgery.operations.convert.containers import convert_container
from surgery.pipeline.engine import Resources
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
folder, small = sys.argv[1:]
torch.save({"w": torch.ones(9)}, small)
convert_container(small, folder + "/small.st")
convert_container(folder + "/small.st", folder + "/small.bin")
before = peak()
convert_container(folder + "/a.bin", folder + "/a.st", resources=Resources(jobs=1))
convert_container(folder + "/a.st", folder + "/b.bin", resources=Resources(jobs=1))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path, tmp_path / "s.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = torch.load(tmp_path / "b.bin", weights_only=True)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert int(done.stdout) < 50, done.stdout  # MiB; 32 of them mapped pages, which the kernel may take back
