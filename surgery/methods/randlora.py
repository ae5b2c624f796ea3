"""RandLoRA (Albert et al., arXiv 2502.00987): ΔW = s · Σ Bₙ Λₙ A Γₙ, of full rank, with random A and B.

All layers share A and B. Which of them is the left factor depends on whether the layer has more outputs or inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import ShapeMismatch
from formats.spec import TensorSpec
from surgery.errors import NotMergeable
from surgery.exact.fixed_order import fine_product
from surgery.exact.rounding import Delta
from surgery.methods.base import AdditiveMethod
from surgery.methods.lora import outward
from surgery.methods.shapes import check_factor, check_matrix, factor_shape, matrix_shape

if TYPE_CHECKING:
    import torch


class RandLora(AdditiveMethod):
    """ΔW = randlora_alpha / rank · B (λ ∘ A ∘ γ), or its mirror image for a layer wider than high.

    Factors: randlora_lambda (rank, bases), randlora_gamma (bases, short side), randlora_A (rank, 1, ≥ short side),
    randlora_B (≥ long side, ≥ bases, rank). Settings: randlora_alpha, out, in.
    """

    name = "randlora"
    title = "RandLoRA"
    frozen = frozenset({"randlora_A", "randlora_B"})
    paper = "RandLoRA, arXiv 2502.00987"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats or the bases were not saved, ShapeMismatch if
        factors do not fit."""
        out, into = matrix_shape(module, weight)
        short, long = sorted((out, into))
        rank, bases = factor_shape(module, "randlora_lambda", 2)
        check_matrix(module, weight, out, into)
        check_factor(module, "randlora_gamma", bases, short)
        a, b = (module.factors.get(role) for role in ("randlora_A", "randlora_B"))
        if a is None or b is None:
            raise NotMergeable(
                "the random bases are not in the file, and their seed does not determine them: peft draws them in "
                "bfloat16 or float16, whichever the machine supports",
                where=weight.name,
                then="save the adapter with save_projection=True",
            )
        found_a, found_b = (factor_shape(module, role, 3) for role in ("randlora_A", "randlora_B"))
        fits = found_a[:2] == (rank, 1) and found_a[2] >= short
        if not (fits and found_b[0] >= long and found_b[1] >= bases and found_b[2] == rank):
            raise ShapeMismatch(
                "the random bases do not fit", where=weight.name, expected=f"rank {rank}", found=[found_a, found_b]
            )

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """Bytes for both factors of the product, and for two fixed-point halves of each."""
        terms = module.factors["randlora_lambda"].spec.size
        return 4 * 8 * terms * sum(matrix_shape(module, weight))

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW as one product of rank · bases terms."""
        scales, gamma = factors["randlora_lambda"].double(), factors["randlora_gamma"].double()
        rank, bases = scales.shape
        out, into = int(module.settings["out"]), int(module.settings["in"])
        a, b = factors["randlora_A"], factors["randlora_B"]
        short = (scales[:, :, None] * a[:, :, : min(out, into)].double() * gamma).flatten(0, 1)  # (rank · bases, short)
        long = b[: max(out, into), :bases].double().flatten(1)  # (long, bases · rank): peft pairs them in this order
        left, right = (long, short) if into <= out else (short.mT, long.mT)
        scaling = float(module.settings["randlora_alpha"]) / rank
        return fine_product(*outward(module.kind, right, left), weight * scaling)
