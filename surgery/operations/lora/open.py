"""Opens the LoRA adapters that resize and combine rewrite; they have peft's names, and the base is optional.

Knows no decomposition and no output.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from formats.adapter import NOTHING_TOLD
from formats.dialects import AdapterFile
from formats.dialects.peft_recast import module_of
from formats.errors import ShapeMismatch, UnsupportedDType
from formats.spec import TensorSpec, shape_text
from surgery.errors import Unsupported
from surgery.model.base_model import BaseModel
from surgery.operations.merge.adapters import WeighedAdapter, open_adapters, open_for_merge

_METHODS = ("lora", "lora_bias", "dora")


def open_loras(
    adapters: Sequence[tuple[AdapterFile, float | None]], model: BaseModel | None
) -> tuple[WeighedAdapter, ...]:
    """Opens LoRA adapters in peft's names, against a base or against the base that their factors imply.

    Raises:
        ShapeMismatch: the adapters have different bases.
        Unsupported: another method, or a form whose factors cannot be rewritten one by one.
        ReportedError: as `open_adapters`.
    """
    files = [file for file, _ in adapters]
    for file in files:
        _check_dialect(file)
    if model is not None:
        opened = open_for_merge(model, adapters, with_heads=False)[0]
    else:
        opened = open_adapters(None, adapters, _implied(files), with_heads=False)
    for each in opened:
        _check(each)
    return opened


def _check_dialect(file: AdapterFile) -> None:
    """Raises Unsupported for an adapter whose names are not peft's, and as `dialect_of`."""
    if not file.dialect.in_peft_names:
        raise Unsupported(
            "only adapters in peft's names can be resized or combined",
            where=file.path,
            found=file.dialect.name,
            then=f"surgery convert {file.path} --to peft --base BASE; or --to lora --rank N, which truncates as it "
            "converts",
        )


def _implied(files: Sequence[AdapterFile]) -> dict[str, TensorSpec]:
    """The specs of the base that the factors imply. Raises ShapeMismatch if adapters contradict each other."""
    known: dict[str, TensorSpec] = {}
    tellers: dict[str, Path] = {}
    bases: dict[str, Path] = {}
    for file in files:
        path = file.path
        found = file.dialect.implied_base(file.checkpoint, file.config, NOTHING_TOLD)
        name = (file.config or {}).get("base_model_name_or_path")
        if name:
            bases.setdefault(str(name), path)
        if len(bases) > 1:
            raise ShapeMismatch(
                "the adapters name different bases",
                where=" and ".join(map(str, bases.values())),
                expected="adapters of one base",
                found=", ".join(bases),
                then="if all of them fit one base, name it: --base BASE",
            )
        for spec in found.values():
            other = known.setdefault(spec.name, spec)
            if other.shape != spec.shape:
                raise ShapeMismatch(
                    "the adapters are for weights of different shapes",
                    where=spec.name,
                    expected=f"{shape_text(other.shape)}, as {tellers[spec.name]} has it",
                    found=f"{shape_text(spec.shape)} in {path}",
                    then="combine only adapters of the same base",
                )
            tellers.setdefault(spec.name, path)
    return known


def _check(each: WeighedAdapter) -> None:
    """Raises Unsupported for an adapter whose factors cannot be rewritten."""
    adapter, where = each.adapter, each.adapter.ref.path
    foreign = sorted({module.method for module in adapter.modules} - set(_METHODS))
    if foreign or not any("lora_A" in module.factors for module in adapter.modules):
        raise Unsupported(
            "only LoRA can be resized or combined", where=where, found=", ".join(foreign) or "no factors",
            then="surgery convert --to lora --rank N makes a LoRA of any method",
        )  # fmt: skip
    if adapter.config.get("ensure_weight_tying"):
        raise Unsupported(
            "ensure_weight_tying ties the factors of the embedding to the head's",
            where=where,
            then="merge the adapter into the base instead",
        )
    modules = {module_of(module.factors["lora_A"].name) for module in adapter.modules if "lora_A" in module.factors}
    for name in modules:
        if f"{name}.out_proj" in modules:
            raise Unsupported(
                "torch's MultiheadAttention has one rank for both its weights, and peft adds the second twice",
                where=f"{where}: {name}",
                then="merge the adapter into the base instead",
            )
    for module in adapter.modules:
        for ref in module.factors.values():
            if not ref.spec.dtype.is_weight:
                raise UnsupportedDType(
                    "the factors have an unsupported dtype", where=ref.name, expected="F16, BF16, F32 or F64",
                    found=ref.spec.dtype, then="save the adapter in one of these dtypes",
                )  # fmt: skip
