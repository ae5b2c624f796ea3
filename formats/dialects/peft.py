"""Reads adapters in peft's names with peft's config. Tested against peft itself.

Maps keys to base tensors; `peft_writing` does the reverse. This module does no mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from formats.adapter import Adapter, AdapterModule, Replacement, Told
from formats.checkpoint import Checkpoint
from formats.dialects.dialect import Dialect
from formats.dialects.peft_factors import PREFIX, Context, Factors, layer_modules, weight_names
from formats.dialects.peft_full import ROWS, grown, plain_name, replacements, row_replacements, rows_module
from formats.dialects.peft_implied import implied_base
from formats.dialects.peft_methods import Scheme, factor_pattern, no_factors, scheme_modules, scheme_of, shared_tensors
from formats.dialects.peft_parameters import parameter_modules, take_parameters, unwrapped
from formats.dialects.resolve import Rename, resolver, unmatched_keys
from formats.dialects.stored import held, in_the_file, whole_in_the_file
from formats.errors import AdapterFormatError
from formats.layers import LayerKind, owner
from formats.paths import ADAPTER_WEIGHTS, TORCH_ADAPTER_WEIGHTS
from formats.spec import TensorRef, TensorSpec

_FACTOR = re.compile(
    r"^(?P<module>.+)\.(?P<role>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?P<tail>\.weight|\.bias|)$"
)
# Settings that change the mathematics and are not supported, each with the reason that the user is shown.
_REFUSED = {
    "use_qalora": "QALoRA pools its input",
    "alora_invocation_tokens": "aLoRA acts on some positions only, which no weight can express",
    "arrow_config": "Arrow routes between adapters by the input, which no weight can express",
    "use_bdlora": "block-diagonal LoRA has another layout",
    "kasa_config": "KaSA changes the base before adding to it",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA changes the base layer",
}
# Initialisations that subtract the first BA from the base, or quantise the base. All others do not change the base.
_CONVERTED = "save it in converted form, save_pretrained(path_initial_model_for_weight_conversion=…)"
_BASE_CHANGING_INITS = {
    "pissa": _CONVERTED,
    "olora": _CONVERTED,
    "corda": _CONVERTED,
    "lora_ga": _CONVERTED,
    "loftq": "save the base as LoftQ changed it, set init_lora_weights to true in the config, and merge into that base",
}


class Peft(Dialect):
    """The dialect of Hugging Face's peft."""

    name = "peft"
    in_peft_names = True
    weights_files = (ADAPTER_WEIGHTS, TORCH_ADAPTER_WEIGHTS)

    def recognises(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> bool:
        """Whether the config has a `peft_type`, or some keys begin with peft's prefix."""
        return (config is not None and "peft_type" in config) or any(key.startswith(PREFIX) for key in checkpoint.specs)

    def read(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any] | None,
        base: Mapping[str, TensorSpec],
        names: Mapping[str, str],
        told: Told,
    ) -> Adapter:
        """Reads the adapter and resolves it against the base's tensors."""
        where = checkpoint.ref.path
        config = _checked(config, where)
        scheme = scheme_of(config, where)
        modules, full, rows = _split(checkpoint, scheme)
        if scheme and not modules:
            raise no_factors(scheme, where)
        stored = held(base, names)
        base = {**base, **{name: tensor.spec for name, tensor in stored.items()}}
        parameters = [] if scheme else take_parameters(modules, config, base)
        if config.get("ensure_weight_tying"):
            _drop_tied_heads(checkpoint, modules, full, base)
        last = "bias" if scheme and scheme.alone else "weight"
        named = {module: f"{module}.{last}" for module in modules} if scheme else weight_names(modules, base)
        weights = [*named.values(), *(f"{module}.weight" for module in rows)]
        weights += [target for stack in parameters for target in stack.targets]
        context = Context.of(config, _renaming(weights, full, base, where), base, where)
        _drop_tied_copies(checkpoint, full, context)
        replaced = replacements(full, context)
        context = replace(context, base={**base, **grown(replaced, base)})
        adapted = []
        if scheme:
            adapted += scheme_modules(scheme, modules, shared_tensors(scheme, checkpoint), context)
            modules = {}
        for module, factors in sorted(modules.items()):
            adapted += layer_modules(module, factors, context, named)
        for stack in parameters:
            adapted += parameter_modules(stack, context)
        replaced += row_replacements(rows, context)
        _check_rows_alone(adapted, replaced, where)
        modules_in_file, replaced_in_file = in_the_file(adapted, stored), whole_in_the_file(replaced, stored)
        return Adapter(checkpoint.ref, self.name, config, tuple(modules_in_file), tuple(replaced_in_file))

    def implied_base(
        self, checkpoint: Checkpoint, config: Mapping[str, Any] | None, told: Told
    ) -> dict[str, TensorSpec]:
        """The weights that a LoRA adapts, and the tensors that it carries in full."""
        return implied_base(checkpoint, config)

    def described(self, config: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """The config's method, rank, alpha, base and targets."""
        if config is None:
            return {}
        targets = config.get("target_modules")
        return {
            "method": config.get("peft_type"),
            "rank": config.get("r"),
            "alpha": config.get("lora_alpha"),
            "base": config.get("base_model_name_or_path"),
            "target_modules": len(targets) if isinstance(targets, list) else targets,
            "modules_to_save": len(config.get("modules_to_save") or ()),
            "bias": config.get("bias"),
        }


def _checked(config: Mapping[str, Any] | None, where: str) -> Mapping[str, Any]:
    if config is None:
        raise AdapterFormatError(
            "the adapter has no config, so its alpha is unknown",
            where=where,
            expected="adapter_config.json next to the weights, or the config in the file's metadata",
            then="add the adapter_config.json that it was saved with",
        )
    for setting, reason in _REFUSED.items():
        if config.get(setting):
            raise AdapterFormatError(
                f"{setting} is not supported yet: {reason}",
                where=where,
                found=f"{setting} = {config[setting]}",
                then="load base and adapter with peft instead",
            )
    init = str(config.get("init_lora_weights")).lower()
    for changing, remedy in _BASE_CHANGING_INITS.items():
        if init.startswith(changing):
            raise AdapterFormatError(
                "this adapter's initialisation changed its base, so its result on the original base is wrong",
                where=where,
                expected="init_lora_weights = true, as a converted adapter has it",
                found=f"init_lora_weights = {init}",
                then=remedy,
            )
    return config


def _split(
    checkpoint: Checkpoint, scheme: Scheme | None
) -> tuple[dict[str, Factors], dict[str, TensorRef], dict[str, TensorRef]]:
    """Factors by module and role, tensors carried in full by their plain name, and single rows of embeddings by
    module."""
    modules: dict[str, Factors] = {}
    full: dict[str, TensorRef] = {}
    rows: dict[str, TensorRef] = {}
    present = frozenset(unwrapped(key.removeprefix(PREFIX))[0] for key in checkpoint.specs)
    pattern = factor_pattern(scheme) if scheme else _FACTOR
    shared = {f"base_model.{role}" for role in scheme.shared} if scheme else set()
    for key in checkpoint.specs:
        if key in shared:
            continue
        path = key.removeprefix(PREFIX)
        match = pattern.match(path)
        if match is not None and scheme:
            modules.setdefault(unwrapped(match["module"])[0], {})[match["role"]] = checkpoint.tensor(key)
        elif match is not None:
            role = match["role"] + (".bias" if match["tail"] == ".bias" else "")
            modules.setdefault(match["module"], {})[role] = checkpoint.tensor(key)
        elif path.endswith(ROWS):
            rows[unwrapped(rows_module(path))[0]] = checkpoint.tensor(key)
        elif name := plain_name(unwrapped(path)[0], present):
            full[name] = checkpoint.tensor(key)
    return modules, full, rows


def _check_rows_alone(adapted: list[AdapterModule], replaced: list[Replacement], where: str) -> None:
    """Refuses factors on an embedding whose single rows are replaced: nothing says which of the two comes first."""
    for one in replaced:
        if one.rows and any(module.target == one.target for module in adapted):
            raise AdapterFormatError(
                "one embedding has both factors and replaced rows, which peft does not allow either",
                where=f"{where}: {one.target}",
                then="remove either the factors or trainable_token_indices",
            )


def _drop_tied_heads(
    checkpoint: Checkpoint,
    modules: dict[str, Factors],
    full: dict[str, TensorRef],
    base: Mapping[str, TensorSpec],
) -> None:
    """Removes the second copy of a tied embedding's factors: head A = embedding Bᵀ, head B = embedding Aᵀ.

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
                if "lora_magnitude_vector" in factors:
                    raise AdapterFormatError(
                        "DoRA on a tied embedding needs two weights, and the base stores one: the embedding's "
                        "magnitudes are per column, the head's per row",
                        where=f"{checkpoint.ref.path}: {module}",
                        then="train DoRA without the embedding, or load base and adapter with peft instead",
                    )
                del modules[module]
                full.pop(f"{module}.weight", None)


def _drop_tied_copies(checkpoint: Checkpoint, full: dict[str, TensorRef], context: Context) -> None:
    """Removes the second copy of an embedding carried in full: a base with a tied head stores the two once."""
    stored = {name for name in full if {name, context.rename(name)} & context.base.keys()}
    embeddings = [
        full[name] for name in stored if context.kinds.get(owner(context.rename(name))) is LayerKind.EMBEDDING
    ]
    for name in full.keys() - stored:
        alike = [ref for ref in embeddings if replace(full[name].spec, name=ref.name) == ref.spec]
        if any((checkpoint.read_bytes(ref.name) == checkpoint.read_bytes(full[name].name)).all() for ref in alike):
            del full[name]


def _is_transpose(checkpoint: Checkpoint, ours: TensorRef, other: TensorRef) -> bool:
    if ours.spec.dtype is not other.spec.dtype or ours.spec.shape != other.spec.shape[::-1]:
        return False
    mine, theirs = (
        checkpoint.read_bytes(ref.name).reshape(*ref.spec.shape, ref.spec.dtype.itemsize) for ref in (ours, other)
    )
    return bool((mine == theirs.swapaxes(0, 1)).all())


def _renaming(weights: list[str], full: Iterable[str], base: Mapping[str, TensorSpec], where: str) -> Rename:
    """The renaming that fits every adapted weight; without adapted weights, the one that fits most full tensors."""
    if weights:
        return resolver(weights, base, where)
    known = [name for name in full if any(owner(name).endswith(owner(other)) for other in base if owner(other))]
    if not known:
        raise unmatched_keys(list(full), len(list(full)), base, where)
    return resolver(known, base, where)
