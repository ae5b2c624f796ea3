"""VeRA (Kopiczko et al., arXiv 2310.11454, equation 2): ΔW = Λ_b B Λ_d A, with random A and B that all layers share.

Each layer uses the first rows of B and the first columns of A. A file without them (`save_projection=False`) has the
seed: peft draws both with torch's CPU generator on every machine, and so does this module. In PVeRA (arXiv 2512.07703)
A's outputs are means and variances; without sampling at inference only the means count, the first half of A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import ShapeMismatch
from formats.spec import TensorSpec, shape_text
from surgery.errors import NotMergeable
from surgery.exact.rounding import Delta, exact_product
from surgery.methods.base import AdditiveMethod
from surgery.methods.lora import outward
from surgery.methods.shapes import check_factor, check_matrix, factor_shape, matrix_shape

if TYPE_CHECKING:
    import torch


class Vera(AdditiveMethod):
    """ΔW = (λ_b ∘ B) (λ_d ∘ A).

    Factors: vera_lambda_b (out,), vera_lambda_d (rank,), and vera_A (rank, ≥ in), vera_B (≥ out, rank) if they were
    saved. Settings: r, projection_prng_key, and largest_out and largest_in over all adapted layers.
    """

    name = "vera"
    title = "VeRA"
    frozen = frozenset({"vera_A", "vera_B"})
    paper = "VeRA, arXiv 2310.11454"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        _check(module, weight, "vera", 1)

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """Bytes for both factors."""
        return _workspace(module, "vera")

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · (λ_b ∘ B) (λ_d ∘ A), in the base's layout."""
        return _delta(module, factors, weight, "vera", 1)


class PVera(AdditiveMethod):
    """VeRA's ΔW of the means: the first half of λ_d and of A.

    Factors: pvera_lambda_b (out,), pvera_lambda_d (2 rank,), pvera_A (2 rank, ≥ in), pvera_B (≥ out, rank). Settings:
    VeRA's, and sample_at_inference.
    """

    name = "pvera"
    title = "PVeRA"
    frozen = frozenset({"pvera_A", "pvera_B"})
    paper = "PVeRA, arXiv 2512.07703"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """As VeRA's check. Also raises NotMergeable if the adapter samples at inference."""
        if module.settings["sample_at_inference"]:
            raise NotMergeable(
                "PVeRA with sample_at_inference draws its latent for each input anew, which no weight can express",
                where=weight.name,
            )
        _check(module, weight, "pvera", 2)

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """Bytes for both factors."""
        return _workspace(module, "pvera")

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · (λ_b ∘ B) (λ_d ∘ A) for the means, in the base's layout."""
        return _delta(module, factors, weight, "pvera", 2)


def _check(module: AdapterModule, weight: TensorSpec, prefix: str, halves: int) -> None:
    (out,), (width,) = (factor_shape(module, f"{prefix}_lambda_{side}", 1) for side in "bd")
    into = matrix_shape(module, weight)[1]
    check_factor(module, f"{prefix}_lambda_d", int(module.settings["r"]) * halves)
    check_matrix(module, weight, out, into)
    if f"{prefix}_A" not in module.factors or f"{prefix}_B" not in module.factors:
        return
    a, b = (factor_shape(module, f"{prefix}_{side}", 2) for side in "AB")
    if a[0] != width or a[1] < into or b[0] < out or b[1] * halves != width:
        raise ShapeMismatch(
            "the shared matrices do not fit",
            where=weight.name,
            expected=f"{width} × at least {into}, at least {out} × {width // halves}",
            found=f"{shape_text(a)}, {shape_text(b)}",
        )


def _workspace(module: AdapterModule, prefix: str) -> int:
    """Bytes for both factors in float64 and in fixed point; if they are drawn, for the size of the largest layer."""
    out, width = (module.factors[f"{prefix}_lambda_{side}"].spec.size for side in "bd")
    settings = module.settings
    drawn = f"{prefix}_A" not in module.factors or f"{prefix}_B" not in module.factors
    sides = (settings["largest_in"], settings["largest_out"]) if drawn else (settings["in"], out)
    return 3 * 8 * width * sum(map(int, sides))


def _delta(
    module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float, prefix: str, halves: int
) -> Delta:
    import torch

    lambda_b, lambda_d = (factors[f"{prefix}_lambda_{side}"].double() for side in "bd")
    width = lambda_d.shape[0]
    rank = width // halves
    settings = module.settings
    if f"{prefix}_A" in factors and f"{prefix}_B" in factors:
        a, b = factors[f"{prefix}_A"], factors[f"{prefix}_B"]
    else:
        generator = torch.Generator(device="cpu").manual_seed(int(settings["projection_prng_key"]))
        a = kaiming((width, int(settings["largest_in"])), generator)
        b = kaiming((int(settings["largest_out"]), rank), generator)
    into = int(settings["in"])
    left = lambda_b[:, None] * b[: lambda_b.shape[0]].double()  # (out, rank)
    right = lambda_d[:rank, None] * a[:rank, :into].double()  # (rank, in)
    return exact_product(*outward(module.kind, right, left), weight)


def kaiming(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Kaiming-uniform values, drawn as in peft: the fan-in is all dimensions but the first.  # float32"""
    import torch

    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(math.prod(shape[1:])))
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
