"""From a Hugging Face folder to a torch module without weights, and to the checkpoint's name of each of its tensors.

The class is the one that config.json names, looked up in transformers: there is no list of architectures here. Knows
nothing of ONNX, and reads no payload: config.json and tensor specs are enough.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.spec import DType, TensorSpec
from surgery.errors import MissingTensors, UnknownArchitecture, Unsupported

OPTIONAL_INPUTS = ("attention_mask", "token_type_ids")  # after input_ids, where the model listens to them
_LEGACY = ((".weight", ".gamma"), (".bias", ".beta"))  # LayerNorm's names in checkpoints of 2018-2019
_NOISY_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir", "transformers")


@dataclass(frozen=True)
class Architecture:
    """What config.json says: the folder, the transformers class, its configuration, and the graph's inputs."""

    folder: Path
    model_class: Any  # a transformers.PreTrainedModel subclass
    config: Any  # its transformers.PretrainedConfig
    inputs: tuple[str, ...]

    @property
    def longest(self) -> int:
        """The longest sequence the model can take, in tokens; 512 where the config sets no limit."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else 512


def read_architecture(folder: Path) -> Architecture:
    """Reads config.json and finds the class.

    Raises:
        UnknownArchitecture: no config.json, no `architectures` in it, or a class that transformers does not have.
        Unsupported: encoder-decoders, models fed with anything but tokens, and quantised checkpoints.
    """
    path = folder / "config.json"
    name = _class_name(path)
    model_class = _find_class(name, path)
    with quiet():
        config = model_class.config_class.from_pretrained(folder, local_files_only=True)
    config.use_cache = False
    config.return_dict = True
    config.output_hidden_states = config.output_attentions = False
    return Architecture(folder, model_class, config, _inputs(model_class, config, path))


def _find_class(name: str, path: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise Unsupported(
            "exporting needs transformers, which knows the model's class",
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
        found=f"{name}; nearest: {', '.join(near)}" if near else name,
        then=f"correct `architectures`, or install a transformers that has it (here {transformers.__version__})",
    )


def _class_name(path: Path) -> str:
    if not path.is_file():
        raise UnknownArchitecture(
            "the folder has no config.json, so nothing says which graph to build",
            where=path.parent,
            then="give a Hugging Face model folder: config.json and its weights",
        )
    try:
        said = json.loads(path.read_bytes())
    except ValueError as error:
        raise UnknownArchitecture("config.json is not JSON", where=path, found=error) from error
    names = said.get("architectures") if isinstance(said, dict) else None
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise UnknownArchitecture(
            "config.json does not name the model's class",
            where=path,
            expected='"architectures": ["BertModel"], say',
            found=f'"architectures": {json.dumps(names)}',
            then="add the class that the checkpoint was saved from",
        )
    return names[0]


def _inputs(model_class: Any, config: Any, path: Path) -> tuple[str, ...]:
    """The graph's inputs, in order: input_ids, then those of OPTIONAL_INPUTS that change what the model computes."""
    takes = inspect.signature(model_class.forward).parameters
    reason = None
    if getattr(config, "quantization_config", None):
        reason = "the checkpoint is quantised"
    elif getattr(config, "is_encoder_decoder", False):
        reason = "the model is an encoder-decoder, which is two graphs"
    elif "input_ids" not in takes or model_class.main_input_name != "input_ids":
        reason = f"the model is fed with {model_class.main_input_name}, not with input_ids"
    if reason:
        raise Unsupported(
            f"cannot export {model_class.__name__}: {reason}",
            where=path,
            expected="an encoder or decoder over tokens, in floating point",
        )
    listens = {"attention_mask": True, "token_type_ids": getattr(config, "type_vocab_size", 0) > 1}
    return ("input_ids", *(name for name in OPTIONAL_INPUTS if name in takes and listens[name]))


def build_module(architecture: Architecture, dtype: DType) -> Any:
    """The torch module, its parameters allocated but never written: untouched pages cost no memory.

    Attention is the eager one: the fused one's decomposition has twelve more nodes a layer.
    """
    import copy

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

    A checkpoint may carry the base model's prefix where the module does not (`bert.encoder…`), or the other way
    round, and stores tied weights once, under either name.

    Raises:
        MissingTensors: with the names, and the nearest ones that are there.
        Unsupported: a tensor's shape is not the one that the config leads to.
    """
    groups: dict[int, list[str]] = {}  # id of the tensor → its names in the module, more than one where tied
    state = module.state_dict(keep_vars=True)
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    found: dict[str, TensorSpec] = {}
    missing: list[str] = []
    for names in groups.values():
        spec = _stored(names, module.base_model_prefix, specs)
        if spec is None:
            missing.append(names[0])
            continue
        shape = tuple(state[names[0]].shape)
        if spec.shape != shape:
            raise Unsupported(
                f"config.json and the weights disagree about {spec.name}", where=where, expected=shape, found=spec.shape
            )
        found.update(dict.fromkeys(names, spec))
    if missing:
        nearest = [near for name in missing[:5] for near in difflib.get_close_matches(name, specs, 1)]
        raise MissingTensors(
            f"{type(module).__name__} needs tensors that the checkpoint does not have",
            where=where,
            expected=", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else ""),
            found="nearest: " + ", ".join(dict.fromkeys(nearest)) if nearest else None,
            then="check `architectures` in config.json against what the file holds",
        )
    return found


def _stored(names: list[str], prefix: str, specs: Mapping[str, TensorSpec]) -> TensorSpec | None:
    for name in names:
        bare = name.removeprefix(f"{prefix}.")
        for candidate in (name, f"{prefix}.{name}", bare):
            if candidate in specs:
                return specs[candidate]
            for modern, legacy in _LEGACY:
                if candidate.endswith(modern) and candidate.removesuffix(modern) + legacy in specs:
                    return specs[candidate.removesuffix(modern) + legacy]
    return None


def stored_ties(module: Any, specs: Mapping[str, TensorSpec]) -> tuple[tuple[str, ...], ...]:
    """Groups of names that the module ties and the checkpoint nevertheless stores one by one."""
    groups: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        spec = _stored([name], module.base_model_prefix, specs)
        if spec is not None and spec.name not in groups.setdefault(id(tensor), []):
            groups[id(tensor)].append(spec.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps exporters and loaders from chatting on stderr; what matters they raise."""
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
