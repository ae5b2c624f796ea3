"""Sparse deltas: SHiRA, Supertuning and WaveFT.

SHiRA (Bhardwaj et al., arXiv 2406.13175) trains some elements of the weight, whose positions are stored in the
adapter. Supertuning (arXiv 2607.09287) does the same, with LoRA's factors in addition. WaveFT (Bilican et al., arXiv
2505.12532) trains some wavelet coefficients, at positions that torch's CPU generator draws from a seed; with the Haar
wavelet each coefficient becomes four elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.errors import ShapeMismatch
from formats.layers import LayerKind
from formats.spec import TensorSpec
from surgery.errors import NotMergeable
from surgery.exact.rounding import Delta, RowsOf, exact_product
from surgery.methods.base import AdditiveMethod
from surgery.methods.fourierft import check_places, drawn_places
from surgery.methods.shapes import TRANSPOSED, check_factor, check_matrix, factor_shape, matrix_shape

if TYPE_CHECKING:
    import torch

    Group = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_HAAR = ("db1", "haar")
_LORA = ("supertuning_lora_A.weight", "supertuning_lora_B.weight")


_ELEMENT = 64  # bytes per element during the computation: row, column and value, sorted, and their order


class Shira(AdditiveMethod):
    """ΔW[indices] = values.

    Factors: shira_weight (n,), shira_indices (2, n), rows above columns. Settings: out, in.
    """

    name = "shira"
    title = "SHiRA"
    paper = "SHiRA, arXiv 2406.13175"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        check_factor(module, "shira_indices", 2, module.factors["shira_weight"].spec.size)
        check_matrix(module, weight, *matrix_shape(module, weight))

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """Bytes for the sorted elements."""
        return _ELEMENT * module.factors["shira_weight"].spec.size

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW, whose rows are computed on demand."""
        rows, columns = factors["shira_indices"].long()
        return _scattered(module, [(rows, columns, factors["shira_weight"].double() * weight)])


class Supertuning(AdditiveMethod):
    """ΔW[indices] = values, plus lora_alpha / r · B A if there is one.

    Factors: supertuning_values (n,), supertuning_indices (n,) into the flattened weight; supertuning_lora_A.weight
    (rank, in), supertuning_lora_B.weight (out, rank). Settings: out, in, lora_alpha.
    """

    name = "supertuning"
    title = "Supertuning"
    paper = "Supertuning, arXiv 2607.09287"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable if the weight is not stored as plain floats, ShapeMismatch if its shape does not fit."""
        out, into = matrix_shape(module, weight)
        check_factor(module, "supertuning_indices", module.factors["supertuning_values"].spec.size)
        if _LORA[0] in module.factors:
            rank = factor_shape(module, _LORA[0], 2)[0]
            check_factor(module, _LORA[0], rank, into)
            check_factor(module, _LORA[1], out, rank)
        check_matrix(module, weight, out, into, (LayerKind.LINEAR,))

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """Bytes for the sorted elements and LoRA's factors."""
        lora = sum(module.factors[role].spec.size for role in _LORA if role in module.factors)
        return _ELEMENT * module.factors["supertuning_values"].spec.size + 16 * lora

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW, whose rows are computed on demand."""
        places, into = factors["supertuning_indices"].long(), int(module.settings["in"])
        sparse = _scattered(module, [(places // into, places % into, factors["supertuning_values"].double() * weight)])
        if _LORA[0] not in factors:
            return sparse
        a, b = factors[_LORA[0]], factors[_LORA[1]]
        product = exact_product(b, a, weight * float(module.settings["lora_alpha"]) / a.shape[0])
        return RowsOf(into, lambda begin, end: product.rows(begin, end) + sparse.rows(begin, end))


class WaveFt(AdditiveMethod):
    """ΔW = scaling · inverse Haar transform of S, or scaling · S without one.

    Factors: waveft_spectrum (n,). Settings: scaling, random_loc_seed, use_idwt, wavelet_family, out, in.
    """

    name = "waveft"
    title = "WaveFT"
    paper = "WaveFT, arXiv 2505.12532"

    def check(self, module: AdapterModule, weight: TensorSpec) -> None:
        """Raises NotMergeable for another wavelet, or if the weight is not stored as plain floats."""
        if module.settings["use_idwt"] and module.settings["wavelet_family"] not in _HAAR:
            raise NotMergeable(
                "the filters of this wavelet are not in the file, and only Haar's is known here",
                where=weight.name,
                expected=" or ".join(_HAAR),
                found=module.settings["wavelet_family"],
                then="merge this adapter with peft",
            )
        check_places(module, weight, "waveft_spectrum")
        check_matrix(module, weight, *matrix_shape(module, weight))

    def workspace(self, module: AdapterModule, weight: TensorSpec) -> int:
        """Bytes for drawing all positions, or for four elements per coefficient, whichever is more."""
        return max(8 * weight.size, 4 * _ELEMENT * module.factors["waveft_spectrum"].spec.size)

    def delta(self, module: AdapterModule, factors: Mapping[str, torch.Tensor], weight: float) -> Delta:
        """weight · ΔW, whose rows are computed on demand."""
        values = factors["waveft_spectrum"].double() * (weight * float(module.settings["scaling"]))
        rows, columns = drawn_places(module, values.shape[0])
        if not module.settings["use_idwt"]:
            return _scattered(module, [(rows, columns, values)])
        out, into = int(module.settings["out"]), int(module.settings["in"])
        high, wide = (out + 1) // 2, (into + 1) // 2  # sides of a quarter of the coefficients
        groups = []
        for below in (False, True):
            for beside in (False, True):  # no two coefficients of a quarter share an element
                ours = ((rows >= high) == below) & ((columns >= wide) == beside)
                for down in (0, 1):
                    for along in (0, 1):
                        # peft passes the upper right quarter as vertical detail
                        sign = (-1) ** (down * beside + along * below)
                        at = 2 * (rows[ours] % high) + down, 2 * (columns[ours] % wide) + along
                        inside = (at[0] < out) & (at[1] < into)
                        groups.append((at[0][inside], at[1][inside], values[ours][inside] * (0.5 * sign)))
        return _scattered(module, groups)


def _scattered(module: AdapterModule, groups: Sequence[Group]) -> RowsOf:
    """The delta with these elements of (out, in).

    Args:
        module: the adapted module, with settings out and in.
        groups: rows, columns and values. No position occurs twice in a group, so its order cannot matter.

    Raises:
        ShapeMismatch: a position is outside the weight.
    """
    import torch

    shape = int(module.settings["out"]), int(module.settings["in"])
    for rows, columns, _ in groups:
        for places, size in zip((rows, columns), shape, strict=True):
            if len(places) and not (int(places.min()) >= 0 and int(places.max()) < size):
                raise ShapeMismatch("an index lies outside the weight", where=module.target, expected=f"below {size}")
    turned = module.kind in TRANSPOSED
    stored = [(columns, rows, values) if turned else (rows, columns, values) for rows, columns, values in groups]
    ordered = []
    for rows, columns, values in stored:
        order = rows.argsort()
        ordered.append((rows[order], columns[order], values[order]))
    width = shape[0] if turned else shape[1]

    def part(begin: int, end: int) -> torch.Tensor:
        block = torch.zeros(end - begin, width, dtype=torch.float64)
        for rows, columns, values in ordered:
            first, last = torch.searchsorted(rows, torch.tensor([begin, end])).tolist()
            at = rows[first:last] - begin, columns[first:last]
            block[at] = block[at] + values[first:last]
        return block

    return RowsOf(width, part)
