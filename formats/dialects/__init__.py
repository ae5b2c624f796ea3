"""The dialects adapters are written in, and the one function that opens whichever it is.

A new dialect is a file here and one line in `DIALECTS`; its way back one in `WRITERS`. Other distributions register
theirs by entry points of the group `surgery.dialects` (docs/extending.md): they come after ours, and load only when a
file or a name is none of ours.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from formats.adapter import NOTHING_TOLD, Adapter, Told
from formats.checkpoint import Checkpoint
from formats.containers import Container, container_named
from formats.dialects.adapterhub import AdapterHub
from formats.dialects.adapterhub_writing import AdapterHubWriter
from formats.dialects.dialect import Dialect
from formats.dialects.dotted import ComfyUi, Diffusers
from formats.dialects.gguf import Gguf, GgufAdapterWriter
from formats.dialects.groups import SUFFIXES, suffix_of
from formats.dialects.kohya import Kohya, Lycoris
from formats.dialects.loralib import Loralib
from formats.dialects.loralib_writing import LoralibWriter
from formats.dialects.lycoris_writing import WRITERS as ALPHA_WRITERS
from formats.dialects.ort import Ort, OrtWriter
from formats.dialects.parts import COMFYUI, DOTTED, UNDERSCORED, split_part
from formats.dialects.peft import Peft
from formats.dialects.peft_converting import DiffusersWriter, PeftWriter
from formats.dialects.writing import DialectWriter
from formats.errors import AdapterFormatError, PathNotFound, PluginError
from formats.model_config import parsed_config
from formats.open_files import OpenFiles
from formats.paths import ADAPTER_CONFIG
from formats.plugins import every_plugin, plugin_named
from formats.spec import TensorSpec

DIALECTS: tuple[Dialect, ...] = (
    Ort(),
    Peft(),
    AdapterHub(),
    Kohya(),
    Lycoris(),
    Diffusers(),
    ComfyUi(),
    Loralib(),
    Gguf(),
)
WRITERS: tuple[DialectWriter, ...] = (
    PeftWriter(),
    *ALPHA_WRITERS,
    DiffusersWriter(),
    LoralibWriter(),
    AdapterHubWriter(),
    GgufAdapterWriter(),
    OrtWriter(),
)
_INSIDE_PEFT = re.compile(r"\.lora_[AB]\.(\w+)\.weight$")  # a key of peft's model, before it is saved
GROUP = "surgery.dialects"  # of other distributions' entry points
_OURS = frozenset(dialect.name for dialect in DIALECTS)
_CONFIG = "adapter's config"  # what errors call it
CONFIG_KEY = "adapter_config"  # where a single-file adapter keeps its config, in the header's metadata


def open_adapter(
    path: str | Path,
    base: Mapping[str, TensorSpec],
    names: Mapping[str, str] | None = None,
    told: Told = NOTHING_TOLD,
) -> Adapter:
    """Reads an adapter's headers and config, resolved against its base's tensors.

    Args:
        path: an adapter's folder, or a single file; a safetensors file may have its config in the metadata.
        base: the base's tensors.
        names: what the model calls tensors that the base's file calls otherwise, by their names in the file.
        told: what the caller says of an adapter whose dialect has no config.

    Raises:
        PathNotFound, NotACheckpoint, CorruptFile: the file itself.
        AdapterFormatError: no dialect of ours, or one that contradicts itself.
        UnmatchedKeys: made for another model.
    """
    with OpenFiles() as files:
        return open_adapter_file(path, files).read(base, names, told)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that was opened once.

    Attributes:
        path: as the caller named it: a folder or a file.
        checkpoint: its tensors.
        config: its config; None if it has none.
        files: what it was opened with; other files beside it are opened there too.
    """

    path: Path
    checkpoint: Checkpoint
    config: Mapping[str, Any] | None
    files: OpenFiles

    @cached_property
    def dialect(self) -> Dialect:
        """The dialect of its names. Raises as `dialect_of`."""
        return dialect_of(self.checkpoint, self.config, self.path)

    def read(
        self, base: Mapping[str, TensorSpec], names: Mapping[str, str] | None = None, told: Told = NOTHING_TOLD
    ) -> Adapter:
        """The adapter, resolved against its base's tensors. Arguments and errors are those of `open_adapter`."""
        read = self.dialect.read(self.checkpoint, self.config, base, names or {}, told)
        return replace(read, notes=self.checkpoint.notes)


def open_adapter_file(path: str | Path, files: OpenFiles) -> AdapterFile:
    """Opens an adapter's weights and its config, headers only.

    Raises:
        PathNotFound, NotACheckpoint, CorruptFile: the file itself.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise PathNotFound("no such adapter", where=path, then="check the path")
    weights = [path / name for name in _weights_files(DIALECTS) if (path / name).exists()]
    if path.is_dir() and not weights:
        weights = [path / name for name in _weights_files(_plugins()[0]) if (path / name).exists()]
    if path.is_dir() and not weights and (path / ADAPTER_CONFIG).exists():
        expected = " or ".join(_weights_files(DIALECTS))
        raise PathNotFound(
            "the adapter's folder has a config but no weights",
            where=path,
            expected=expected,
            then="download or copy the file again",
        )
    checkpoint, config = files.checkpoint(weights[0] if weights else path), None
    beside = folder / ADAPTER_CONFIG
    # A lone file takes the config of its folder only under the name that the config belongs to.
    if CONFIG_KEY in checkpoint.metadata:
        config = parsed_config(checkpoint.metadata[CONFIG_KEY], path, _CONFIG)
    elif beside.exists() and (path.is_dir() or _is_weights_file(path.name)):
        config = parsed_config(files.content(beside), beside, _CONFIG)
    return AdapterFile(path, checkpoint, config, files)


def _weights_files(dialects: Iterable[Dialect]) -> list[str]:
    """What weights are called in adapters' folders; containers that hold nothing but adapters come last."""
    names = [name for dialect in dialects for name in dialect.weights_files]
    return sorted(names, key=lambda name: container_named(name) not in (Container.SAFETENSORS, Container.TORCH))


def _is_weights_file(name: str) -> bool:
    return name in _weights_files(DIALECTS) or name in _weights_files(_plugins()[0])


def dialect_of(checkpoint: Checkpoint, config: Mapping[str, Any] | None, where: str | Path) -> Dialect:
    """The dialect of an adapter's names. Raises AdapterFormatError for one we do not know, with the nearest keys."""
    dialect, errors = recognised(checkpoint, config)
    if dialect is not None:
        return dialect
    keys = list(checkpoint.specs)
    # Those that keep the others from being a dialect's come first.
    keys.sort(key=lambda key: suffix_of(key) is not None and _prefixed(key))
    raise AdapterFormatError(
        "not an adapter in a dialect we read",
        where=where,
        expected=_names(DIALECTS),
        found=", ".join(keys[:3]) + (" …" if len(keys) > 3 else ""),
        then="; ".join([_advice(keys), *(f"{error.what}: {error.details.get('found', '')}" for error in errors)]),
    )


def recognised(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None
) -> tuple[Dialect | None, tuple[PluginError, ...]]:
    """The dialect of a file, None where it is in none; then with the errors of plugins that could not be asked."""
    for dialect in DIALECTS:
        if dialect.recognises(checkpoint, config):
            return dialect, ()
    found, errors = _plugins()
    for dialect in found:
        try:
            if dialect.recognises(checkpoint, config):
                return dialect, ()
        except Exception as error:  # a stranger's, of a file that need not be theirs
            what = f"the dialect {dialect.name} of the module {type(dialect).__module__} fails to recognise"
            errors = (*errors, PluginError(what, found=f"{type(error).__name__}: {error}"))
    return None, errors


def dialect_named(name: str) -> Dialect:
    """The dialect of that name. Raises AdapterFormatError for one we do not know, PluginError for a broken one."""
    ours = next((dialect for dialect in DIALECTS if dialect.name == name), None)
    dialect: Dialect | None = ours or plugin_named(GROUP, name, _OURS, (Dialect,))
    if dialect is None:
        raise AdapterFormatError(
            "no dialect of that name", expected=_names(DIALECTS), found=name, then="name one of these"
        )
    return dialect


def writer_named(name: str) -> DialectWriter:
    """The way to write the dialect of that name; a plugin writes if it has `write` and `weights`.

    Raises:
        AdapterFormatError: one that is not written.
        PluginError: a broken one.
    """
    ours = next((writer for writer in WRITERS if writer.name == name), None)
    writer: DialectWriter | None = ours or plugin_named(GROUP, name, _OURS, (Dialect,))
    if writer is None or not hasattr(writer, "write"):
        raise AdapterFormatError(
            "no writer for a dialect of that name", expected=_names(WRITERS), found=name, then="name one of these"
        )
    return writer


def _plugins() -> tuple[tuple[Dialect, ...], tuple[PluginError, ...]]:
    return every_plugin(GROUP, _OURS, (Dialect,))


def _names(dialects: Iterable[Dialect | DialectWriter]) -> str:
    return ", ".join(each.name for each in dialects)


def refuse_unasked(told: Told, source: Collection[Dialect], where: object, target: Collection[Dialect] = ()) -> None:
    """Raises AdapterFormatError for what is told and no dialect asks for.

    Args:
        told: what the caller says.
        source: the dialects that are read.
        where: the files.
        target: those that are written, which may ask for the part of a pipeline too.
    """
    asked = {field for dialect in source for field in dialect.asks}
    if replace(told, component=None) != NOTHING_TOLD and "alpha" not in asked:
        raise AdapterFormatError(
            "the adapter's own config or file already gives its alpha and its layers",
            where=where,
            found=told,
            then=f"omit --alpha, --enable-lora and --fan-in-fan-out: they are for {names_asking('alpha')}'s files",
        )
    if told.component is not None and not any(dialect.in_parts for dialect in (*source, *target)):
        raise AdapterFormatError(
            "neither dialect has parts of a pipeline" if target else "the adapter's dialect has no parts of a pipeline",
            where=where,
            found=", ".join([*sorted({dialect.name for dialect in source}), *(dialect.name for dialect in target)]),
            then=f"omit --component: it is for {names_asking('component')}",
        )


def names_asking(field: str) -> str:
    """The dialects that ask for a field of `Told`, for people."""
    return _names(dialect for dialect in DIALECTS if field in dialect.asks)


def _prefixed(key: str) -> bool:
    return any(split_part(key, prefixes) for prefixes in (UNDERSCORED, DOTTED, COMFYUI))


def _advice(keys: Sequence[str]) -> str:
    """What to look at in keys of no dialect."""
    inside = next((match for key in keys if (match := _INSIDE_PEFT.search(key))), None)
    if inside is not None:
        return (
            f"these are peft's names inside a model, with the adapter's own, {inside[1]}: write it by save_pretrained"
        )
    ends = [key for key in keys if suffix_of(key)]
    if any(map(_prefixed, ends)):
        return "the first of these are of another kind than the rest: take them out, or convert the rest alone"
    if ends:
        heads = ", ".join(prefix for table in (UNDERSCORED, DOTTED, COMFYUI) for prefix in table)
        return f"the keys end as factors do: check what is before the layers, {heads}"
    stems = {suffix.removesuffix(".weight"): suffix for suffix in SUFFIXES}
    near = {stems[stem] for key in keys[:50] for stem in difflib.get_close_matches(_ending(key), stems)}
    if near:
        return f"the keys' ends are near {', '.join(sorted(near)[:4])}: check them"
    return "no tensor here is an adapter's; surgery extract makes an adapter of a tuned model"


def _ending(key: str) -> str:
    return key.removesuffix(".weight").rpartition(".")[2]
