"""Reads the tensors that a peft file carries in full: which tensors they replace in the base, or add to it.

These are saved modules and biases, embeddings, single rows of an embedding (`trainable_token_indices`), and embeddings
of a vocabulary that has grown. This module does no mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from formats.adapter import Replacement
from formats.dialects.peft_factors import Context
from formats.dialects.resolve import unmatched_keys
from formats.errors import AdapterFormatError, ShapeMismatch
from formats.layers import LayerKind, owner
from formats.spec import TensorRef, TensorSpec, shape_text

TOKENS = "token_adapter"  # peft's wrapper of an embedding with trainable rows
ROWS = ".trainable_tokens_delta"  # the rows themselves, not differences, despite the name
_WRAPPERS = (TOKENS, "ln_tuning_layers")  # peft's wrappers of a module that it trains whole
_COPIES = ("original_module", "modules_to_save")  # copies of a saved module that peft writes in addition


def plain_name(path: str, present: frozenset[str]) -> str | None:
    """The model's name of a tensor carried in full; None for peft's second copy of one.

    Args:
        path: the tensor's name in the file, without `base_layer`.
        present: all such names in the file.
    """
    parts = path.split(".")
    if len(parts) > 2 and parts[-2] in _COPIES and ".".join([*parts[:-2], parts[-1]]) in present:
        return None
    return ".".join(part for part in parts if part not in _WRAPPERS)


def grown(replacements: list[Replacement], base: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The base's tensors that change shape when they are replaced: a grown vocabulary has more rows."""
    return {
        full.target: replace(base[full.target], shape=full.source.spec.shape)
        for full in replacements
        if not full.added and full.source.spec.shape != base[full.target].shape
    }


def replacements(full: Mapping[str, TensorRef], context: Context) -> list[Replacement]:
    """The replacements that the tensors carried in full make in the base.

    Args:
        full: the tensors by the model's names.
        context: the adapter's context.

    Raises:
        UnmatchedKeys: a tensor is neither in the base nor in one of the modules_to_save.
        ShapeMismatch: a tensor's shape differs from the base's, and it is not a vocabulary that has grown.
    """
    found = [_replacement(name, ref, context) for name, ref in sorted(full.items())]
    longer = {full.target: full for full in found if not full.added and _is_longer(full, context.base)}
    sizes = {
        (context.base[target].shape[0], full.source.spec.shape[0])
        for target, full in longer.items()
        if context.kinds.get(owner(target)) is LayerKind.EMBEDDING
    }
    for one in found:
        if one.added or one.source.spec.shape == context.base[one.target].shape:
            continue
        stored = context.base[one.target].shape
        if one.target not in longer or {(stored[0], one.source.spec.shape[0])} != sizes:
            raise ShapeMismatch(
                "a tensor that the adapter carries in full has another shape than the base's",
                where=f"{context.where}: {one.target}",
                expected=f"the base's {shape_text(stored)}",
                found=f"the adapter's {shape_text(one.source.spec.shape)}",
                then="check that the adapter was made for this base",
            )
        left = [name for name, spec in context.base.items() if spec.shape == stored and name not in longer]
        if left and len(stored) == 2:
            raise ShapeMismatch(
                "the adapter's vocabulary has grown, but the adapter lacks tensors that grow with it",
                where=f"{context.where}: {one.target}",
                expected=f"{left[0]} with {one.source.spec.shape[0]} rows",
                found=f"the base's {left[0]} with {stored[0]} rows, and none in the adapter",
                then="save the adapter again with that module among its modules_to_save",
            )
    return found


def row_replacements(rows: Mapping[str, TensorRef], context: Context) -> list[Replacement]:
    """The single rows of embeddings that the adapter replaces.

    Args:
        rows: the tensors of rows by module.
        context: the adapter's context, with a grown vocabulary already applied to its base.

    Raises:
        AdapterFormatError: the config's indices and the rows contradict each other or the base.
    """
    found = []
    for module, ref in sorted(rows.items()):
        target = context.rename(f"{module}.weight")
        indices = _indices(module, _configured(context.config))
        height, width = context.base[target].shape
        fits = ref.spec.shape == (len(indices), width) and len(set(indices)) == len(indices)
        if not fits or not all(0 <= index < height for index in indices):
            raise AdapterFormatError(
                "the rows and trainable_token_indices contradict each other or the base",
                where=f"{context.where}: {module}",
                expected=f"a row of {width} for each of {len(indices)} different indices below {height}",
                found=f"{shape_text(ref.spec.shape)}, indices up to {max(indices, default='none')}",
                then="check that the adapter was made for this base",
            )
        found.append(Replacement(target, ref, added=False, rows=indices))
    return found


def rows_module(path: str) -> str:
    """The embedding that a key of rows belongs to."""
    return path.removesuffix(ROWS).removesuffix(f".{TOKENS}")


def _configured(config: Mapping[str, Any]) -> Any:
    """The config's row indices, whose key differs between LoRA and a TRAINABLE_TOKENS adapter."""
    return config.get("token_indices" if config.get("peft_type") == "TRAINABLE_TOKENS" else "trainable_token_indices")


def _indices(module: str, configured: Any) -> tuple[int, ...]:
    """The indices for a module. The config has one list for all modules, or one per tail of a module's name."""
    if isinstance(configured, Mapping):
        tails = [tail for tail in configured if module == tail or module.endswith(f".{tail}")]
        configured = configured[tails[0]] if len(tails) == 1 else ()
    return tuple(int(index) for index in configured or ())


def _is_longer(full: Replacement, base: Mapping[str, TensorSpec]) -> bool:
    new, old = full.source.spec.shape, base[full.target].shape
    return bool(old) and new[1:] == old[1:] and new[0] > old[0]


def _replacement(name: str, ref: TensorRef, context: Context) -> Replacement:
    base, renamed = context.base, context.rename(name)
    target = renamed if renamed in base else name
    if target in base:
        return Replacement(target, ref, added=False)
    module = owner(name)
    saved = context.config.get("modules_to_save") or ()
    listed = any(module == entry or module.endswith(f".{entry}") for entry in saved)
    beside = any(owner(other) in (module, owner(renamed)) for other in base)
    if not listed or beside:
        raise unmatched_keys([name], 1, base, context.where)
    return Replacement(name, ref, added=True)
