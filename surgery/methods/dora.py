"""DoRA (Liu et al., arXiv 2402.09353, equation 5): W = m · (W0 + s BA) / ‖W0 + s BA‖.

The norm is taken over the inputs of each output, as in peft: over the rows of a linear weight (out, in), the columns of
a Conv1D (in, out) and of an embedding (vocabulary, width), and all but the first dimension of a convolution.
The factor s scales only BA, so a strength other than 1 does not interpolate between W0 and W: 0 gives m · W0 / ‖W0‖.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import ShapeMismatch
from formats.layers import LayerKind
from formats.spec import DType, TensorSpec, shape_text
from formats.tensors import torch_dtype
from surgery.errors import NotFinite
from surgery.exact.finite import is_finite
from surgery.exact.rounding import exact_product, lengthen
from surgery.methods.base import AdditiveMethod, Spacious, TransformingMethod
from surgery.methods.lora import check_pair, check_weight, delta_shape, outward

if TYPE_CHECKING:
    import torch


class Dora(TransformingMethod):
    """Each output's weights get the direction of W0 + ΔW and the length m.

    Factors: LoRA's, and lora_magnitude_vector with one value per output.
    """

    name = "dora"
    title = "DoRA"
    paper = "DoRA, arXiv 2402.09353"
    forgets = "DoRA keeps the direction of W0 + ΔW and sets its length to m, so the length of W0 + ΔW is lost"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """As LoRA's; ShapeMismatch too for magnitudes that are not one for each output."""
        check_pair(module)
        check_weight(weight, delta_shape(module, len(weight.shape)))
        _check_magnitudes(module, weight, module.factors["lora_B"].spec.shape[0])

    def transform(
        self,
        module: AdapterModule,
        weight: torch.Tensor,
        factors: Mapping[str, torch.Tensor],
        dtype: DType,
        *,
        back: bool = False,
    ) -> torch.Tensor:
        """m · (W0 + s BA) / ‖W0 + s BA‖ in the base's layout. Raises NotFinite if W0 + s BA is zero for an output."""
        import torch

        left, right = outward(module.kind, factors["lora_A"], factors["lora_B"])
        magnitude = factors["lora_magnitude_vector"].flatten()  # (out,)
        result = torch.empty(weight.shape, dtype=torch_dtype(dtype))
        matrices = [tensor.view(left.shape[0], right.shape[1]) for tensor in (weight, result)]
        if module.kind in (LayerKind.TRANSPOSED, LayerKind.EMBEDDING):
            left, right = right.mT, left.mT
            matrices = [matrix.mT for matrix in matrices]  # (out, in)
        lengthen(matrices[0], exact_product(left, right, module.scaling), magnitude, matrices[1], dtype)
        _check_directions(module, weight, result)
        return result


class DoraAround(TransformingMethod):
    """LyCORIS's weight_decompose: m · (W0 + ΔW) / ‖W0 + ΔW‖ with another method's ΔW, of a weight stored (out, in).

    Factors: the other method's, and lora_magnitude_vector with one value per output.
    """

    paper = "DoRA around another product, LyCORIS, arXiv 2402.09353"
    forgets = Dora.forgets

    def __init__(self, name: str, inner: AdditiveMethod) -> None:
        self.name = name
        self.title = f"DoRA around {inner.title}"
        self._inner = inner

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """As the other method's check. Also raises ShapeMismatch if there is not one magnitude per output."""
        self._inner.check(_without_magnitude(module), weight)
        _check_magnitudes(module, weight, weight.shape[0])

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """Bytes for the other method, or for a copy of its factors and one in fixed point."""
        if isinstance(self._inner, Spacious):
            return self._inner.workspace(_without_magnitude(module), weight)
        return 16 * sum(ref.spec.size for ref in module.factors.values())

    def transform(
        self,
        module: AdapterModule,
        weight: torch.Tensor,
        factors: Mapping[str, torch.Tensor],
        dtype: DType,
        *,
        back: bool = False,
    ) -> torch.Tensor:
        """m · (W0 + ΔW) / ‖W0 + ΔW‖. Raises NotFinite if W0 + ΔW is zero for some output."""
        import torch

        result = torch.empty(weight.shape, dtype=torch_dtype(dtype))
        matrix, changed = (tensor.reshape(tensor.shape[0], -1) for tensor in (weight, result))
        delta = self._inner.delta(module, factors, 1.0)
        lengthen(matrix, delta, factors["lora_magnitude_vector"].flatten(), changed, dtype)
        _check_directions(module, weight, result)
        return result


def _without_magnitude(module: AdapterModule) -> AdapterModule:
    inner = {role: ref for role, ref in module.factors.items() if role != "lora_magnitude_vector"}
    return replace(module, factors=inner)


def _check_magnitudes(module: AdapterModule, weight: TensorSpec, out: int) -> None:
    magnitude = module.factors["lora_magnitude_vector"].spec
    if magnitude.size != out:
        raise ShapeMismatch(
            "the magnitudes are not one for each output",
            where=weight.name,
            expected=out,
            found=shape_text(magnitude.shape),
        )


def _check_directions(module: AdapterModule, weight: torch.Tensor, result: torch.Tensor) -> None:
    if not is_finite(result) and is_finite(weight) and result.isnan().any():
        raise NotFinite("W0 + ΔW is zero for some output, so DoRA gives it no direction", where=module.target)
