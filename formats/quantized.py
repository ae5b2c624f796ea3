"""How quantised weights lie in a file: float8 with scales, and the forms that hold no floating-point weight at all.

A float8 weight W = q · s has its scales beside it: one for the tensor, one for each row, or one for each block of rows
and columns. Names, dtypes and shapes tell which; config.json tells the block's size where several would fit. Everything
else (GPTQ, AWQ, bitsandbytes …) is recognised by the tensors that it puts beside or in place of a weight. Reads headers
and config.json only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from formats.errors import Quantised, ShapeMismatch
from formats.spec import DType, TensorSpec, shape_text

FLOAT8 = (DType.F8_E4M3, DType.F8_E5M2)
# What the scales of `weight` are called, despite `_inv` a factor: transformers' and DeepSeek's fine-grained float8;
# compressed-tensors, FBGEMM, vLLM; ComfyUI.
_SCALES = ("{}_scale_inv", "{}_scale", "{}.scale_weight")
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale")
_SCALE_DTYPES = (DType.F32, DType.BF16, DType.F16, DType.F64)
_BLOCK = (128, 128)
# Tensors that quantised weights consist of, by what follows the module's name, and whose they are.
_FOREIGN = (
    (".qweight", "GPTQ or AWQ"),
    (".weight.absmax", "bitsandbytes 4-bit"),
    (".weight_absmax", "bitsandbytes 4-bit"),
    (".weight.quant_map", "bitsandbytes 4-bit"),
    (".SCB", "bitsandbytes 8-bit"),
    (".weight_format", "bitsandbytes 8-bit"),
    (".W_q", "HQQ"),
    (".weight_packed", "compressed-tensors"),
    (".weight._data", "quanto"),
    (".weight_scale_2", "NVFP4"),
    (".codebooks", "AQLM"),
    (".Qidxs", "QuIP#"),
)
_NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "hqq": "HQQ",
    "mxfp4": "MXFP4",
    "modelopt": "NVIDIA ModelOpt",
    "bitsandbytes": "bitsandbytes",
}


@dataclass(frozen=True)
class Scaled:
    """A float8 weight and its scales.

    Attributes:
        weight: (…, rows, columns) as stored.
        scale: of any shape with one value for each block, the last two dimensions first by rows, then by columns.
        block: rows and columns that share a scale, of the weight seen as a matrix with its leading dimensions among
            the rows.
        power_of_two: whether scales may only be powers of two (config.json's scale_fmt ue8m0).
    """

    weight: TensorSpec
    scale: TensorSpec
    block: tuple[int, int]
    power_of_two: bool = False


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a model's config.json says of its quantisation; empty where it says nothing."""
    said = config.get("quantization_config", config.get("compression_config"))
    return said if isinstance(said, dict) else {}


def scale_of(name: str, specs: Mapping[str, TensorSpec]) -> TensorSpec | None:
    """The scales beside a weight, if there are any."""
    stem = name.removesuffix(".weight")
    candidates = (pattern.format(stem if pattern.startswith("{}.") else name) for pattern in _SCALES)
    return next((specs[each] for each in candidates if each in specs), None)


def is_scale(name: str) -> bool:
    """Whether a tensor is called like scales."""
    return name.endswith(("_scale", "_scale_inv", "_scale_2", ".scale_weight"))


def activations_of(name: str, specs: Mapping[str, TensorSpec]) -> list[str]:
    """The tensors of a weight's module that quantise its activations, not itself."""
    stem = name.removesuffix(".weight")
    return [f"{stem}.{each}" for each in _ACTIVATIONS if f"{stem}.{each}" in specs]


def scaled(name: str, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: object) -> Scaled | None:
    """How a float8 weight is scaled; None where neither a scale nor config.json says that it is.

    Args:
        name: of a float8 tensor.
        specs: all tensors of the file.
        config: its `quantization_config`.
        where: the file, for messages.

    Raises:
        Quantised: its scales are missing, of a dtype that is none of scales, or come with a zero point.
        ShapeMismatch: scales that do not divide the weight into blocks.
    """
    weight, scale = specs[name], scale_of(name, specs)
    if scale is None:
        if _method(config) is None or _is_left_alone(name, config):
            return None
        raise Quantised(
            "a float8 weight has no scales",
            where=f"{where}: {name}",
            expected=f"{name}_scale_inv or {name}_scale next to it, as config.json's quantization_config says",
            then="download the model's shards and their index again",
        )
    if f"{name}_zero_point" in specs:
        raise Quantised("float8 with a zero point is not symmetric: W is not q · s", where=f"{where}: {name}")
    if scale.dtype not in _SCALE_DTYPES:
        raise Quantised(
            "scales of this dtype are not supported",
            where=f"{where}: {scale.name}",
            expected=", ".join(map(str, _SCALE_DTYPES)),
            found=scale.dtype,
            then="dequantise the model first, and merge into that",
        )
    return Scaled(weight, scale, _block(weight, scale, config, where), config.get("scale_fmt") == "ue8m0")


def _block(weight: TensorSpec, scale: TensorSpec, config: Mapping[str, Any], where: object) -> tuple[int, int]:
    """The rows and columns of a block, from the shapes; from config.json, or else 128 × 128, where they leave open."""
    rows, columns = (1, 1, *weight.shape)[-2:]
    stack = weight.size // max(1, rows * columns)
    if scale.size == 1:
        return stack * rows, columns
    grid = scale.shape if len(scale.shape) > 1 else (*scale.shape, 1)
    *leading, down, across = grid
    told = _configured(config)
    candidates = [told or _BLOCK]
    if (told is None or across == 1) and down and across and rows % down == 0 and columns % across == 0:
        candidates.append((rows // down, columns // across))
    if math.prod(leading) == stack:
        for size in candidates:
            fits = (math.ceil(rows / size[0]), math.ceil(columns / size[1])) == (down, across)
            if fits and (stack == 1 or rows % size[0] == 0):
                return size
    if len(scale.shape) in (1, len(weight.shape)) and scale.size == stack > 1:
        return rows, columns  # one for each matrix of a stack
    raise ShapeMismatch(
        "the scales do not divide this weight into blocks",
        where=f"{where}: {scale.name}",
        expected=f"one, one for each row, or one for each block of {shape_text(candidates[0])} of {weight}",
        found=shape_text(scale.shape),
        then="the weight and its scales must come from one file",
    )


def _configured(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size of a block that config.json names: transformers' way, or compressed-tensors'."""
    groups = config.get("config_groups")
    weights = (
        [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        if isinstance(groups, dict)
        else []
    )
    found = [config.get("weight_block_size")]
    found += [each.get("block_structure") for each in weights if isinstance(each, dict)]
    for size in found:
        if isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
            return size[0], size[1]
    return None


def _is_left_alone(name: str, config: Mapping[str, Any]) -> bool:
    """Whether config.json excepts a module from its quantisation."""
    left = [*(config.get("modules_to_not_convert") or ()), *(config.get("ignore") or ())]
    return any(isinstance(each, str) and each and (each in name) for each in left)


def _method(config: Mapping[str, Any]) -> str | None:
    method = config.get("quant_method")
    return str(method) if method else None


def foreign(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> dict[str, str]:
    """Weights that the file holds in a form that is not a floating-point number each: by the weight's name in the
    unquantised model, whose form it is."""
    found: dict[str, str] = {}
    told = _NAMES.get(str(_method(config)).lower())
    for name, spec in specs.items():
        for suffix, form in _FOREIGN:
            if name.endswith(suffix):
                stem = name.removesuffix(suffix)
                if suffix == ".weight_packed":
                    form = "NVFP4" if f"{stem}.weight_global_scale" in specs else f"{form} {config.get('format', '')}"
                if suffix == ".qweight":
                    form = told or ("GPTQ" if f"{stem}.g_idx" in specs else form)
                found.setdefault(f"{stem}.weight", form.strip())
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in specs:
            found[name.removesuffix("_blocks")] = "MXFP4"
        if spec.dtype in (DType.I8, DType.U8, DType.I32) and scale_of(name, specs) is not None:
            form = "NVFP4" if f"{name}_scale_2" in specs else f"{told or _method(config) or 'integers with scales'}"
            found.setdefault(name, form)
    return found


def refuse_foreign(forms: Mapping[str, str], names: Iterable[str], where: object) -> None:
    """Raises Quantised for the first of these weights that is in such a form."""
    for name in names:
        if name in forms:
            raise Quantised(
                f"the weights are quantised ({forms[name]}): nothing can be added to them",
                where=f"{where}: {name}",
                expected="F16, BF16, F32 or F64; or float8 with its scales",
                found=f"{forms[name]}, {len(forms)} weights of the file",
                then="use the original, unquantised model and quantise the result; or dequantise this one first, "
                "with transformers' model.dequantize() and save_pretrained",
            )
