"""The ops of resize and combine: turn the factors of LoRA adapters into factors of one adapter.

Each takes the factors of one weight, from one or several adapters, and returns new ones. None knows a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blake3 import blake3

from formats.adapter import AdapterModule
from formats.spec import DType, TensorRef
from formats.tensors import torch_dtype
from surgery.exact.finite import check_finite
from surgery.linalg.difference import DeltaMatrix
from surgery.linalg.mixing import DENSE, Product, mixed
from surgery.linalg.thin_product import as_they_are, refactor, thin_svd
from surgery.linalg.truncated import Factors, factorise, leading_values
from surgery.methods.lora import unpack_experts
from surgery.operations.extract.ops import as_stored, spectrum_of
from surgery.operations.extract.pairing import Matrix
from surgery.operations.extract.results import FactorFigures
from surgery.pipeline.plan import Fate, Outcome
from surgery.ranks import RankRule

if TYPE_CHECKING:
    import torch

WAYS = ("cat", "svd", *DENSE)


@dataclass(frozen=True)
class AdapterFactors:
    """One adapter's factors of a weight.

    Attributes:
        module: the module that was read.
        weight: the factor of its delta.
        digest: content digest of the adapter.
    """

    module: AdapterModule
    weight: float
    digest: str

    @property
    def factors(self) -> tuple[TensorRef, TensorRef]:
        """lora_A and lora_B."""
        return self.module.factors["lora_A"], self.module.factors["lora_B"]

    @property
    def scale(self) -> float:
        """The scale of BA in the sum."""
        return self.weight * self.module.scaling


@dataclass(frozen=True)
class AdaptedWeight:
    """One adapted weight of the result.

    Attributes:
        matrix: the weight, with the base's name and the shape that the factors imply.
        module: the module or parameter, by its name in peft's config.
        keys: keys of lora_A and lora_B.
        sources: the factors from which it is made.
    """

    matrix: Matrix
    module: str
    keys: tuple[str, str]
    sources: tuple[AdapterFactors, ...]

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.matrix.spec.name

    @property
    def rank(self) -> int:
        """The sum of all ranks, which is the rank of the concatenated factors."""
        return sum(source.module.rank for source in self.sources)

    def products(self, inputs: Sequence[torch.Tensor]) -> list[list[Product]]:
        """The product of each source, for every matrix of the weight: B (out, rank) with the scaling multiplied in, A
        (rank, in), both float64, and the source's weight."""
        import torch

        stacks: list[list[Product]] = [[] for _ in range(self.matrix.matrices)]
        for source, a, b in zip(self.sources, inputs[::2], inputs[1::2], strict=True):
            a, b = (factor.to(torch.float64).flatten(1) for factor in (a, b))
            for stack, one_a, one_b in zip(stacks, *unpack_experts(a, b, source.module.rank), strict=True):
                stack.append((one_b * source.module.scaling, one_a, source.weight))
        return stacks


@dataclass(frozen=True)
class Mix:
    """How deltas are combined; the fields are arguments of `combine`."""

    how: str
    density: float = 1.0
    seed: int = 0

    @property
    def is_dense(self) -> bool:
        """Whether full deltas are formed."""
        return self.how in DENSE

    def size(self, slot: AdaptedWeight) -> int:
        """The largest number of nonzero singular values that the result can have."""
        return min(slot.matrix.sides) if self.is_dense else min(slot.rank, *slot.matrix.sides)

    def delta(self, products: Sequence[Product], slot: AdaptedWeight, number: int) -> DeltaMatrix:
        """The mixed delta of matrix `number` of a slot."""
        texts = [f"{self.seed}:{source.digest}:{slot.name}:{number}" for source in slot.sources]
        seeds = [int.from_bytes(blake3(text.encode()).digest(7)) for text in texts]
        return DeltaMatrix.of(mixed(self.how, products, self.density, seeds))


@dataclass(frozen=True)
class RecastModule:
    """One weight with new factors.

    Attributes:
        name: name of the tensor in the base.
        shape: its shape in the file.
        kind: how its layer stores it.
        ranks: ranks of the old factors.
        rank: rank of the new factors.
        energy: share of ‖ΔW‖² that the new factors hold.
        residual: ‖ΔW − BA‖ / ‖ΔW‖; rounding included.
        delta_norm: ‖ΔW‖ of the combined delta.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    ranks: tuple[int, ...]
    rank: int
    energy: float
    residual: float
    delta_norm: float


@dataclass(frozen=True)
class Recast:
    """Makes the new factors of one weight.

    Inputs: lora_A and lora_B of every source. Outputs: lora_A, lora_B. Without a rule all ranks are kept.
    """

    slot: AdaptedWeight
    mix: Mix
    rule: RankRule | None
    dtype: DType

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Factors the combined delta. Raises NotFinite if factors exceed their dtype."""
        slot, dtype = self.slot, torch_dtype(self.dtype)
        found, totals = [], []
        for number, products in enumerate(slot.products(inputs)):
            factors, total = self._factored(products, number, dtype)
            found.append(factors)
            totals.append(total)
        rank = max(factors.rank for factors in found)
        a, b = as_stored(found, slot.matrix, rank, dtype)
        for key, tensor in zip(slot.keys, (a, b), strict=True):
            check_finite(tensor, key, "the factors overflow their dtype: --dtype float32")
        total = sum(totals)
        left_out = sum(factors.residual**2 * share for factors, share in zip(found, totals, strict=True))
        report = RecastModule(
            name=slot.name,
            shape=slot.matrix.spec.shape,
            kind=slot.matrix.kind,
            ranks=tuple(source.module.rank for source in slot.sources),
            rank=rank,
            energy=1.0 - left_out / total if total else 1.0,
            residual=math.sqrt(left_out / total) if total else 0.0,
            delta_norm=math.sqrt(total),
        )
        return Outcome((a, b), factor_fates(slot), FactorFigures(modules=(report,)))

    def _factored(self, products: Sequence[Product], number: int, dtype: torch.dtype) -> tuple[Factors, float]:
        """The factors of one matrix, and ‖ΔW‖²."""
        if self.mix.is_dense and self.rule is not None:
            delta = self.mix.delta(products, self.slot, number)
            if delta.total:
                return factorise(delta, self.rule, dtype, self.mix.seed), delta.total
            return _nothing(self.slot.matrix.sides, dtype), 0.0
        b, a = concatenated(products)
        return as_they_are(b, a, dtype) if self.rule is None else refactor(b, a, self.rule, dtype)


@dataclass(frozen=True)
class Weigh:
    """Measures the spectrum of one weight's delta up to `rank`. Inputs as for Recast; no outputs."""

    slot: AdaptedWeight
    mix: Mix
    rank: int
    dtype: DType

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Returns the spectrum in the figures."""
        spectra, total = [], 0.0
        for number, products in enumerate(self.slot.products(inputs)):
            if self.mix.is_dense:
                delta = self.mix.delta(products, self.slot, number)
                found = leading_values(delta, self.rank, self.mix.seed)
                total += delta.total
            else:
                found = thin_svd(*concatenated(products), 1).spectrum
                total += float((found**2).sum())
            spectra.append(found)
        spectrum = replace(spectrum_of(self.slot.matrix, self.dtype, total, spectra), size=self.mix.size(self.slot))
        return Outcome((), factor_fates(self.slot), FactorFigures[RecastModule](spectra=(spectrum,)))


@dataclass(frozen=True)
class AddBias:
    """Sums the changes of a bias (peft's `lora_bias`): Σ weight · scaling · bias, rounded once.

    Inputs: lora_B.bias of every source. Output: lora_B.bias of the result.
    """

    key: str
    sources: tuple[AdapterFactors, ...]
    dtype: DType

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Adds the changes. Raises NotFinite."""
        import torch

        total = torch.zeros(inputs[0].shape, dtype=torch.float64, device=inputs[0].device)
        for source, bias in zip(self.sources, inputs, strict=True):
            total += source.scale * bias.to(torch.float64)
        result = total.to(torch_dtype(self.dtype))
        check_finite(result, self.key, "the bias overflows its dtype: --dtype float32")
        fates = {f"{source.digest}:{self.key}": Fate.LOW_RANK for source in self.sources}
        return Outcome((result.cpu(),), fates)


def concatenated(products: Sequence[Product]) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, Σrank) and A (Σrank, in) of the sum of products."""
    import torch

    return torch.cat([weight * b for b, _, weight in products], dim=1), torch.cat([a for _, a, _ in products])


def factor_fates(slot: AdaptedWeight) -> dict[str, Fate]:
    """The ledger's entries, with digests, because adapters may share tensor names."""
    return {f"{source.digest}:{ref.name}": Fate.LOW_RANK for source in slot.sources for ref in source.factors}


def _nothing(sides: tuple[int, int], dtype: torch.dtype) -> Factors:
    """The factors of zero, (out, in)."""
    import numpy as np
    import torch

    out, into = sides
    return Factors(torch.zeros(1, into, dtype=dtype), torch.zeros(out, 1, dtype=dtype), 1, 1.0, 0.0, np.zeros(1))
