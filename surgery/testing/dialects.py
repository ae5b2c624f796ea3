"""check_dialect: the laws of a dialect, on a small random LoRA of a small Llama, or on a file of the caller's."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from formats.adapter import NOTHING_TOLD, Adapter, Told
from formats.checkpoint import Checkpoint
from formats.containers import Container, container_named
from formats.dialects import DIALECTS, GROUP, WRITERS, open_adapter_file
from formats.dialects.dialect import Dialect
from formats.errors import ReportedError
from formats.model_config import model_config
from formats.names import nearest
from formats.open_files import OpenFiles
from formats.paths import open_checkpoint
from formats.spec import TensorRef, TensorSpec
from surgery.operations.convert.convert import convert
from surgery.operations.merge.merge import merge
from surgery.testing.laws import broken, installed, refusal

if TYPE_CHECKING:
    import torch

_WIDTH, _RANK, _ALPHA = 24, 4, 8.0
_ADAPTED = tuple(f"model.layers.{number}.self_attn.{name}_proj" for number in (0, 1) for name in "qv")
_OTHERS = ("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj", "lm_head")
_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": _WIDTH, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 6, "intermediate_size": _WIDTH, "num_hidden_layers": 2, "vocab_size": _WIDTH,
}  # fmt: skip


def check_dialect(
    dialect: Dialect,
    sample: str | Path | None = None,
    base: str | Path | None = None,
    *,
    told: Told = NOTHING_TOLD,
    seed: int = 0,
) -> None:
    """Holds a dialect to the laws that surgery relies on.

    It recognises its own files, which are no other dialect's, and no file of another; every tensor of a file is read,
    and one more is refused; layers that the base does not have are refused with the nearest names. A dialect that
    writes gives the ΔW that it was given, and the same tensors when its file has been read and is written again.

    Args:
        dialect: an object of a class that inherits from Dialect; need not be installed. It writes if it has `write`
            and `weights`, as formats.dialects.writing.DialectWriter.
        sample: a file or folder in this dialect, for one that only reads.
        base: the model that the sample is for.
        told: what its files do not say. The LoRA that a writer gets has alpha 8 and rank 4.
        seed: of the random numbers.

    Raises:
        AssertionError: a broken law, with what, where, expected and found.
    """
    writes = any(writer.name == dialect.name for writer in WRITERS) or hasattr(dialect, "write")
    if not writes and (sample is None or base is None):
        broken("a dialect that only reads is checked on a file", dialect.name, expected="sample and base")
    with (
        installed(GROUP, dialect, {each.name: each for each in DIALECTS}),
        tempfile.TemporaryDirectory() as name,
    ):
        folder = Path(name)
        model, lora = _llama(folder, seed)
        if writes:
            sample, base = _converted(lora, model, dialect.name, folder / "own", told), model
            _check_written(lora, model, sample, dialect, told, folder)
        assert sample is not None
        assert base is not None
        _check_recognised(dialect, sample, model)
        ours = [each.name for each in DIALECTS]
        earlier = ours[: ours.index(dialect.name) + 1] if dialect.name in ours else [dialect.name]  # asked before it
        for other in (writer.name for writer in WRITERS if writer.name not in earlier):
            _check_foreign(dialect, other, lora, model, folder)
        _check_read(dialect, sample, base, told)


def _llama(folder: Path, seed: int) -> tuple[Path, Path]:
    """A model and a LoRA of it in peft's names, everything random."""
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    model, lora = folder / "base", folder / "lora"
    model.mkdir()
    lora.mkdir()
    save_file(
        {f"{layer}.weight": matrix(_WIDTH, _WIDTH) for layer in (*_ADAPTED, *_OTHERS)}, model / "model.safetensors"
    )
    (model / "config.json").write_text(json.dumps(_CONFIG))
    factors = {}
    for layer in _ADAPTED:
        factors[f"base_model.model.{layer}.lora_A.weight"] = matrix(_RANK, _WIDTH)
        factors[f"base_model.model.{layer}.lora_B.weight"] = matrix(_WIDTH, _RANK)
    save_file(factors, lora / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _ALPHA, "target_modules": list(_ADAPTED)}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    return model, lora


def _converted(source: Path, model: Path, to: str, out: Path, told: Told) -> Path:
    """An adapter in another dialect: its file, or a folder where its config lies beside it."""
    writer = next((each for each in WRITERS if each.name == to), None)
    container = container_named(writer.weights) if writer is not None else None
    if container in (Container.GGUF, Container.ORT):
        out = out.with_suffix(container.suffixes[0])
    convert(source, out, to, base=model, told=Told(component=told.component))
    return out


def _check_written(lora: Path, model: Path, own: Path, dialect: Dialect, told: Told, folder: Path) -> None:
    """What is written is read as what it was written of."""
    wanted = _merged(model, lora, folder, NOTHING_TOLD)
    found = _merged(model, own, folder, told)
    before = _tensors(model)
    for name, tensor in wanted.items():
        error = float((found[name] - tensor).abs().max())
        most = 1e-6 * float((tensor - before[name]).abs().max())
        if error > most:
            broken(
                "what is written and read has the same ΔW", f"{dialect.name}: {name}", expected=f"≤ {most}", found=error
            )
    back = folder / "back"
    convert(own, back, "peft", base=model, told=told)
    again = _converted(back, model, dialect.name, folder / "again", told)
    first, second = _tensors(own), _tensors(again)
    if first.keys() != second.keys():
        broken("what is read and written again has the same keys", dialect.name, expected=[*first], found=[*second])
    changed = [key for key, tensor in first.items() if not tensor.equal(second[key])]
    if changed:
        broken("what is read and written again has the same tensors", dialect.name, found=", ".join(changed))


def _check_recognised(dialect: Dialect, sample: str | Path, model: Path) -> None:
    with OpenFiles() as files:
        found = open_adapter_file(sample, files).dialect
    if found.name != dialect.name:
        broken("a dialect's file is recognised as its own", sample, expected=dialect.name, found=found.name)
    with open_checkpoint(model) as plain:
        if dialect.recognises(plain, None):
            broken("a model is no adapter", dialect.name, expected="recognises(model) is False")


def _check_foreign(dialect: Dialect, other: str, lora: Path, model: Path, folder: Path) -> None:
    """Another dialect's file is not this one's."""
    for part in (None, "unet"):  # some write for a part of a pipeline alone
        with contextlib.suppress(ReportedError):  # others need what is not installed
            file = _converted(lora, model, other, folder / f"other-{other}", Told(component=part))
            with OpenFiles() as files:
                opened = open_adapter_file(file, files)
                if dialect.recognises(opened.checkpoint, opened.config):
                    broken("a dialect recognises no other's file", f"{dialect.name}, a file of {other}", expected=other)
            return


def _check_read(dialect: Dialect, sample: str | Path, base: str | Path, told: Told) -> None:
    """Every tensor counts, and layers that the base lacks are refused."""
    with open_checkpoint(base) as model:
        specs = dict(model.specs)
    told = replace(told, model=model_config(base))

    def read(file: Mapping[str, TensorSpec], model: Mapping[str, TensorSpec] = specs) -> Adapter:
        return dialect.read(cast(Checkpoint, _Changed(opened.checkpoint, file)), opened.config, model, {}, told)

    with OpenFiles() as files:
        opened = open_adapter_file(sample, files)
        own = dict(opened.checkpoint.specs)
        adapter = read(own)
        if not adapter.tensors:
            broken("a dialect reads what is in a file", sample, expected="factors", found="none")
        for key in own:
            _check_counts(lambda key=key: read({k: v for k, v in own.items() if k != key}), adapter, key, dialect)  # type: ignore[misc]
        stray = TensorSpec("no.such.layer.tensor", next(iter(own.values())).dtype, (2, 2))
        with contextlib.suppress(ReportedError):
            more = read({**own, stray.name: stray})
            if stray.name not in {*(ref.name for ref in more.tensors), *more.left}:
                where = f"{dialect.name}: {stray.name}"
                broken("nothing in a file is lost", where, expected="an error", found="ignored")
        target = adapter.modules[0].target
        other = f"{target.removesuffix('.weight')}x.weight"
        renamed = {name: spec for name, spec in specs.items() if name != target}
        renamed[other] = replace(specs[target], name=other)
        error = refusal(lambda: read(own, renamed), "a layer that the base does not have", dialect.name)
        if "nearest" not in str(error) and not any(name in str(error) for name in nearest(target, renamed)):
            law = "a layer that the base does not have is refused with the nearest names"
            broken(law, f"{dialect.name}: {target}", expected=other, found=str(error))


def _check_counts(read: Callable[[], Adapter], adapter: Adapter, key: str, dialect: Dialect) -> None:
    """A file without one of its tensors is refused, or another adapter."""
    try:
        without = read()
    except ReportedError:
        return
    if (without.modules, without.replacements, without.left) == (adapter.modules, adapter.replacements, adapter.left):
        broken(
            "every tensor of a file counts", f"{dialect.name}: {key}", expected="an error or another adapter without it"
        )


class _Changed:
    """A checkpoint with other tensors; all else is the source's."""

    def __init__(self, source: Checkpoint, specs: Mapping[str, TensorSpec]) -> None:
        self.source, self.specs = source, specs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def tensor(self, name: str) -> TensorRef:
        """A reference to one of them."""
        return TensorRef(self.source.ref, self.specs[name])


def _merged(model: Path, adapter: Path, folder: Path, told: Told) -> dict[str, torch.Tensor]:
    merge(model, adapter, folder / "merged", told=told, force=True)
    return _tensors(folder / "merged")


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    with OpenFiles() as files:
        checkpoint = open_adapter_file(path, files).checkpoint
        return {name: checkpoint.read(name) for name in checkpoint.specs}
