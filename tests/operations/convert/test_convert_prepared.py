"""Conversions as jobs: the plan is looked at, refuses what the run would, and then runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from dialect_models import PART, made_by_peft
from safetensors.torch import load_file, save_file

import surgery
from formats.errors import CorruptFile

TOLD = surgery.Told(component=PART)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The small model with linear layers, an adapter of it in peft's names beside it."""
    made_by_peft(tmp_path, "linear")
    return tmp_path / "base.st"


def test_a_prepared_conversion_is_what_convert_does(base: Path, tmp_path: Path) -> None:
    """The plan names inputs, outputs and bytes, and nothing is written until it runs; the report is convert's."""
    adapter, out = tmp_path / "peft", tmp_path / "a.safetensors"
    job = surgery.prepare_convert(adapter, out, "kohya", base=base, told=TOLD)
    plan = job.summary
    assert (plan.operation, plan.inputs, plan.outputs) == ("convert", (str(adapter), str(base)), (str(out),))
    assert {step.op for step in plan.steps} == {"copy", "make"}
    assert not out.exists()
    report = job.run()
    assert plan.bytes_written == sum(tensor.nbytes for tensor in load_file(out).values())
    again = surgery.convert(adapter, tmp_path / "b.safetensors", "kohya", base=base, told=TOLD)
    assert (tmp_path / "b.safetensors").read_bytes() == out.read_bytes()
    assert (report.copied, report.computed, report.ledger) == (again.copied, again.computed, again.ledger)


def test_every_part_s_base_is_an_input(base: Path, tmp_path: Path, cli_json: Callable[..., dict[str, Any]]) -> None:
    """The plan names each, and the output replaces none of them."""
    kohya, text = tmp_path / "kohya.safetensors", tmp_path / "text.st"
    surgery.convert(tmp_path / "peft", kohya, "kohya", base=base, told=TOLD)
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    save_file({f"{layer}.weight": torch.zeros(4, 6)}, text)
    more = {"lora_down.weight": torch.ones(2, 6), "lora_up.weight": torch.ones(4, 2)}
    own = {f"lora_te_{layer.replace('.', '_')}.{name}": tensor for name, tensor in more.items()}
    save_file(load_file(kohya) | own, kohya)
    bases = (f"--base={PART}={base}", f"--base=text_encoder={text}")
    out = tmp_path / "out.safetensors"
    plan = cli_json("convert", kohya, "--to", "comfyui", *bases, "-o", out, "--dry-run")
    assert plan["inputs"] == [str(kohya), str(base), str(text)]
    assert not out.exists()
    with pytest.raises(surgery.FormatError):
        surgery.prepare_convert(kohya, text, "comfyui", base={PART: base, "text_encoder": text}, force=True)


def test_a_prepared_container_is_what_convert_container_does(base: Path, tmp_path: Path) -> None:
    """The digest is the same whichever runs it."""
    job = surgery.prepare_convert_container(base, tmp_path / "a.bin")
    assert {step.op for step in job.summary.steps} == {"copy"}
    assert not (tmp_path / "a.bin").exists()
    assert job.run().digest == surgery.convert_container(base, tmp_path / "b.bin").digest
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


@pytest.mark.parametrize(
    ("name", "out"), [("config.json", "out"), ("adapter_config.json", "out"), ("adapter_config.json", "o.st")]
)
def test_a_broken_config_goes_into_no_container(base: Path, tmp_path: Path, name: str, out: str) -> None:
    """Where it would go along, it is refused before anything is written."""
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(load_file(base), folder / "model.safetensors")
    (folder / name).write_text("{broken")
    with pytest.raises(CorruptFile, match="config is not JSON"):
        surgery.prepare_convert_container(folder, tmp_path / out)


def test_a_name_of_another_container_is_refused_by_the_plan(
    base: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    """In the words of the run, and in one JSON document."""
    words = ("convert", tmp_path / "peft", "--to", "ort", "--base", base, "-o", tmp_path / "x.safetensors")
    run, dry = cli(*words), cli(*words, "--dry-run")
    assert run.exit_code == dry.exit_code == 1
    assert run.stderr == dry.stderr
    assert "onnx_adapter" in dry.stderr
    assert json.loads(cli(*words, "--dry-run", "--json").stdout)["operation"] == "convert"
