"""The ops of to_lora: turn the change that any method makes to one weight into lora_A and lora_B.

Each takes the factors of one weight, and the weight itself if the change depends on it. None knows a file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from formats.adapter import AdapterModule
from formats.layers import LayerKind
from formats.spec import DType
from formats.tensors import torch_dtype
from surgery.errors import NotFinite
from surgery.exact.finite import check_finite
from surgery.linalg.by_structure import Form, factored, form_of, nothing, spectrum
from surgery.linalg.difference import DeltaMatrix
from surgery.operations.extract.ops import Decomposition, as_stored, delta_of, matrices_of, spectrum_of
from surgery.operations.extract.pairing import Matrix
from surgery.operations.extract.results import FactorFigures
from surgery.operations.merge.ops import apply_modules, deltas_of
from surgery.pipeline.plan import Fate, Outcome

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ToLoraModule:
    """One weight whose change became factors.

    Attributes:
        name: name of the tensor in the base.
        shape: its shape in the file.
        kind: how its layer stores it.
        method: the adapter's method for this weight.
        rank: rank of the factors.
        exact: whether the factors are known to hold all of ΔW, up to rounding.
        energy: share of ‖ΔW‖² that the factors hold.
        residual: ‖ΔW − BA‖ / ‖ΔW‖; rounding included.
        delta_norm: ‖ΔW‖.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    method: str
    rank: int
    exact: bool
    energy: float
    residual: float
    delta_norm: float


@dataclass(frozen=True)
class WeightChange:
    """The change that one module makes to one weight.

    Attributes:
        matrix: the weight.
        module: the module that adapts it.
        reads: whether the step reads the weight itself, before the factors.
        counted: the adapter's tensors that this step enters in the ledger.
    """

    matrix: Matrix
    module: AdapterModule
    reads: bool
    counted: tuple[str, ...]

    def form(self, inputs: tuple[torch.Tensor, ...]) -> Form:
        """ΔW (out, in). Raises NotFinite."""
        name, device = self.matrix.spec.name, inputs[-1].device
        factors = inputs[1:] if self.reads else inputs
        for role, factor in zip(sorted(self.module.factors), factors, strict=True):
            if factor.is_floating_point():
                check_finite(factor, f"{role} of {name}")
        if self.reads:
            tuned = apply_modules(inputs[0], ((self.module, 1.0),), factors, DType.F64).to(device)
            ((before, after),) = zip(matrices_of(inputs[0], self.matrix), matrices_of(tuned, self.matrix), strict=True)
            return delta_of(before, after, name) or nothing(self.matrix.sides)
        deltas = deltas_of(((self.module, 1.0),), inputs)
        assert deltas is not None  # a method without a delta reads the weight
        turned = self.matrix.kind in (LayerKind.TRANSPOSED, LayerKind.EMBEDDING)
        form = form_of(deltas[0], self.matrix.spec.shape[0], device, turned=turned)
        if isinstance(form, DeltaMatrix) and not math.isfinite(form.total):
            raise NotFinite("ΔW overflows float32", where=name, then="check that training did not diverge")
        return form

    @property
    def fates(self) -> dict[str, Fate]:
        """The ledger's entries."""
        return dict.fromkeys(self.counted, Fate.LOW_RANK)


@dataclass(frozen=True)
class Lower:
    """Factors ΔW. Inputs: the weight if the change reads it, then its factors. Outputs: lora_A and lora_B."""

    change: WeightChange
    how: Decomposition

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Decomposes ΔW. Raises NotFinite if factors exceed their dtype."""
        matrix, dtype = self.change.matrix, torch_dtype(self.how.dtype)
        factors, total, exact = factored(self.change.form(inputs), self.how.rule, dtype, self.how.seed)
        lora_a, lora_b = as_stored([factors], matrix, factors.rank, dtype)
        for role, tensor in (("lora_A", lora_a), ("lora_B", lora_b)):
            check_finite(tensor, f"{role} of {matrix.spec.name}", "the factors overflow their dtype: --dtype float32")
        report = ToLoraModule(
            name=matrix.spec.name,
            shape=matrix.spec.shape,
            kind=matrix.kind,
            method=self.change.module.method,
            rank=factors.rank,
            exact=exact,
            energy=factors.energy,
            residual=factors.residual,
            delta_norm=math.sqrt(total),
        )
        return Outcome((lora_a, lora_b), self.change.fates, FactorFigures(modules=(report,)))


@dataclass(frozen=True)
class WeighChange:
    """Measures the spectrum of ΔW up to `rank`. Inputs as for Lower; no outputs."""

    change: WeightChange
    rank: int
    how: Decomposition

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Returns the spectrum in the figures."""
        values, total, complete = spectrum(self.change.form(inputs), self.rank, self.how.seed)
        found = spectrum_of(self.change.matrix, self.how.dtype, total, [values])
        if complete:
            found = replace(found, size=len(values))
        return Outcome((), self.change.fates, FactorFigures[ToLoraModule](spectra=(found,)))


@dataclass(frozen=True)
class Settle:
    """Adds the change to a bias or to a norm's weight, which is stored in full.

    Inputs: the base's tensor, then its factors. Output: the tensor as merge would store it.
    """

    name: str
    dtype: DType
    module: AdapterModule
    counted: tuple[str, ...]

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Adds the change. Raises NotFinite."""
        result = apply_modules(inputs[0], ((self.module, 1.0),), inputs[1:], self.dtype)
        check_finite(result, self.name)
        return Outcome((result.cpu(),), dict.fromkeys(self.counted, Fate.FULL))
