"""Bad input to the dialects and to convert: one clear error each, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from dialect_models import PART, made_by_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import surgery
from formats.errors import AdapterFormatError, OutputExists, ReportedError, ShapeMismatch, UnmatchedKeys

LAYER = "lora_unet_blocks_0_attn_to_q"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    """A kohya file of the small model's linear layers, its base beside it."""
    made_by_peft(tmp_path, "linear")
    out = tmp_path / "kohya.safetensors"
    surgery.convert(tmp_path / "peft", out, "kohya", base=tmp_path / "base.st", told=surgery.Told(component=PART))
    return out


def refused(folder: Path, tensors: Tensors, kind: type[ReportedError] = AdapterFormatError) -> str:
    """What merge says of a file with these tensors; convert says the same."""
    source = folder / "bad.safetensors"
    save_file(tensors, source)
    with pytest.raises(kind) as caught:
        surgery.merge(folder / "base.st", source, folder / "merged.st")
    with pytest.raises(kind):
        surgery.convert(source, folder / "out.safetensors", "peft", base=folder / "base.st")
    assert not (folder / "merged.st").exists()
    assert not (folder / "out.safetensors").exists()
    return str(caught.value)


def test_names_that_stand_for_two_modules_are_refused(tmp_path: Path) -> None:
    """`a.b_c` and `a_b.c` have one form with underscores: both are named, for reading as for writing."""
    save_file({"a.b_c.weight": torch.zeros(4, 4), "a_b.c.weight": torch.zeros(4, 4)}, tmp_path / "base.st")
    layer = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2)}
    said = refused(tmp_path, {f"lora_unet_a_b_c.{name}": tensor for name, tensor in layer.items()})
    assert "matches several modules" in said
    assert "a.b_c, a_b.c" in said
    both = {f"diffusion_model.{module}.{name}": t.clone() for module in ("a.b_c", "a_b.c") for name, t in layer.items()}
    save_file(both, tmp_path / "comfyui.safetensors")
    with pytest.raises(AdapterFormatError, match="two layers one name"):
        surgery.convert(tmp_path / "comfyui.safetensors", tmp_path / "k.safetensors", "kohya")


def test_layers_that_the_base_lacks_are_named_with_the_nearest(kohya: Path, tmp_path: Path) -> None:
    """By the base's own names."""
    tensors = {name.replace("to_q", "to_qq"): tensor for name, tensor in load_file(kohya).items()}
    said = refused(tmp_path, tensors, UnmatchedKeys)
    assert "2 of 3 layers" in said
    assert "nearest: blocks.0.attn.to_q" in said


def test_unknown_keys_name_the_nearest(kohya: Path, tmp_path: Path) -> None:
    """A misspelt factor in a known dialect, and a file of none."""
    tensors = load_file(kohya)
    tensors[f"{LAYER}.lora_dwn.weight"] = tensors.pop(f"{LAYER}.lora_down.weight")
    said = refused(tmp_path, tensors)
    assert "lora_down.weight" in said.partition("expected")[2]
    said = refused(tmp_path, {"somewhere.lora_dow.weight": torch.zeros(2, 2)})
    assert "not an adapter in a dialect we read" in said
    assert "lora_down.weight" in said
    factors = {"lora_A.weight": torch.ones(2, 12), "lora_B.weight": torch.ones(8, 2)}
    for prefix, tail, message in (
        ("mine", "", "check what is before the layers, lora_unet_"),
        ("mine", ".default", "the adapter's own, default"),
    ):
        keys = {f"{prefix}.{key.replace('.weight', f'{tail}.weight')}": tensor for key, tensor in factors.items()}
        assert message in refused(tmp_path, {key: tensor.clone() for key, tensor in keys.items()})
    mixed = {f"unet.q.{key}": tensor for key, tensor in factors.items()} | {"vae.q.lora_A.weight": torch.ones(2, 2)}
    said = refused(tmp_path, mixed)
    assert "found:    vae.q.lora_A.weight" in said
    assert "another kind than the rest" in said
    assert "no tensor here is an adapter's" in refused(tmp_path, {"model.q.weight": torch.ones(2, 2)})


@pytest.mark.parametrize(
    ("layer", "kind", "message"),
    [
        ({"oft_blocks": torch.ones(3, 4, 4)}, ShapeMismatch, "does not fit|do not fit"),
        ({"oft_blocks": torch.ones(2, 4, 3)}, ShapeMismatch, "not square blocks"),
        ({"oft_blocks": torch.ones(2, 4, 4), "rescale": torch.ones(7)}, ShapeMismatch, "one for each output"),
        ({"oft_blocks": torch.ones(2, 4, 4), "alpha": torch.ones(2)}, AdapterFormatError, "alpha is not a number"),
        ({"oft_blocks": torch.ones(1, 2, 4, 3)}, ShapeMismatch, "not square blocks"),
        ({"oft_blocks": torch.ones(3, 2, 4, 4)}, ShapeMismatch, "levels of a butterfly"),
        ({"oft_blocks": torch.ones(1, 1, 1, 4, 4)}, ShapeMismatch, "number of dimensions"),
        ({"rescale": torch.ones(8, 1)}, AdapterFormatError, "without factors"),
        ({"on_input": torch.tensor(1)}, AdapterFormatError, "lacks some of its factors"),
        ({"on_input": torch.ones(2), "weight": torch.ones(8)}, AdapterFormatError, "on_input is not a number"),
        ({"on_input": torch.tensor(1), "weight": torch.ones(8)}, ShapeMismatch, "each channel"),
        ({"a1.weight": torch.ones(12, 2)}, AdapterFormatError, "lacks some of its factors"),
        (
            {"a1.weight": torch.ones(12, 2), "a2.weight": torch.ones(2, 12), "b1.weight": torch.ones(8, 2),
             "b2.weight": torch.ones(2, 11)},
            ShapeMismatch,
            "GLoRA's factors do not fit",
        ),
        ({"bm.weight": torch.ones(2, 2)}, AdapterFormatError, "no program reads"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else getattr(value, "__name__", "_"),
)  # fmt: skip
def test_forms_of_lycoris_that_do_not_fit_are_refused(
    kohya: Path, tmp_path: Path, layer: Tensors, kind: type[ReportedError], message: str
) -> None:
    """Its OFT, GLoRA and (IA)³, while planning."""
    source = tmp_path / "bad.safetensors"
    save_file({f"{LAYER}.{name}": tensor for name, tensor in layer.items()}, source)
    with pytest.raises(kind, match=message):
        surgery.merge(tmp_path / "base.st", source, tmp_path / "merged.st")
    assert not (tmp_path / "merged.st").exists()


@pytest.mark.parametrize(
    ("name", "tensor", "kind", "message"),
    [
        ("lora_up.weight", torch.ones(8, 3), AdapterFormatError, "ranks contradict"),
        ("lora_down.weight", torch.ones(4, 11), ShapeMismatch, "does not fit"),
        ("lora_down.weight", torch.ones(4), AdapterFormatError, "ranks contradict"),
        ("alpha", torch.ones(2), AdapterFormatError, "not a finite number"),
        ("alpha", torch.tensor(float("nan")), AdapterFormatError, "not a finite number"),
        ("alpha", torch.tensor(0.0), AdapterFormatError, "not a finite number"),
        ("hada_w1_a", torch.ones(8, 2), AdapterFormatError, "several methods"),
        ("oft_blocks", torch.ones(2, 4, 4), AdapterFormatError, "several methods"),
        ("on_input", torch.ones(2), AdapterFormatError, "several methods"),
        ("oft", torch.ones(2), AdapterFormatError, "belongs to no dialect"),
        ("dora_scale", torch.ones(1, 12), AdapterFormatError, "magnitudes are per input"),
        ("lora_up.weight", None, AdapterFormatError, "lacks some of its factors"),
        ("diff_b", torch.ones(9), ShapeMismatch, "do not fit"),
    ],
    ids=lambda value: getattr(value, "__name__", str(getattr(value, "shape", value))),
)
def test_contradictory_factors_are_refused(
    kohya: Path, tmp_path: Path, name: str, tensor: torch.Tensor | None, kind: type[ReportedError], message: str
) -> None:
    """While planning, with the layer and the shapes."""
    tensors = load_file(kohya)
    if tensor is None:
        del tensors[f"{LAYER}.{name}"]
    else:
        tensors[f"{LAYER}.{name}"] = tensor
    source = tmp_path / "bad.safetensors"
    save_file(tensors, source)
    with pytest.raises(kind, match=message):
        surgery.merge(tmp_path / "base.st", source, tmp_path / "merged.st")
    assert not (tmp_path / "merged.st").exists()


def test_a_missing_alpha_is_the_rank(kohya: Path, tmp_path: Path) -> None:
    """As kohya and ComfyUI read it: the product is not scaled."""
    tensors = {name: tensor for name, tensor in load_file(kohya).items() if not name.endswith(".alpha")}
    save_file(tensors, tmp_path / "k.safetensors")
    surgery.merge(tmp_path / "base.st", tmp_path / "k.safetensors", tmp_path / "m.st")
    base, merged = load_file(tmp_path / "base.st"), load_file(tmp_path / "m.st")
    delta = tensors[f"{LAYER}.lora_up.weight"] @ tensors[f"{LAYER}.lora_down.weight"]
    name = "blocks.0.attn.to_q.weight"
    torch.testing.assert_close(merged[name] - base[name], delta, atol=1e-6, rtol=1e-6)


def test_loralib_asks_for_its_alpha(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """And others refuse to be told one."""
    made_by_peft(tmp_path, "linear")
    base, lora = tmp_path / "base.st", tmp_path / "l.safetensors"
    surgery.convert(tmp_path / "peft", lora, "loralib", base=base)
    result = cli("convert", lora, "--to", "kohya", "--base", base, "-o", tmp_path / "k.safetensors")
    assert result.exit_code == 1
    assert "pass it, e.g. --alpha" in result.stderr
    result = cli("convert", tmp_path / "peft", "--to", "kohya", "--alpha", "3", "-o", tmp_path / "k.safetensors")
    assert "omit --alpha" in result.stderr
    result = cli("convert", lora, "--to", "peft", "--alpha", "6", "-o", tmp_path / "p", "--component", "unet")
    assert "has parts" in result.stderr


def test_a_base_is_asked_for_where_the_file_does_not_tell(
    kohya: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    """Underscored names, and methods whose factors do not tell a weight's shape."""
    assert "--base" in cli("convert", kohya, "--to", "peft", "-o", tmp_path / "p").stderr
    (tmp_path / "loha").mkdir()
    made_by_peft(tmp_path / "loha", "LoHa")
    result = cli("convert", tmp_path / "loha" / "peft", "--to", "lycoris", "-o", tmp_path / "l.safetensors")
    assert result.exit_code == 1
    assert "--base" in result.stderr


def test_what_a_dialect_has_no_place_for_can_be_dropped(tmp_path: Path, cli_json: Callable[..., Any]) -> None:
    """Biases go with --drop bias only, are counted as refused, and the weights stay what they were."""
    made_by_peft(tmp_path, "lora_bias")
    base, out = tmp_path / "base.st", tmp_path / "k.safetensors"
    with pytest.raises(AdapterFormatError, match="kohya cannot express") as caught:
        surgery.convert(tmp_path / "peft", out, "kohya", base=base)
    assert "--drop bias" in str(caught.value)
    report = cli_json("convert", tmp_path / "peft", "--to", "kohya", "--base", base, "--drop", "bias", "-o", out)
    assert (report["ledger"]["refused"], report["ledger"]["copied"]) == (1, 2)
    assert any("dropped, as requested" in note for note in report["notes"])
    assert set(load_file(out)) == {f"{LAYER}.{each}" for each in ("alpha", "lora_up.weight", "lora_down.weight")}


def test_layers_that_a_dialect_has_no_place_for_can_be_dropped(tmp_path: Path, cli_json: Callable[..., Any]) -> None:
    """Any dialect's: the other layers stay as they are, and what is left behind is counted."""
    made_by_peft(tmp_path, "mixed")
    base, source, out = tmp_path / "base.st", tmp_path / "peft", tmp_path / "k.safetensors"
    with pytest.raises(AdapterFormatError, match="kohya cannot express") as caught:
        surgery.convert(source, out, "kohya", base=base)
    assert "--drop layer" in str(caught.value)
    report = cli_json("convert", source, "--to", "kohya", "--base", base, "--drop", "layer", "-o", out)
    assert (report["weights"], report["ledger"]["refused"]) == ({"lora": 2}, 2)
    assert any("2 tensors were dropped, as requested" in note for note in report["notes"])
    assert {key.partition(".")[0] for key in load_file(out)} == {LAYER}
    made_by_peft(tmp_path, "embedding")
    with pytest.raises(AdapterFormatError, match="kohya can express none"):
        surgery.convert(source, out, "kohya", base=base, drop=["layer"], force=True)


def test_the_same_dialect_is_a_copy(kohya: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    """It says so; tensors, metadata and config are the source's."""
    result = cli("convert", kohya, "--to", "kohya", "-o", tmp_path / "again.safetensors")
    assert "already in kohya: copied unchanged" in result.stdout
    before, after = load_file(kohya), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    surgery.convert(tmp_path / "peft", tmp_path / "copy", "peft")
    config = "adapter_config.json"
    assert (tmp_path / "copy" / config).exists()
    merged = [tmp_path / "one.st", tmp_path / "two.st"]
    for source, out in zip(("peft", "copy"), merged, strict=True):
        surgery.merge(tmp_path / "base.st", tmp_path / source, out)
    one, two = map(load_file, merged)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_training_metadata_goes_along(kohya: Path, tmp_path: Path) -> None:
    """ss_* and modelspec.* are kept on every way, hashes of the old file are not; a single file holds peft's config."""
    tensors = load_file(kohya)
    told = {"ss_base_model_version": "sd_v1", "modelspec.title": "style", "sshs_model_hash": "0", "ss_network_dim": "9"}
    save_file(tensors, tmp_path / "k.safetensors", metadata=told)
    base = tmp_path / "base.st"
    surgery.convert(tmp_path / "k.safetensors", tmp_path / "p.safetensors", "peft", base=base)
    surgery.convert(tmp_path / "p.safetensors", tmp_path / "l.safetensors", "lycoris")
    with safe_open(tmp_path / "l.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert {key: metadata.get(key) for key in told} == {**told, "sshs_model_hash": None}
    assert metadata["ss_network_module"] == "lycoris.kohya"


def test_inputs_stay_and_outputs_are_not_replaced(kohya: Path, tmp_path: Path) -> None:
    """The source is never the output; what stands there stays without force."""
    before = kohya.read_bytes()
    base = tmp_path / "base.st"
    for out in (kohya, base):
        with pytest.raises(OutputExists):
            surgery.convert(kohya, out, "comfyui", base=base, force=True)
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputExists):
        surgery.convert(kohya, tmp_path / "there.safetensors", "comfyui", base=base)
    assert kohya.read_bytes() == before
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"


def test_a_plan_writes_nothing_and_a_dialect_is_named(kohya: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    """--dry-run shows each tensor; inspect tells the dialect; an unknown dialect is a usage error."""
    out = tmp_path / "c.safetensors"
    result = cli("convert", kohya, "--to", "comfyui", "--base", tmp_path / "base.st", "-o", out, "--dry-run")
    assert result.exit_code == 0
    assert "9 steps, 960 bytes to read" in result.stdout
    assert not out.exists()
    assert "kohya" in cli("inspect", kohya).stdout
    assert "modules_to_save" not in cli("inspect", kohya).stdout
    assert cli("convert", kohya, "--to", "klingon", "-o", out).exit_code == 2
    with pytest.raises(AdapterFormatError, match="no writer for a dialect of that name"):
        surgery.convert(kohya, out, "klingon")


def test_threads_do_not_show(kohya: Path, tmp_path: Path) -> None:
    """The same bytes for any number of them."""
    outputs = set()
    for jobs in (1, 3):
        out = tmp_path / f"{jobs}.safetensors"
        how = surgery.Resources(jobs=jobs)
        surgery.convert(kohya, out, "comfyui", base=tmp_path / "base.st", resources=how)
        outputs.add(out.read_bytes())
    assert len(outputs) == 1
