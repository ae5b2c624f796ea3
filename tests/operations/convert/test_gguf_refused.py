"""Bad input to the dialect of GGUF: one clear error each, and nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import Result
from gguf_models import made
from safetensors.torch import load_file, save_file

import surgery
from formats.errors import (
    AdapterFormatError,
    CorruptFile,
    FormatError,
    NotACheckpoint,
    PathNotFound,
    ReportedError,
    ShapeMismatch,
    UnmatchedKeys,
    UnsupportedDType,
)
from surgery.errors import NotFinite

Q = "blk.0.attn_q.weight"
ROWS = {f"{Q}.lora_a": np.ones((2, 24), np.float32), f"{Q}.lora_b": np.ones((24, 2), np.float32)}
LORA = {"general.type": "adapter", "adapter.type": "lora"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A Llama's folder, an adapter of it beside."""
    made(tmp_path, "linear")
    return tmp_path / "base"


def write(
    path: Path,
    tensors: dict[str, np.ndarray[Any, Any]],
    said: dict[str, str] = LORA,
    architecture: str = "llama",
    alpha: float | None = 2.0,
    kind: gguf.GGMLQuantizationType | None = None,
    tokens: list[int] | None = None,
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """A GGUF file, by the package's own writer."""
    writer = gguf.GGUFWriter(path, architecture, endianess=endian)
    for key, value in said.items():
        writer.add_string(key, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    if tokens:
        writer.add_array("adapter.alora.invocation_tokens", tokens)
    for name, tensor in tensors.items():
        if kind is not None:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(base: Path, adapter: Path, kind: type[ReportedError]) -> str:
    """What merge says of it; convert says the same."""
    folder = adapter.parent
    with pytest.raises(kind) as caught:
        surgery.merge(base, adapter, folder / "merged")
    with pytest.raises(kind):
        surgery.convert(adapter, folder / "out.st", "peft", base=base)
    assert not (folder / "merged").exists()
    assert not (folder / "out.st").exists()
    return str(caught.value)


def test_what_is_no_adapter_is_told(base: Path, tmp_path: Path) -> None:
    """Another file, a model, one for big-endian machines, none at all."""
    path = tmp_path / "a.gguf"
    path.write_bytes(b"PK\x03\x04 nothing of ours")
    assert "not a GGUF file" in refused(base, path, NotACheckpoint)
    write(path, ROWS, {"general.type": "model"})
    assert "holds weights quantised for llama.cpp" in refused(base, path, NotACheckpoint)
    write(path, ROWS, endian=gguf.GGUFEndian.BIG)
    assert "for big-endian machines" in refused(base, path, NotACheckpoint)
    path.unlink()
    refused(base, path, PathNotFound)


@pytest.mark.parametrize(
    ("tensors", "how", "kind", "message"),
    [
        (ROWS, {"said": {"general.type": "adapter", "adapter.type": "control"}}, AdapterFormatError, "not a LoRA"),
        (ROWS, {"tokens": [1, 2]}, AdapterFormatError, "to every token"),
        (ROWS, {"architecture": "qwen2"}, AdapterFormatError, "another architecture"),
        (ROWS, {"alpha": float("nan")}, AdapterFormatError, "not a number to scale by"),
        ({**ROWS, "output_norm.weight": np.ones(24, np.float32)}, {}, AdapterFormatError, "no factor"),
        ({f"{Q}.lora_a": ROWS[f"{Q}.lora_a"]}, {}, AdapterFormatError, "half of a pair"),
        ({**ROWS, f"{Q}.lora_b": np.ones((24, 3), np.float32)}, {}, ShapeMismatch, "does not fit"),
        ({**ROWS, f"{Q}.lora_b": np.ones((12, 2), np.float32)}, {}, ShapeMismatch, "does not fit"),
        ({**ROWS, f"{Q}.lora_a": np.ones(24, np.float32)}, {}, ShapeMismatch, "does not fit"),
        (
            {name.replace("blk.0", "blk.7"): tensor for name, tensor in ROWS.items()},
            {},
            UnmatchedKeys,
            "nearest: blk.1.attn_q.weight",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contradictory_files_are_refused(
    base: Path, tmp_path: Path, tensors: Any, how: dict[str, Any], kind: type[ReportedError], message: str
) -> None:
    """While planning, with the tensor and the shapes."""
    assert message in refused(base, write(tmp_path / "a.gguf", tensors, **how), kind)


def test_quantised_factors_are_named(base: Path, tmp_path: Path) -> None:
    """As llama.cpp's --outtype q8_0 writes them."""
    wide = {name: np.ones((64, 64), np.float32) for name in ROWS}
    path = write(tmp_path / "a.gguf", wide, kind=gguf.GGMLQuantizationType.Q8_0)
    said = refused(base, path, UnsupportedDType)
    assert "GGML's type 8" in said
    assert "--outtype f16" in said


def test_no_alpha_is_no_scaling(base: Path, tmp_path: Path) -> None:
    """As llama.cpp reads it, and an alpha of 0."""
    weights = load_file(base / "model.safetensors")
    for alpha in (None, 0.0):
        path = write(tmp_path / "a.gguf", ROWS, alpha=alpha)
        surgery.merge(base, path, tmp_path / "merged", force=True)
        merged = load_file(tmp_path / "merged" / "model.safetensors")
        name = "model.layers.0.self_attn.q_proj.weight"
        assert abs((merged[name] - weights[name]).mean() - 2) < 1e-6


def test_the_base_must_say_its_class(base: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Without a base, without config.json, with one of a class whose order of rows is not known here."""
    out = tmp_path / "a.gguf"
    adapter = tmp_path / "peft"
    result = cli("convert", adapter, "--to", "gguf", "-o", out)
    assert result.exit_code == 1
    assert "--base" in result.stderr
    alone = tmp_path / "alone" / "model.safetensors"
    alone.parent.mkdir()
    shutil.copy(base / "model.safetensors", alone)
    with pytest.raises(AdapterFormatError, match=r"follow from the base's class"):
        surgery.convert(adapter, out, "gguf", base=alone)
    surgery.convert(adapter, out, "gguf", base=base)
    with pytest.raises(AdapterFormatError, match=r"follow from the base's class"):
        surgery.merge(alone, out, tmp_path / "m.st")
    result = cli("convert", out, "--to", "peft", "-o", tmp_path / "p")
    assert "name the base: --base" in result.stderr
    config = json.loads((base / "config.json").read_text())
    for name, model_type, reason in (
        ("FalconForCausalLM", "falcon", "llama.cpp knows such models, but may store"),
        ("KlingonForCausalLM", "klingon", "llama.cpp may store"),
    ):
        (alone.parent / "config.json").write_text(
            json.dumps({**config, "architectures": [name], "model_type": model_type})
        )
        for to, source in (("gguf", adapter), ("peft", out)):
            with pytest.raises(AdapterFormatError, match=reason) as caught:
                surgery.convert(source, tmp_path / f"new.{to}", to, base=alone.parent)
            assert name in str(caught.value)
    (alone.parent / "config.json").write_text(json.dumps({**config, "num_attention_heads": 5}))
    with pytest.raises(AdapterFormatError, match="does not divide"):
        surgery.convert(adapter, tmp_path / "new.gguf", "gguf", base=alone.parent)
    assert not list(tmp_path.glob("new.*"))


def test_a_weight_that_llama_cpp_adapts_nowhere(tmp_path: Path) -> None:
    """GPT-2's positions are looked up without any adapter."""
    made(tmp_path, "Conv1D", target_modules=["wpe", "c_attn"])
    with pytest.raises(AdapterFormatError, match="applies no adapter") as caught:
        surgery.convert(tmp_path / "peft", tmp_path / "a.gguf", "gguf", base=tmp_path / "base")
    assert "wpe" in str(caught.value)


def test_the_container_belongs_to_the_dialect(base: Path, tmp_path: Path) -> None:
    """A .gguf file for --to gguf and for nothing else."""
    adapter, out = tmp_path / "peft", tmp_path / "a.gguf"
    for path in (tmp_path / "a.st", tmp_path / "folder"):
        with pytest.raises(FormatError, match="one GGUF file"):
            surgery.convert(adapter, path, "gguf", base=base)
    refusals: list[Callable[[], Any]] = [
        lambda: surgery.convert(adapter, out, "kohya", base=base),
        lambda: surgery.merge(base, adapter, out),
        lambda: surgery.extract(base, base, out, rank=1),
    ]
    for refusal in refusals:
        with pytest.raises(FormatError, match="only convert --to gguf"):
            refusal()
    assert not out.exists()


def test_a_failure_on_the_way_leaves_nothing(base: Path, tmp_path: Path) -> None:
    """A factor that is not finite shows while it is computed; the output never appears, and no scratch file stays."""
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][3, 1] = float("inf")
    save_file(tensors, path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(NotFinite):
        surgery.convert(tmp_path / "peft", tmp_path / "a.gguf", "gguf", base=base)
    assert sorted(tmp_path.iterdir()) == before


def test_the_extra_is_named(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the gguf package is not installed."""
    path = write(tmp_path / "a.gguf", ROWS)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "model-surgery[gguf]" in refused(base, path, FormatError)
    assert surgery.inspect(path).adapter["dialect"] == "gguf"


def test_broken_files_are_errors_of_ours(base: Path, tmp_path: Path) -> None:
    """Cut anywhere, or with any byte of the header changed: read as something, or one of our errors."""
    whole = write(tmp_path / "whole.gguf", ROWS).read_bytes()
    header = len(whole) - sum(tensor.nbytes for tensor in ROWS.values())
    path = tmp_path / "a.gguf"
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises((NotACheckpoint, CorruptFile)):
            surgery.open_checkpoint(path)
    for place in range(4, header):
        for value in (0, 0x7F, 0xFF):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                with surgery.open_checkpoint(path) as opened:
                    for name in opened.specs:
                        opened.read_bytes(name)
            except ReportedError:
                pass


def test_a_full_copy_of_the_factors_stays_readable(base: Path, tmp_path: Path) -> None:
    """Its tensors and key-values in safetensors: the same adapter, since the key-values say what it is."""
    surgery.convert(tmp_path / "peft", tmp_path / "a.gguf", "gguf", base=base)
    surgery.convert_container(tmp_path / "a.gguf", tmp_path / "a.st")
    for name in ("gguf", "st"):
        surgery.merge(base, tmp_path / f"a.{name}", tmp_path / name)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("gguf", "st"))
    assert all((one[name] == two[name]).all() for name in one)
