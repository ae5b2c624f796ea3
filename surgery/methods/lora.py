"""LoRA (Hu et al., arXiv 2106.09685, equation 3): h = W0 x + (alpha/r) B A x, so W = W0 + (alpha/r) B A.

With rsLoRA (Kalajdzievski, arXiv 2312.03732) the factor is alpha/√r. For a convolution, A is a convolution and B is a
1 × 1 convolution after it, so the change is also BA, with the kernel among A's columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import ShapeMismatch
from formats.layers import LayerKind
from formats.spec import TensorSpec, shape_text
from surgery.errors import NotMergeable
from surgery.exact.rounding import Delta, StackedProducts, exact_product
from surgery.methods.base import AdditiveMethod

if TYPE_CHECKING:
    import torch


class Lora(AdditiveMethod):
    """ΔW = s · B A for a linear weight (out, in); its transpose for a Conv1D (in, out) or an embedding.

    Factors: lora_A (rank, in), lora_B (out, rank); for a convolution lora_A (rank, in, *kernel), lora_B (out, rank,
    1, …); for experts see `AdapterModule`.
    """

    name = "lora"
    title = "LoRA"
    paper = "LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable for a weight not stored as a plain float, ShapeMismatch for one of other shape, or for
        factors without a common rank."""
        check_pair(module)
        check_weight(weight, delta_shape(module, len(weight.shape)))

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · s · B A, or (B A)ᵀ = Aᵀ Bᵀ if the base stores the transpose; experts are stacked by rows."""
        scale = weight * module.scaling
        a, b = factors["lora_A"], factors["lora_B"]  # (rank, in), (out, rank)
        if module.part is not None:
            part = module.part
            experts_a, experts_b = unpack_experts(a, b, module.rank)
            return exact_product(experts_b[part.expert, part.first : part.last], experts_a[part.expert], scale)
        if module.kind is LayerKind.PARAMETER:
            pairs = zip(*unpack_experts(a, b, module.rank), strict=True)  # (rank, in), (out, rank) each
            return StackedProducts(
                tuple(exact_product(*((a.mT, b.mT) if module.transposed else (b, a)), scale) for a, b in pairs)
            )
        left, right = outward(module.kind, a, b)
        return exact_product(left, right, scale)


class LoraBias(AdditiveMethod):
    """Δb = s · bias of lora_B, the `lora_bias` option of peft.

    Factors: lora_B.bias (out,).
    """

    name = "lora_bias"
    title = "LoRA"
    paper = "LoRA's option lora_bias in peft"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the bias is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        check_weight(weight, module.factors["lora_B.bias"].spec.shape)

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · s · bias as one column."""
        column = factors["lora_B.bias"][:, None]  # (out, 1)
        return exact_product(column, column.new_ones(1, 1), weight * module.scaling)


def outward(kind: LayerKind, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two matrices whose product is ΔW in the base's layout; for a convolution (out, in · kernel)."""
    if kind is LayerKind.CONV:
        return b.flatten(1), a.flatten(1)  # (out, rank), (rank, in · kernel)
    return (b, a) if kind is LayerKind.LINEAR else (a.mT, b.mT)


def pack_experts(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packs all experts' factors into two tensors: the rows of A by expert, the columns of B by rank.

    Args:
        a: (experts, rank, in).
        b: (experts, out, rank).

    Returns:
        lora_A (experts · rank, in) and lora_B (out, rank · experts), as in peft's lora.layer.ParamWrapper.
    """
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def unpack_experts(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `pack_experts`: (experts, rank, in) and (experts, out, rank)."""
    experts = a.shape[0] // rank
    return a.reshape(experts, rank, -1), b.reshape(-1, rank, experts).permute(2, 0, 1)


def delta_shape(module: AdapterModule, dims: int) -> tuple[int, ...]:
    """The shape of ΔW in the base's layout, for a weight with `dims` dimensions."""
    a, b = (module.factors[role].spec.shape for role in ("lora_A", "lora_B"))
    out, into = b[0], a[1]
    if module.part is not None:
        return (module.part.last - module.part.first, into)
    if module.kind is LayerKind.CONV:  # some files store a 1 × 1 convolution as a linear layer
        return (out, into, *((1,) * (dims - 2) if set(a[2:]) <= {1} else a[2:]))
    if module.kind is LayerKind.PARAMETER and dims == 3:
        return (a[0] // module.rank, *((into, out) if module.transposed else (out, into)))
    return (out, into) if module.kind in (LayerKind.LINEAR, LayerKind.PARAMETER) else (into, out)


def check_pair(module: AdapterModule) -> None:
    """Refuses lora_A and lora_B without a common rank, or with other dimensions than their layer's. Raises
    ShapeMismatch."""
    a, b = (module.factors[role].spec.shape for role in ("lora_A", "lora_B"))
    matrices = len(a) == len(b) == 2
    if min(len(a), len(b)) < 2 or not (matrices or module.kind is LayerKind.CONV) or a[0] != b[1]:
        raise ShapeMismatch(
            "the two factors do not fit each other",
            where=module.target,
            expected="lora_A (rank, in) and lora_B (out, rank)",
            found=f"lora_A {shape_text(a)}, lora_B {shape_text(b)}",
        )


def check_weight(weight: TensorSpec, delta: tuple[int, ...]) -> None:
    """Refuses a weight to which a delta of this shape cannot be added.

    Raises:
        NotMergeable: the weight is not stored as plain floats.
        ShapeMismatch: the shapes differ.
    """
    if not weight.dtype.is_weight:
        raise NotMergeable(
            "the base stores this weight in a form that nothing can be added to",
            where=weight.name,
            expected="F16, BF16, F32 or F64",
            found=weight.dtype,
            then="merge into the unquantised base, then quantise the result",
        )
    if weight.shape != delta:
        raise ShapeMismatch(
            "the factors do not fit the weight",
            where=weight.name,
            expected=shape_text(weight.shape),
            found=shape_text(delta),
        )
