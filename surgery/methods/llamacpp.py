"""LoRA (arXiv 2106.09685) in llama.cpp's layout, where llama.cpp stores a weight differently from the base.

llama.cpp's rotary embedding rotates neighbouring pairs, so it reorders the rows of Llama's queries and keys
(convert_hf_to_gguf, LlamaModel.permute). It looks up an embedding's factor by rows, one per token
(llm_graph_context::build_inp_embd).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.spec import TensorSpec
from surgery.exact.rounding import Delta, exact_product
from surgery.methods.base import AdditiveMethod
from surgery.methods.lora import check_weight
from surgery.methods.shapes import factor_shape

if TYPE_CHECKING:
    import torch


class PairedLora(AdditiveMethod):
    """ΔW = s · (P B) A, s = alpha / rank; P leads each head's rows from pairs back to halves.

    Factors: lora_A (rank, in), lora_B (out, rank). Settings: heads, the number of heads among the rows.
    """

    name = "lora_paired"
    title = "LoRA"
    paper = "LoRA, llama.cpp's queries and keys"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        (_, into), (out, _) = (factor_shape(module, role, 2) for role in ("lora_A", "lora_B"))
        check_weight(weight, (out, into))

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW, with its rows in the base's order."""
        b = halved(factors["lora_B"], module.settings["heads"])  # (out, rank)
        return exact_product(b, factors["lora_A"], weight * module.scaling)


class RowsLora(AdditiveMethod):
    """ΔW = s · A Bᵀ for an embedding (vocabulary, width), s = alpha / rank.

    Factors: lora_A (vocabulary, rank), lora_B (width, rank).
    """

    name = "lora_rows"
    title = "LoRA"
    paper = "LoRA, llama.cpp's token embedding"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        (rows, _), (width, _) = (factor_shape(module, role, 2) for role in ("lora_A", "lora_B"))
        check_weight(weight, (rows, width))

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW."""
        return exact_product(factors["lora_A"], factors["lora_B"].mT, weight * module.scaling)


def paired(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleaves the two halves of each head's rows.  # (out, columns)"""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def halved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `paired`.  # (out, columns)"""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
