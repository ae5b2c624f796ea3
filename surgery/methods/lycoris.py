"""LyCORIS's own forms of OFT, GLoRA and (IA)³ (Yeh et al., arXiv 2309.14859), as the forward of its modules has them.

They differ from peft's: OFT turns outputs instead of inputs, GLoRA multiplies W0 by a matrix instead of element by
element, and (IA)³ learns the difference to 1. None changes a bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import ShapeMismatch
from formats.spec import DType, TensorSpec, shape_text
from surgery.errors import NotMerged
from surgery.exact.fixed_order import inverse, matmul, multiplier, norms
from surgery.exact.rounding import exact_product
from surgery.methods.oft import INVERSE, cayley
from surgery.methods.shapes import PLAIN, change_outputs, check_matrix, factor_shape, matrix_shape

if TYPE_CHECKING:
    import torch


class OutputOft:
    """W = λ ∘ blockdiag(R)ᵀ W0, R = (I + Q)(I − Q)⁻¹, Q = P − Pᵀ brought into a ball where there is a constraint.

    Factors: oft_blocks (blocks, b, b), the P; rescale (out, 1, …) if it was trained; alpha, the constraint, if it was
    saved. Settings: constraint, the same as a number: the radius for each output.
    """

    name = "lycoris_oft"
    paper = "OFT in LyCORIS, arXiv 2306.07280"
    forgets = ""

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises ShapeMismatch for blocks that do not fill the weight's outputs, NotMergeable as check_matrix."""
        blocks, size, other = factor_shape(module, "oft_blocks", 3)
        rescale = module.factors.get("rescale")
        if size != other or (rescale is not None and rescale.spec.size != blocks * size):
            found = [ref.spec.shape for role, ref in sorted(module.factors.items()) if role != "alpha"]
            raise ShapeMismatch(
                "the rotations are not square blocks, or their lengths not one for each output",
                where=weight.name,
                found=", ".join(map(shape_text, found)),
            )
        check_matrix(module, weight, blocks * size, matrix_shape(module, weight)[1], PLAIN)

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """The rotations, and what their inverses take."""
        return INVERSE * module.factors["oft_blocks"].spec.size

    def transform(
        self,
        module: AdapterModule,
        weight: torch.Tensor,
        factors: Mapping[str, torch.Tensor],
        dtype: DType,
        *,
        back: bool = False,
    ) -> torch.Tensor:
        """λ ∘ Rᵀ W0, or R⁻ᵀ (W / λ); the latter raises NotMerged where λ has a zero."""
        import torch

        skew = factors["oft_blocks"].double()
        skew = skew - skew.mT
        limit = float(module.settings["constraint"]) * skew.shape[0] * skew.shape[1]
        length = norms(skew.reshape(1, -1))[0] + 1e-8
        if limit > 0 and length > limit:
            skew = skew * limit / length
        rotations = cayley(-skew)  # (blocks, b, b)
        size = rotations.shape[-1]
        turned = multiplier(inverse(rotations) if back else rotations)
        scale = factors["rescale"].double().flatten() if "rescale" in factors else torch.ones(1, dtype=torch.float64)
        if back and not scale.all():
            raise _nothing_left("OFT", module)

        def rotated(columns: torch.Tensor, _: int, __: int) -> torch.Tensor:
            columns = columns / scale if back else columns
            blocks = columns.reshape(len(columns), -1, size).transpose(0, 1)  # (blocks, columns, b)
            result = turned(blocks).transpose(0, 1).flatten(1)  # (columns, out)
            return result if back else result * scale

        return change_outputs(module, weight, dtype, rotated, columns=True)


class ProductGlora:
    """W = W0 (I + s A₁ A₂) + s B₁ B₂, of a convolution's inputs at each point; s = alpha / rank.

    Factors: a1 (in, rank), a2 (rank, in), b1 (out, rank), b2 (rank, in · kernel), of a convolution with its dimensions.
    """

    name = "lycoris_glora"
    paper = "GLoRA in LyCORIS, arXiv 2306.07967"
    forgets = ""

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises ShapeMismatch for factors that do not fit, NotMergeable as check_matrix."""
        a1, a2, b1, b2 = (_flat(module.factors[role].spec.shape) for role in ("a1", "a2", "b1", "b2"))
        out, into = matrix_shape(module, weight)
        inputs, rank = weight.shape[1] if len(weight.shape) > 1 else 0, module.rank
        if (a1, a2, b1, b2) != ((inputs, rank), (rank, inputs), (out, rank), (rank, into)):
            raise ShapeMismatch(
                "GLoRA's factors do not fit the weight",
                where=weight.name,
                expected=f"a1 {inputs} × {rank}, a2 {rank} × {inputs}, b1 {out} × {rank}, b2 {rank} × {into}",
                found=", ".join(shape_text(shape) for shape in (a1, a2, b1, b2)),
            )
        check_matrix(module, weight, out, into, PLAIN)

    def transform(
        self,
        module: AdapterModule,
        weight: torch.Tensor,
        factors: Mapping[str, torch.Tensor],
        dtype: DType,
        *,
        back: bool = False,
    ) -> torch.Tensor:
        """W0 (I + s A₁ A₂) + s B₁ B₂; or (W − s B₁ B₂)(I + s A₁ A₂)⁻¹, which raises NotMerged where there is none."""
        import torch

        scale = module.scaling
        a1, a2, b1, b2 = (factors[role].double().flatten(1) for role in ("a1", "a2", "b1", "b2"))
        added, inputs = exact_product(b1, b2, scale), a1.shape[0]
        if back:  # (I + s A₁ A₂)⁻¹ = I − s A₁ (I + s A₂ A₁)⁻¹ A₂
            inner = inverse(torch.eye(len(a2), dtype=torch.float64) + scale * matmul(a2, a1))
            if not inner.isfinite().all():
                raise _nothing_left("GLoRA", module)
            a1, scale = matmul(a1, inner), -scale
        first, second = multiplier(a1), multiplier(a2)

        def through(values: torch.Tensor) -> torch.Tensor:
            points = values.reshape(len(values), inputs, -1).mT  # (rows, kernel, in)
            return values + scale * second(first(points)).mT.reshape(values.shape)

        def changed(rows: torch.Tensor, begin: int, end: int) -> torch.Tensor:
            ours = added.rows(begin, end)
            return through(rows - ours) if back else through(rows) + ours

        return change_outputs(module, weight, dtype, changed)


class DifferenceIa3:
    """W = (1 + w) ∘ W0, by rows, or by input channels where it acts on the input.

    Factors: scale (channels,), of a convolution (1, channels, 1, …); on_input. Settings: on_input, as a truth value.
    """

    name = "lycoris_ia3"
    paper = "(IA)³ in LyCORIS, arXiv 2205.05638"
    forgets = ""

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises ShapeMismatch for a vector of another length, NotMergeable as check_matrix."""
        out, into = matrix_shape(module, weight)
        check_matrix(module, weight, out, into, PLAIN)
        channels = weight.shape[1 if module.settings["on_input"] else 0]
        found = module.factors["scale"].spec
        if found.size != channels:
            raise ShapeMismatch(
                "(IA)³'s vector is not one number for each channel",
                where=weight.name,
                expected=channels,
                found=shape_text(found.shape),
            )

    def transform(
        self,
        module: AdapterModule,
        weight: torch.Tensor,
        factors: Mapping[str, torch.Tensor],
        dtype: DType,
        *,
        back: bool = False,
    ) -> torch.Tensor:
        """(1 + w) ∘ W0, or W / (1 + w); the latter raises NotMerged where 1 + w has a zero."""
        scale = 1 + factors["scale"].double().flatten()
        if back and not scale.all():
            raise _nothing_left("(IA)³", module)
        columns = not module.settings["on_input"]  # a column of the matrix has all outputs
        if not columns:
            scale = scale.repeat_interleave(weight[0, 0].numel())  # (in · kernel,)
        return change_outputs(
            module, weight, dtype, lambda lines, _, __: lines / scale if back else lines * scale, columns=columns
        )


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """As a matrix: all but the first dimension together."""
    return (shape[0], math.prod(shape[1:])) if shape else (0, 0)


def _nothing_left(what: str, module: AdapterModule) -> NotMerged:
    return NotMerged(
        f"{what} multiplied by zero here: nothing is left to divide",
        where=module.target,
        then="go back to the base itself",
    )
