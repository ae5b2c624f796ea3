"""From a Hugging Face folder to a torch module without weights, and to the checkpoint's name of each of its tensors.

config.json names the class, and it is looked up in transformers; there is no list of architectures here. This module
does not know ONNX, and reads no payload: config.json and tensor specs are enough.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.spec import DType, TensorSpec
from surgery.errors import MissingTensors, UnknownArchitecture, Unsupported
from surgery.model.base_model import BaseModel
from surgery.model.meta_model import config_of, known_names
from surgery.onnx.files.settings import settings_of
from surgery.onnx.trace.kinds import EXPORTED, kind_of
from surgery.onnx.trace.program import ModelKind

_LEGACY = ((".weight", ".gamma"), (".bias", ".beta"))  # LayerNorm's names in checkpoints of 2018-2019
_COUNTERS = ".num_batches_tracked"  # BatchNorm's training counter, which older checkpoints do not have
_NOISY_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir", "transformers")


@dataclass(frozen=True)
class TransformersModel:
    """A transformers model as config.json describes it: its class, its configuration, and how it is used.

    Attributes:
        folder: the folder of config.json and the weights.
        model_class: a transformers.PreTrainedModel subclass.
        config: its transformers.PretrainedConfig.
        kind: how the model is used, and its graphs.
        settings: the part of config.json that the graph depends on.
    """

    folder: Path
    model_class: Any
    config: Any
    kind: ModelKind
    settings: Mapping[str, Any]

    @property
    def where(self) -> Path:
        """The folder."""
        return self.folder

    @property
    def name(self) -> str:
        """The name of the class."""
        return str(self.model_class.__name__)

    def build(self, dtype: DType) -> Any:
        """As `build_module`."""
        return build_module(self, dtype)

    def load(self, dtype: DType) -> Any:
        """Loads with transformers itself, on purpose: the comparison then also checks our reading of names, prefixes
        and ties."""
        from formats.tensors import torch_dtype

        with quiet():
            module = self.model_class.from_pretrained(
                self.folder, config=copy.deepcopy(self.config), dtype=torch_dtype(dtype), local_files_only=True
            )
        return module.eval()


def read_architecture(model: BaseModel, *, cached: bool = False) -> TransformersModel:
    """Reads config.json and finds the class.

    Args:
        model: a folder with config.json in it.
        cached: whether keys and values of past tokens are inputs and outputs.

    Raises:
        UnknownArchitecture: no config.json, no `architectures` in it, or a class that transformers does not have.
        CorruptFile: config.json is not a JSON object.
        Unsupported: `kind_of` refuses the model.
    """
    path, folder = model.config_file, model.path
    if path is None or not folder.is_dir():
        raise UnknownArchitecture(
            "the folder has no config.json, so nothing says which graph to build",
            where=folder,
            then="pass a Hugging Face folder with config.json and weights; or a weight file with --factory",
        )
    name = _class_name(path, model.config)
    model_class = _find_class(name, path)
    with quiet():
        config = config_of(model_class.config_class, model.config)
    config.use_cache = False
    config.return_dict = True
    config.output_hidden_states = config.output_attentions = False
    kind = kind_of(model_class, config, model, cached)
    return TransformersModel(folder, model_class, config, kind, settings_of(model.config))


def _find_class(name: str, path: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise Unsupported(
            "exporting needs transformers, which defines the model's class",
            where=path,
            found=error,
            then="pip install 'model-surgery[hf]'",
        ) from error
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    known = [known for known in dir(transformers) if known.startswith(name[:3])]
    near = difflib.get_close_matches(name, known)
    raise UnknownArchitecture(
        "transformers has no model class of this name",
        where=path,
        expected=EXPORTED,
        found=f"{name}; nearest: {', '.join(near)}" if near else name,
        then=f"correct `architectures`, install a transformers that has it (here {transformers.__version__}), or build "
        "it yourself: --factory package.module:function with its weight file",
    )


def _class_name(path: Path, said: Mapping[str, Any]) -> str:
    names = said.get("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise UnknownArchitecture(
            "config.json does not name the model's class",
            where=path,
            expected=f'"architectures": ["BertModel"], say: {EXPORTED}',
            found=f'"architectures": {json.dumps(names)}',
            then="add the class that the checkpoint was saved from, or build the module yourself: --factory "
            "package.module:function with its weight file",
        )
    return names[0]


def build_module(architecture: TransformersModel, dtype: DType) -> Any:
    """The torch module, with parameters allocated but never written: untouched pages cost no memory.

    It uses eager attention, because fused attention decomposes into twelve more nodes per layer.
    """
    from transformers.initialization import no_init_weights

    from formats.tensors import torch_dtype

    with quiet(), no_init_weights():
        module = architecture.model_class._from_config(
            copy.deepcopy(architecture.config), dtype=torch_dtype(dtype), attn_implementation="eager"
        )
    module.tie_weights()
    return module.eval()


def checkpoint_specs(module: Any, specs: Mapping[str, TensorSpec], where: Path) -> dict[str, TensorSpec]:
    """For each name in the module's state_dict, the checkpoint's tensor.

    A checkpoint may have the base model's prefix while the module does not (`bert.encoder…`), or vice versa, and it
    stores tied weights once, under either name.

    Raises:
        MissingTensors: tensors are missing; lists their names and the most similar names in the checkpoint.
        Unsupported: a tensor's shape differs from the shape that the config implies.
    """
    groups: dict[int, list[str]] = {}  # id of the tensor → its names in the module, more than one where tied
    state = module.state_dict(keep_vars=True)
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    found: dict[str, TensorSpec] = {}
    missing: list[str] = []
    find = _finder(module, specs)
    for names in groups.values():
        spec = find(names)
        if spec is None:
            if all(name.endswith(_COUNTERS) for name in names):
                continue
            missing.append(names[0])
            continue
        shape = tuple(state[names[0]].shape)
        if spec.shape != shape:
            raise Unsupported(
                f"config.json and the weights disagree about the shape of {spec.name}",
                where=where,
                expected=shape,
                found=spec.shape,
                then="use the config.json that the weights were saved with",
            )
        found.update(dict.fromkeys(names, spec))
    if missing:
        nearest = [near for name in missing[:5] for near in difflib.get_close_matches(name, specs, 1)]
        raise MissingTensors(
            f"{type(module).__name__} needs tensors that the checkpoint does not have",
            where=where,
            expected=", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else ""),
            found="nearest: " + ", ".join(dict.fromkeys(nearest)) if nearest else None,
            then="check that `architectures` in config.json matches the checkpoint",
        )
    return found


def _finder(module: Any, specs: Mapping[str, TensorSpec]) -> Callable[[list[str]], TensorSpec | None]:
    """A function from a tensor's names in the module to the checkpoint's tensor. It consults transformers' table of
    renamed layers only for tensors that have none of the usual names."""
    prefix = getattr(module, "base_model_prefix", "")
    renamed: dict[str, str] | None = None

    def find(names: list[str]) -> TensorSpec | None:
        nonlocal renamed
        spec = _stored(names, prefix, specs)
        if spec is None and prefix:
            if renamed is None:
                renamed = {new: old for old, new in known_names(module, specs)[0].items()}
            spec = next((specs[renamed[name]] for name in names if name in renamed), None)
        return spec

    return find


def _stored(names: list[str], prefix: str, specs: Mapping[str, TensorSpec]) -> TensorSpec | None:
    for name in names:
        bare = name.removeprefix(f"{prefix}.") if prefix else name
        for candidate in dict.fromkeys((name, f"{prefix}.{name}" if prefix else name, bare)):
            if candidate in specs:
                return specs[candidate]
            for modern, legacy in _LEGACY:
                if candidate.endswith(modern) and candidate.removesuffix(modern) + legacy in specs:
                    return specs[candidate.removesuffix(modern) + legacy]
    return None


def stored_ties(module: Any, specs: Mapping[str, TensorSpec]) -> tuple[tuple[str, ...], ...]:
    """Groups of names that the module ties, but that the checkpoint stores separately."""
    groups: dict[int, list[str]] = {}
    prefix = getattr(module, "base_model_prefix", "")
    for name, tensor in module.state_dict(keep_vars=True).items():
        spec = _stored([name], prefix, specs)
        if spec is not None and spec.name not in groups.setdefault(id(tensor), []):
            groups[id(tensor)].append(spec.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences exporters and loaders on stderr; they raise exceptions for everything that matters."""
    from transformers.utils import logging as chat

    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    bars = chat.is_progress_bar_enabled()
    chat.disable_progress_bar()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            chat.enable_progress_bar()
