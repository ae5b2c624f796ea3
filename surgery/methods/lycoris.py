"""LyCORIS's own forms of OFT, BOFT, GLoRA and (IA)³ (Yeh et al., arXiv 2309.14859), as in its modules' forward.

They differ from peft's: OFT and BOFT rotate outputs instead of inputs, GLoRA multiplies W0 by a matrix instead of
elementwise, and (IA)³ learns the difference from 1. None of them changes a bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import ShapeMismatch
from formats.spec import DType, TensorSpec, shape_text
from surgery.errors import NotMerged
from surgery.exact.fixed_order import inverse, matmul, multiplier, norms
from surgery.exact.rounding import exact_product
from surgery.methods.base import TransformingMethod
from surgery.methods.oft import INVERSE, cayley
from surgery.methods.shapes import PLAIN, change_outputs, check_matrix, factor_shape, matrix_shape

if TYPE_CHECKING:
    import torch


class OutputOft(TransformingMethod):
    """W = λ ∘ blockdiag(R)ᵀ W0, R = (I + Q)(I − Q)⁻¹, Q = P − Pᵀ brought into a ball where there is a constraint.

    Factors: oft_blocks (blocks, b, b), which is P; rescale (out, 1, …), which is λ, if it was trained; alpha, the
    constraint, if it was saved. Settings: constraint, the same value as a number: the radius per output.
    """

    name = "lycoris_oft"
    title = "OFT"
    paper = "OFT in LyCORIS, arXiv 2306.07280"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises ShapeMismatch for blocks that do not fill the weight's outputs, NotMergeable as check_matrix."""
        _check_blocks(module, weight, 3)

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """Bytes for the rotations and the computation of their inverses."""
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
        """λ ∘ Rᵀ W0, or R⁻ᵀ (W / λ); the latter raises NotMerged if λ has a zero."""
        import torch

        turned = _rotations(module, factors).mT  # (blocks, b, b)
        orders = [torch.arange(turned.shape[0] * turned.shape[1])]
        return _turned(module, weight, turned[None], orders, factors.get("rescale"), dtype, back)


class OutputBoft(TransformingMethod):
    """W = λ ∘ Bₘ … B₁ W0, Bᵢ = Pᵢᵀ blockdiag(Rᵢ) Pᵢ, R as OFT's; the i-th permutation brings together outputs that
    lie b/2 · 2ⁱ apart.

    Factors and settings: as for OFT, but oft_blocks is (levels, blocks, b, b).
    """

    name = "lycoris_boft"
    title = "BOFT"
    paper = "BOFT in LyCORIS, arXiv 2311.06243"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """As OFT's check. Also raises ShapeMismatch if the levels do not fit the outputs."""
        levels, blocks, size, _ = factor_shape(module, "oft_blocks", 4)
        _check_blocks(module, weight, 4)
        if size % 2 or blocks * size % (size << (levels - 1)):
            raise ShapeMismatch(
                "the levels of a butterfly do not fit the weight's outputs",
                where=weight.name,
                expected=f"blocks of even size, a multiple of {size << (levels - 1)} outputs",
                found=shape_text((levels, blocks, size, size)),
            )

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """Bytes for the rotations and the computation of their inverses."""
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
        """λ ∘ Bₘ … B₁ W0, or the inverse, which raises NotMerged if λ has a zero."""
        import torch

        rotations = _rotations(module, factors)  # (levels, blocks, b, b)
        levels, blocks, size, _ = rotations.shape
        places = torch.arange(blocks * size)
        orders = [places.view(-1, 2, size // 2 << level).mT.flatten() for level in range(levels)]
        return _turned(module, weight, rotations, orders, factors.get("rescale"), dtype, back)


def _check_blocks(module: AdapterModule, weight: TensorSpec, dims: int) -> None:
    blocks, size, other = factor_shape(module, "oft_blocks", dims)[-3:]
    rescale = module.factors.get("rescale")
    if size != other or (rescale is not None and rescale.spec.size != blocks * size):
        found = [ref.spec.shape for role, ref in sorted(module.factors.items()) if role != "alpha"]
        raise ShapeMismatch(
            "the rotations are not square blocks, or their lengths not one for each output",
            where=weight.name,
            found=", ".join(map(shape_text, found)),
        )
    check_matrix(module, weight, blocks * size, matrix_shape(module, weight)[1], PLAIN)


def _rotations(module: AdapterModule, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """R of each block.  # (…, blocks, b, b) float64"""
    skew = factors["oft_blocks"].double()
    skew = skew - skew.mT
    limit = float(module.settings["constraint"]) * skew.shape[-3] * skew.shape[-1]
    length = norms(skew.reshape(1, -1))[0] + 1e-8
    return cayley(-(skew * limit / length if 0 < limit < length else skew))


def _turned(
    module: AdapterModule,
    weight: torch.Tensor,
    rotations: torch.Tensor,
    orders: Sequence[torch.Tensor],
    rescale: torch.Tensor | None,
    dtype: DType,
    back: bool,
) -> torch.Tensor:
    """Rotates the weight's outputs level by level and then scales them; or the inverse.

    Args:
        module, weight, dtype, back: as for transform.
        rotations: (levels, blocks, b, b), which multiply columns.
        orders: (out,) for each level: the outputs in the order in which the blocks take them.
        rescale: one factor per output.
    """
    import torch

    scale = torch.ones(1, dtype=torch.float64) if rescale is None else rescale.double().flatten()
    if back and not scale.all():
        raise _nothing_left("OFT", module)
    turns = [multiplier((inverse(each) if back else each).mT) for each in rotations]
    levels = list(zip(turns, orders, strict=True))

    def rotated(columns: torch.Tensor, _: int, __: int) -> torch.Tensor:
        columns = columns / scale if back else columns  # (columns, out)
        for turn, order in reversed(levels) if back else levels:
            blocks = columns[:, order].reshape(len(columns), -1, rotations.shape[-1]).transpose(0, 1)
            placed = torch.empty_like(columns)
            placed[:, order] = turn(blocks).transpose(0, 1).flatten(1)
            columns = placed
        return columns if back else columns * scale

    return change_outputs(module, weight, dtype, rotated, columns=True)


class ProductGlora(TransformingMethod):
    """W = W0 (I + s A₁ A₂) + s B₁ B₂, of a convolution's inputs at each point; s = alpha / rank.

    For a convolution, I + s A₁ A₂ acts on the inputs at each kernel position.

    Factors: a1 (in, rank), a2 (rank, in), b1 (out, rank), b2 (rank, in · kernel), with a convolution's dimensions.
    """

    name = "lycoris_glora"
    title = "GLoRA"
    paper = "GLoRA in LyCORIS, arXiv 2306.07967"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises ShapeMismatch if the factors do not fit, NotMergeable as check_matrix."""
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
        """W0 (I + s A₁ A₂) + s B₁ B₂; or (W − s B₁ B₂)(I + s A₁ A₂)⁻¹, which raises NotMerged if the inverse does not
        exist."""
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


class DifferenceIa3(TransformingMethod):
    """W = (1 + w) ∘ W0, by rows, or by input channels where it acts on the input.

    Factors: scale (channels,), for a convolution (1, channels, 1, …); on_input. Settings: on_input as a boolean.
    """

    name = "lycoris_ia3"
    title = "(IA)³"
    paper = "(IA)³ in LyCORIS, arXiv 2205.05638"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises ShapeMismatch if the vector has another length, NotMergeable as check_matrix."""
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
        """(1 + w) ∘ W0, or W / (1 + w); the latter raises NotMerged if 1 + w has a zero."""
        scale = 1 + factors["scale"].double().flatten()
        if back and not scale.all():
            raise _nothing_left("(IA)³", module)
        columns = not module.settings["on_input"]  # a column of the matrix spans all outputs
        if not columns:
            scale = scale.repeat_interleave(weight[0, 0].numel())  # (in · kernel,)
        return change_outputs(
            module, weight, dtype, lambda lines, _, __: lines / scale if back else lines * scale, columns=columns
        )


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape as a matrix, with all dimensions but the first flattened."""
    return (shape[0], math.prod(shape[1:])) if shape else (0, 0)


def _nothing_left(what: str, module: AdapterModule) -> NotMerged:
    return NotMerged(
        f"{what} multiplied by zero here: nothing is left to divide",
        where=module.target,
        then="go back to the base itself",
    )
