"""diffusers' files, as tests/golden/make_diffusers.py made them with diffusers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from places import GOLDEN
from safetensors import safe_open
from safetensors.torch import load_file

import surgery
from formats.errors import AdapterFormatError

WRITTEN = GOLDEN / "diffusers"

ADAPTER = WRITTEN / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_each_part_merges_as_diffusers_fuses_it(tmp_path: Path, part: str) -> None:
    """Today's names and the older ones, with the ranks and alphas of the metadata."""
    base = WRITTEN / f"{part}.st"
    report = surgery.merge(base, ADAPTER, tmp_path / "m.st", told=surgery.Told(component=part))
    assert any("belong to other parts of the pipeline" in note for note in report.notes)
    expected, merged, before = load_file(WRITTEN / f"{part}-fused.st"), load_file(tmp_path / "m.st"), load_file(base)
    assert {name for name in before if not torch.equal(before[name], merged[name])} == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-6)
    surgery.unmerge(tmp_path / "m.st", ADAPTER, tmp_path / "b.st", told=surgery.Told(component=part))
    for name, tensor in load_file(tmp_path / "b.st").items():
        torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=1e-6)


def test_a_file_of_several_parts_asks_which_is_meant(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """The error lists the parts and names the flag; a part that is not there is refused too."""
    result = cli("merge", WRITTEN / "unet.st", ADAPTER, "-o", tmp_path / "m.st")
    assert result.exit_code == 1
    assert "text_encoder, unet" in result.stderr
    assert "--component unet" in result.stderr
    result = cli("merge", WRITTEN / "unet.st", ADAPTER, "-o", tmp_path / "m.st", "--component", "text_encoder_2")
    assert "nothing for this part" in result.stderr
    assert cli("merge", WRITTEN / "unet.st", ADAPTER, "-o", tmp_path / "m.st", "--component", "unet").exit_code == 0
    with pytest.raises(AdapterFormatError, match="no such part"):
        surgery.merge(WRITTEN / "unet.st", ADAPTER, tmp_path / "n.st", told=surgery.Told(component="vae"))


def test_kohya_gets_the_tensors_that_diffusers_gives_it(tmp_path: Path, cli_json: Callable[..., Any]) -> None:
    """Same names, same bytes, with the base and without; alphas are the config's, which diffusers' conversion forgets.
    What is of the other part is left behind and counted."""
    for base in ([], ["--base", WRITTEN / "unet.st"]):
        out = tmp_path / f"k{len(base)}.safetensors"
        report = cli_json("convert", ADAPTER, "--to", "kohya", "--component", "unet", "-o", out, *base)
        assert (report["source"], report["target"], report["weights"]) == ("diffusers", "kohya", {"lora": 29})
        with safe_open(ADAPTER, "pt") as source:
            assert sum(report["ledger"].values()) == len(source.keys())
        assert report["ledger"]["refused"] == 2
    theirs, ours = load_file(WRITTEN / "kohya.st"), load_file(out)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if not name.endswith(".alpha"):
            assert torch.equal(ours[name], tensor)
    assert {tensor.item() for name, tensor in ours.items() if name.endswith(".alpha")} == {3, 4, 5}


def test_diffusers_gets_its_own_file_back(tmp_path: Path) -> None:
    """diffusers → kohya → diffusers: the names and bytes of today's form, each layer's rank and alpha in the metadata.
    diffusers fuses the result as its own (make_diffusers.py, with a file)."""
    told = surgery.Told(component="unet")
    surgery.convert(ADAPTER, tmp_path / "k.safetensors", "kohya", told=told)
    surgery.convert(tmp_path / "k.safetensors", tmp_path / "d", "diffusers", base=WRITTEN / "unet.st")
    written = tmp_path / "d" / "pytorch_lora_weights.safetensors"
    theirs = {name: tensor for name, tensor in load_file(ADAPTER).items() if name.startswith("unet.")}
    ours = load_file(written)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    with safe_open(written, "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (2, 3)
    assert set(config["unet.rank_pattern"].values()) == {1}
    assert set(config["unet.alpha_pattern"].values()) == {4, 5}
    merged = [tmp_path / "one.st", tmp_path / "two.st"]
    for source, out in zip((ADAPTER, written), merged, strict=True):
        surgery.merge(WRITTEN / "unet.st", source, out, told=told)
    one, two = map(load_file, merged)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_all_parts_go_through_kohya_in_one_file(tmp_path: Path, cli_json: Callable[..., Any]) -> None:
    """With a base for each: every tensor comes along, and every part merges as diffusers fuses it."""
    bases = [f"--base={part}={WRITTEN / part}.st" for part in ("unet", "text_encoder")]
    report = cli_json("convert", ADAPTER, "--to", "kohya", *bases, "-o", tmp_path / "k.safetensors")
    assert (report["component"], report["ledger"]["copied"], report["ledger"]["refused"]) == (
        "unet, text_encoder",
        60,
        0,
    )
    surgery.convert(
        tmp_path / "k.safetensors",
        tmp_path / "d.safetensors",
        "diffusers",
        base={part: WRITTEN / f"{part}.st" for part in ("unet", "text_encoder")},
    )
    with safe_open(tmp_path / "d.safetensors", "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (config["unet.lora_alpha"], config["text_encoder.lora_alpha"]) == (3, 2)
    for part in ("unet", "text_encoder"):
        for source in ("k", "d"):
            told = surgery.Told(component=part)
            surgery.merge(
                WRITTEN / f"{part}.st", tmp_path / f"{source}.safetensors", tmp_path / "m.st", told=told, force=True
            )
            merged = load_file(tmp_path / "m.st")
            for name, tensor in load_file(WRITTEN / f"{part}-fused.st").items():
                torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-6)


def test_bases_of_parts_are_for_dialects_that_have_them(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """peft's adapters are of one model; and one base, or one for each part, never both."""
    out = tmp_path / "out"
    result = cli("convert", ADAPTER, "--to", "peft", f"--base=unet={WRITTEN / 'unet.st'}", "-o", out)
    assert (result.exit_code, "one for each part" in result.stderr) == (1, True)
    result = cli("convert", ADAPTER, "--to", "kohya", "--base=unet=a", "--base=b", "-o", out)
    assert result.exit_code == 2
