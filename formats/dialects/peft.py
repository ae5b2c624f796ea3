"""Reading peft's names and config. Tested against peft itself.

Maps keys to base tensors; `peft_writing` is the way back. Knows no mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from formats.adapter import Adapter, AdapterModule, Replacement
from formats.checkpoint import Checkpoint
from formats.dialects.resolve import Rename, resolver, unmatched_keys
from formats.errors import AdapterFormatError, ShapeMismatch
from formats.layers import LayerKind, layer_kinds, owner
from formats.spec import TensorRef, TensorSpec, shape_text

PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"^(?P<module>.+)\.(?P<role>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?P<tail>\.weight|\.bias|)$"
)
# Settings that change the mathematics and that we do not carry out, each with the reason a user needs.
_REFUSED = {
    "use_dora": "DoRA rescales W0 + ΔW by its norm",
    "use_qalora": "QALoRA pools its input",
    "alora_invocation_tokens": "aLoRA acts on some positions only, which no weight can express",
    "arrow_config": "Arrow routes between adapters by the input, which no weight can express",
    "use_bdlora": "block-diagonal LoRA has another layout",
    "kasa_config": "KaSA changes the base before adding to it",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA changes the base layer",
    "layer_replication": "layer replication changes the base's depth",
    "target_parameters": "LoRA on expert parameters has another layout",
    "trainable_token_indices": "trainable tokens replace single rows",
}
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Peft:
    """The dialect of Hugging Face's peft (LoRA)."""

    name = "peft"

    def recognises(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> bool:
        """A config with a `peft_type`, or keys that start as peft's do."""
        return (config is not None and "peft_type" in config) or any(key.startswith(PREFIX) for key in checkpoint.specs)

    def read(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None, base: Mapping[str, TensorSpec]) -> Adapter:
        """The adapter, resolved against the base's tensors."""
        where = checkpoint.ref.path
        config = _checked(config, where)
        modules, full = _split(checkpoint)
        if config.get("ensure_weight_tying"):
            _drop_tied_heads(checkpoint, modules, full, base)
        rename = _renaming(modules, full, base, where)
        kinds = layer_kinds(base)
        adapted = []
        for module, factors in sorted(modules.items()):
            adapted += _lora(module, factors, config, rename, base, kinds, where)
        replaced = [_replacement(key, ref, config, rename, base, where) for key, ref in sorted(full.items())]
        return Adapter(checkpoint.ref, self.name, config, tuple(adapted), tuple(replaced))


def _checked(config: Mapping[str, Any] | None, where: str) -> Mapping[str, Any]:
    if config is None:
        raise AdapterFormatError(
            "the adapter has no config, so its alpha is unknown",
            where=where,
            expected="adapter_config.json beside the weights, or the config in the file's metadata",
        )
    if config.get("peft_type") != "LORA":
        raise AdapterFormatError(
            "this PEFT method is not supported yet", where=where, expected="LORA", found=config.get("peft_type")
        )
    for setting, reason in _REFUSED.items():
        if config.get(setting):
            raise AdapterFormatError(
                f"{setting} is not supported yet: {reason}", where=where, found=f"{setting} = {config[setting]}"
            )
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise AdapterFormatError(
            "this adapter's initialisation changed its base, so it is wrong on the original",
            where=where,
            found=f"init_lora_weights = {init}",
            then="save it in converted form: save_pretrained(path_initial_model_for_weight_conversion=…)",
        )
    return config


def _split(checkpoint: Checkpoint) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef]]:
    """LoRA factors by module and role, and the tensors carried in full by their plain name."""
    modules: dict[str, dict[str, TensorRef]] = {}
    full: dict[str, TensorRef] = {}
    for key in checkpoint.specs:
        plain = key.removeprefix(PREFIX)
        match = _FACTOR.match(plain)
        if match is None:
            full[plain.replace(".base_layer.", ".")] = checkpoint.tensor(key)
        elif match["role"] == "lora_magnitude_vector":
            raise AdapterFormatError(
                _REFUSED["use_dora"] + ": not supported yet", where=f"{checkpoint.ref.path}: {key}"
            )
        else:
            role = match["role"] + (".bias" if match["tail"] == ".bias" else "")
            modules.setdefault(match["module"], {})[role] = checkpoint.tensor(key)
    return modules, full


def _drop_tied_heads(
    checkpoint: Checkpoint,
    modules: dict[str, dict[str, TensorRef]],
    full: dict[str, TensorRef],
    base: Mapping[str, TensorSpec],
) -> None:
    """Takes out the second copy of a tied embedding's factors: head A = embedding Bᵀ, head B = embedding Aᵀ.

    peft writes both. A base that stores the tied weight once must get the delta once.
    """
    embeddings = [factors for factors in modules.values() if {"lora_embedding_A", "lora_embedding_B"} <= set(factors)]
    for module, factors in list(modules.items()):
        stored = any(name == f"{module}.weight" or name.endswith(f".{module}.weight") for name in base)
        if not stored and {"lora_A", "lora_B"} <= set(factors):
            pairs = [
                ((factors["lora_A"], embedding["lora_embedding_B"]), (factors["lora_B"], embedding["lora_embedding_A"]))
                for embedding in embeddings
            ]
            if any(all(_is_transpose(checkpoint, *pair) for pair in both) for both in pairs):
                del modules[module]
                full.pop(f"{module}.weight", None)


def _is_transpose(checkpoint: Checkpoint, ours: TensorRef, other: TensorRef) -> bool:
    if ours.spec.dtype is not other.spec.dtype or ours.spec.shape != other.spec.shape[::-1]:
        return False
    mine, theirs = (
        checkpoint.read_bytes(ref.name).reshape(*ref.spec.shape, ref.spec.dtype.itemsize) for ref in (ours, other)
    )
    return bool((mine == theirs.swapaxes(0, 1)).all())


def _renaming(modules: Iterable[str], full: Iterable[str], base: Mapping[str, TensorSpec], where: str) -> Rename:
    """The renaming that explains every adapted weight; with none, the one that explains most full tensors."""
    weights = [f"{module}.weight" for module in modules]
    if weights:
        return resolver(weights, base, where)
    known = [name for name in full if any(owner(name).endswith(owner(other)) for other in base if owner(other))]
    if not known:
        raise unmatched_keys(list(full), len(list(full)), base, where)
    return resolver(known, base, where)


def _lora(
    module: str,
    factors: dict[str, TensorRef],
    config: Mapping[str, Any],
    rename: Rename,
    base: Mapping[str, TensorSpec],
    kinds: Mapping[str, LayerKind],
    where: str,
) -> list[AdapterModule]:
    """The module's weight and, with `lora_bias`, its bias."""
    embedding = "lora_embedding_A" in factors or "lora_embedding_B" in factors
    roles = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for role in roles:
        if role not in factors:
            raise AdapterFormatError(
                "half of a pair is missing",
                where=f"{where}: {module}",
                expected=" and ".join(roles),
                found=list(factors),
            )
    a, b = (factors[role] for role in roles)
    rank = int(first_match(config.get("rank_pattern"), module, config.get("r", 8)))
    alpha = float(first_match(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    target = rename(f"{module}.weight")
    shapes = f"lora_A {shape_text(a.spec.shape)}, lora_B {shape_text(b.spec.shape)}"
    if len(a.spec.shape) != 2 or len(b.spec.shape) != 2:
        raise AdapterFormatError("LoRA on convolutions is not supported yet", where=f"{where}: {module}", found=shapes)
    if not a.spec.shape[0] == b.spec.shape[1] == rank:
        raise AdapterFormatError(
            "the factors' rank contradicts the config", where=f"{where}: {module}", expected=f"r = {rank}", found=shapes
        )
    kind = _kind(embedding, (b.spec.shape[0], a.spec.shape[1]), base[target], config, kinds)
    if kind is None:
        raise ShapeMismatch(
            "the adapter does not fit the base's weight",
            where=f"{where}: {target}",
            expected=f"the base's {shape_text(base[target].shape)}",
            found=shapes,
            then="check that the adapter was made for this base",
        )
    rslora = bool(config.get("use_rslora"))
    found = [AdapterModule(target, "lora", kind, {"lora_A": a, "lora_B": b}, rank, alpha, rslora)]
    if "lora_B.bias" in factors:
        target = rename(f"{module}.bias")
        if target not in base:
            raise unmatched_keys([target], 1, base, where)
        found.append(
            AdapterModule(target, "lora_bias", kind, {"lora_B.bias": factors["lora_B.bias"]}, rank, alpha, rslora)
        )
    return found


def _kind(
    embedding: bool,
    shape: tuple[int, int],
    weight: TensorSpec,
    config: Mapping[str, Any],
    kinds: Mapping[str, LayerKind],
) -> LayerKind | None:
    """How the base stores the weight that a BA of `shape` (out, in) belongs to; None if neither way fits."""
    if embedding:
        return LayerKind.EMBEDDING if weight.shape == shape[::-1] else None
    fits, fits_transposed = weight.shape == shape, weight.shape == shape[::-1]
    if fits and fits_transposed:  # square: the config speaks for all layers at once, the neighbours for this one
        neighbours = kinds.get(owner(weight.name), LayerKind.LINEAR)
        told = any(kind is LayerKind.TRANSPOSED for kind in kinds.values())
        fits_transposed = neighbours is LayerKind.TRANSPOSED if told else bool(config.get("fan_in_fan_out"))
        return LayerKind.TRANSPOSED if fits_transposed else LayerKind.LINEAR
    return LayerKind.LINEAR if fits else LayerKind.TRANSPOSED if fits_transposed else None


def first_match(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The first pattern that matches the module's name or a tail of it, as peft resolves them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _replacement(
    name: str, ref: TensorRef, config: Mapping[str, Any], rename: Rename, base: Mapping[str, TensorSpec], where: str
) -> Replacement:
    target = rename(name) if rename(name) in base else name
    if target in base:
        if base[target].shape != ref.spec.shape:
            raise ShapeMismatch(
                "a tensor that the adapter carries in full has another shape than the base's",
                where=f"{where}: {target}",
                expected=f"the base's {shape_text(base[target].shape)}",
                found=f"the adapter's {shape_text(ref.spec.shape)}",
            )
        return Replacement(target, ref, added=False)
    module = owner(name)
    listed = any(module == entry or module.endswith(f".{entry}") for entry in config.get("modules_to_save") or ())
    beside = any(owner(other) in (module, owner(rename(name))) for other in base)
    if not listed or beside:
        raise unmatched_keys([name], 1, base, where)
    return Replacement(name, ref, added=True)
