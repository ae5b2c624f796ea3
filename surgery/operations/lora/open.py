"""Opening the LoRA adapters that resize and combine make anew, in peft's names, with the base or without it.

Knows no decomposition and no output.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from formats.adapter import NOTHING_TOLD
from formats.dialects import dialect_of, open_adapter_file
from formats.dialects.peft_recast import module_of
from formats.errors import ShapeMismatch, UnsupportedDType
from formats.paths import open_checkpoint
from formats.spec import TensorSpec, shape_text
from surgery.errors import Unsupported
from surgery.operations.merge.adapters import AdapterPaths, WeighedAdapter, adapter_paths, open_adapters, open_for_merge

_METHODS = ("lora", "lora_bias", "dora")


def open_loras(adapters: AdapterPaths, base: str | Path | None) -> tuple[WeighedAdapter, ...]:
    """Opens LoRA adapters in peft's names, against a base or else against what their own factors tell of it.

    Raises:
        ShapeMismatch: adapters of different bases.
        Unsupported: other methods, or a form whose factors cannot be made anew one by one.
        ReportedError: as `open_adapters`.
    """
    paths = [path for path, _ in adapter_paths(adapters)]
    for path in paths:
        _check_dialect(path)
    if base is not None:
        with open_checkpoint(base) as w0:
            opened = open_for_merge(base, adapters, w0.specs, with_heads=False)[0]
    else:
        opened = open_adapters(paths[0], adapters, _implied(paths), with_heads=False)
    for each in opened:
        _check(each)
    return opened


def _check_dialect(path: Path) -> None:
    """Raises Unsupported for an adapter in other names than peft's, and as `dialect_of`."""
    checkpoint, config = open_adapter_file(path)
    with checkpoint:
        dialect = dialect_of(checkpoint, config, path)
    if not dialect.in_peft_names:
        raise Unsupported(
            "only adapters in peft's names are resized and combined",
            where=path,
            found=dialect.name,
            then=f"surgery convert {path} --to peft --base BASE; or --to lora --rank N, which truncates as it converts",
        )


def _implied(paths: Sequence[Path]) -> dict[str, TensorSpec]:
    """What the factors of all adapters tell of their base. Raises ShapeMismatch where they contradict each other."""
    known: dict[str, TensorSpec] = {}
    tellers: dict[str, Path] = {}
    bases: dict[str, Path] = {}
    for path in paths:
        checkpoint, config = open_adapter_file(path)
        with checkpoint:
            found = dialect_of(checkpoint, config, path).implied_base(checkpoint, config, NOTHING_TOLD)
        name = (config or {}).get("base_model_name_or_path")
        if name:
            bases.setdefault(str(name), path)
        if len(bases) > 1:
            raise ShapeMismatch(
                "the adapters name different bases",
                where=" and ".join(map(str, bases.values())),
                expected="adapters of one base",
                found=", ".join(bases),
                then="--base BASE names the one that all of them are for",
            )
        for spec in found.values():
            other = known.setdefault(spec.name, spec)
            if other.shape != spec.shape:
                raise ShapeMismatch(
                    "the adapters are for weights of different shapes",
                    where=spec.name,
                    expected=f"{shape_text(other.shape)}, as {tellers[spec.name]} has it",
                    found=f"{shape_text(spec.shape)} in {path}",
                    then="adapters of one base only can be put together",
                )
            tellers.setdefault(spec.name, path)
    return known


def _check(each: WeighedAdapter) -> None:
    """Refuses what has no factors to make anew, or ties them to others."""
    adapter, where = each.adapter, each.adapter.ref.path
    foreign = sorted({module.method for module in adapter.modules} - set(_METHODS))
    if foreign or not any("lora_A" in module.factors for module in adapter.modules):
        raise Unsupported(
            "only LoRA has factors of another rank", where=where, found=", ".join(foreign) or "no factors",
            then="surgery convert --to lora --rank N makes a LoRA of any method",
        )  # fmt: skip
    if adapter.config.get("ensure_weight_tying"):
        raise Unsupported("ensure_weight_tying ties the factors of the embedding to the head's", where=where)
    modules = {module_of(module.factors["lora_A"].name) for module in adapter.modules if "lora_A" in module.factors}
    for name in modules:
        if f"{name}.out_proj" in modules:
            raise Unsupported(
                "torch's MultiheadAttention has one rank for both its weights, and peft adds the second twice",
                where=f"{where}: {name}",
            )
    for module in adapter.modules:
        for ref in module.factors.values():
            if not ref.spec.dtype.is_weight:
                raise UnsupportedDType(
                    "factors in a form that cannot be computed with", where=ref.name, expected="F16, BF16, F32 or F64",
                    found=ref.spec.dtype,
                )  # fmt: skip
