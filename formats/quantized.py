"""Recognises quantised weights: float8 with scales, and formats that store no floating-point weight at all.

A float8 weight W = q · s is stored with its scales: one for the tensor, one per row, or one per block of rows and
columns. Names, dtypes and shapes show which; config.json gives the block size where several would fit. All other
formats (GPTQ, AWQ, bitsandbytes …) are recognised by the tensors that they store next to a weight or instead of it.
This module reads headers and config.json only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from formats.errors import Quantised, ShapeMismatch
from formats.spec import DType, TensorSpec, shape_text

FLOAT8 = (DType.F8_E4M3, DType.F8_E5M2)
# Names of the scales of `weight`, by origin: transformers' and DeepSeek's fine-grained float8 (a factor, despite
# `_inv`); compressed-tensors, FBGEMM and vLLM; ComfyUI.
_SCALES = ("{}_scale_inv", "{}_scale", "{}.scale_weight")
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale")
_SCALE_DTYPES = (DType.F32, DType.BF16, DType.F16, DType.F64)
_BLOCK = (128, 128)
# Suffixes after the module's name of the tensors that quantised weights consist of, and the format each belongs to.
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
        weight: spec of the weight, (…, rows, columns) as stored.
        scale: spec of the scales: any shape with one value per block, in row-major order of the blocks.
        block: number of rows and columns that share a scale. The weight counts as a matrix here, with its leading
            dimensions flattened into the rows.
        power_of_two: whether scales must be powers of two (scale_fmt ue8m0 in config.json).
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
    """The scales of a weight, if the file has any."""
    stem = name.removesuffix(".weight")
    candidates = (pattern.format(stem if pattern.startswith("{}.") else name) for pattern in _SCALES)
    return next((specs[each] for each in candidates if each in specs), None)


def is_scale(name: str) -> bool:
    """Whether a tensor's name is that of scales."""
    return name.endswith(("_scale", "_scale_inv", "_scale_2", ".scale_weight"))


def activations_of(name: str, specs: Mapping[str, TensorSpec]) -> list[str]:
    """The tensors of a weight's module that quantise activations rather than the weight."""
    stem = name.removesuffix(".weight")
    return [f"{stem}.{each}" for each in _ACTIVATIONS if f"{stem}.{each}" in specs]


def scaled(name: str, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: object) -> Scaled | None:
    """How a float8 weight is scaled; None if neither a tensor of scales nor config.json says that it is.

    Args:
        name: name of a float8 tensor.
        specs: all tensors of the file.
        config: the model's `quantization_config`.
        where: the file, for messages.

    Raises:
        Quantised: the scales are missing, have an unsupported dtype, or come with a zero point.
        ShapeMismatch: the scales do not divide the weight into blocks.
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
        raise Quantised(
            "float8 with a zero point is not symmetric: W is not q · s",
            where=f"{where}: {name}",
            then="dequantise the model first, and merge into the result",
        )
    if scale.dtype not in _SCALE_DTYPES:
        raise Quantised(
            "scales of this dtype are not supported",
            where=f"{where}: {scale.name}",
            expected=", ".join(map(str, _SCALE_DTYPES)),
            found=scale.dtype,
            then="dequantise the model first, and merge into the result",
        )
    return Scaled(weight, scale, _block(weight, scale, config, where), config.get("scale_fmt") == "ue8m0")


def _block(weight: TensorSpec, scale: TensorSpec, config: Mapping[str, Any], where: object) -> tuple[int, int]:
    """The rows and columns of a block, from the shapes; if these leave it open, from config.json, else 128 × 128."""
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
        return rows, columns  # one scale per matrix of a stack
    raise ShapeMismatch(
        "the scales do not divide this weight into blocks",
        where=f"{where}: {scale.name}",
        expected=f"one scale, one per row, or one per block of {shape_text(candidates[0])} of {weight}",
        found=shape_text(scale.shape),
        then="take the weight and its scales from the same download of the model",
    )


def _configured(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block size that config.json gives, in transformers' or in compressed-tensors' form."""
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
    """Whether config.json excludes a module from quantisation."""
    left = [*(config.get("modules_to_not_convert") or ()), *(config.get("ignore") or ())]
    return any(isinstance(each, str) and each and (each in name) for each in left)


def _method(config: Mapping[str, Any]) -> str | None:
    method = config.get("quant_method")
    return str(method) if method else None


def foreign(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> dict[str, str]:
    """Weights that the file does not store as floating-point tensors: the quantisation format by the weight's name in
    the unquantised model."""
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
    """Raises Quantised for the first of these weights that `forms` lists."""
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
