"""LoRA (arXiv 2106.09685) as microsoft/LoRA lays it out for fused layers and for convolutions.

A fused layer (query, key and value in one weight) has separate factors for each adapted slice of its outputs. For a
convolution, the product BA has as many elements as the weight and is reshaped to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.layers import LayerKind
from formats.spec import TensorSpec
from surgery.exact.rounding import Delta, RowsOf, exact_product
from surgery.methods.base import AdditiveMethod
from surgery.methods.lora import check_weight
from surgery.methods.shapes import factor_shape

if TYPE_CHECKING:
    import torch


class FusedLora(AdditiveMethod):
    """ΔW = s · B_j A_j in the j-th adapted slice of the outputs, zero in the others, s = alpha / rank.

    Factors: lora_A (rank · n, in), lora_B (height · n, rank) for n adapted slices of `height` outputs, stacked by rows.
    Settings: enabled, one boolean per slice of the weight.
    """

    name = "lora_fused"
    title = "LoRA"
    paper = "LoRA, loralib.MergedLinear"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        (_, into), (rows, _) = (factor_shape(module, role, 2) for role in ("lora_A", "lora_B"))
        enabled = module.settings["enabled"]
        out = rows // sum(enabled) * len(enabled)
        check_weight(weight, (out, into) if module.kind is LayerKind.LINEAR else (into, out))

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW, transposed if the base stores (in, out)."""
        import torch

        enabled, scale = module.settings["enabled"], weight * module.scaling
        count, turned = sum(enabled), module.kind is not LayerKind.LINEAR
        pairs = zip(factors["lora_A"].chunk(count), factors["lora_B"].chunk(count), strict=True)
        products = [exact_product(*((a.mT, b.mT) if turned else (b, a)), scale) for a, b in pairs]
        left = iter(products)
        slices = [next(left) if each else None for each in enabled]
        height, width = factors["lora_B"].shape[0] // count, products[0].columns

        def below(begin: int, end: int) -> torch.Tensor:  # slices stacked by rows
            parts = []
            for index, product in enumerate(slices):
                first, last = max(begin - index * height, 0), min(end - index * height, height)
                if first < last:
                    parts.append(product.rows(first, last) if product else _zeros(last - first, width))
            return torch.cat(parts)

        def beside(begin: int, end: int) -> torch.Tensor:  # slices side by side
            return torch.cat([each.rows(begin, end) if each else _zeros(end - begin, height) for each in slices], dim=1)

        return RowsOf(height * len(enabled), beside) if turned else RowsOf(width, below)


class KernelLora(AdditiveMethod):
    """ΔW = s · BA, element by element in the order of the weight (out, in / groups, k, k), s = alpha / rank.

    Factors: lora_A (rank · k, in · k), lora_B (out / groups · k, rank · k). Settings: row, the elements per output.
    """

    name = "lora_kernel"
    title = "LoRA"
    paper = "LoRA, loralib.ConvLoRA"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats."""
        check_weight(weight, weight.shape)  # the reader has checked that the factors fit

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW as (out, in / groups · k · k)."""
        product = exact_product(factors["lora_B"], factors["lora_A"], weight * module.scaling)
        row, width = int(module.settings["row"]), product.columns

        def rows(begin: int, end: int) -> torch.Tensor:
            first, last = begin * row // width, -(-end * row // width)
            flat = product.rows(first, last).flatten()
            return flat[begin * row - first * width : end * row - first * width].view(end - begin, row)

        return RowsOf(row, rows)


def _zeros(rows: int, columns: int) -> torch.Tensor:
    import torch

    return torch.zeros(rows, columns, dtype=torch.float64)
