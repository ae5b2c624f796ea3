"""The ops of fold: change weights and biases, add neurons, and write tensors for the graph.

Each op takes tensors and returns an Outcome; a bottleneck's own tensors come after those to change. Rounds once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from formats.dialects.bottleneck import Bottleneck, Dense, Hypercomplex
from formats.dialects.prompts import Network, Prefix
from formats.grafts import Value
from formats.spec import DType, TensorRef, TensorSpec
from formats.tensors import torch_dtype
from surgery.exact.finite import check_finite
from surgery.exact.rounding import blocks, round_once
from surgery.hashes import tensor_hash
from surgery.methods.activations import function
from surgery.methods.bottleneck import Matrices, dense, hypercomplex, keys_and_values
from surgery.operations.merge.figures import MergeFigures
from surgery.operations.merge.ops import out_of_range
from surgery.pipeline.plan import Fate, Outcome

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Source:
    """Where a bottleneck's matrices come from.

    Attributes:
        one: the bottleneck.
        split: whether each of its neurons becomes two.
    """

    one: Bottleneck
    split: bool = False

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors that `matrices` takes."""
        scaling = (self.one.scaling,) if isinstance(self.one.scaling, TensorRef) else ()
        return (*_projection_refs(self.one.down), *_projection_refs(self.one.up), *scaling)

    @property
    def width(self) -> int:
        """The width of the bottleneck that `matrices` returns."""
        down = self.one.down
        if isinstance(down, Dense):
            own = down.weight.spec.shape[0]
        else:
            own = self.one.up.left.spec.shape[0] * self.one.up.left.spec.shape[1]  # type: ignore[union-attr]
        return 2 * own if self.split else own

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices and of the memory needed to make them."""
        sizes = [ref.spec.size for ref in self.refs]
        both = 2 * self.width * self.outputs if isinstance(self.one.down, Hypercomplex) else sum(sizes)
        return 8 * 6 * (both + sum(sizes))

    @property
    def outputs(self) -> int:
        """The number of the bottleneck's outputs."""
        up = self.one.up
        if isinstance(up, Dense):
            return up.weight.spec.shape[0]
        return up.right.spec.shape[0] * up.right.spec.shape[2]

    def matrices(self, tensors: Sequence[torch.Tensor]) -> Matrices:
        """The bottleneck's matrices, with its scaling multiplied in."""
        named = dict(zip([ref.name for ref in self.refs], tensors, strict=True))
        projections = []
        for each in (self.one.down, self.one.up):
            parts = [named[ref.name] for ref in _projection_refs(each)]
            if isinstance(each, Dense):
                projections.append(dense(*parts))
            else:
                projections.append(hypercomplex(parts[0], parts[1], parts[2], parts[3] if len(parts) > 3 else None))
        (down, down_bias), (up, up_bias) = projections
        scaling = self.one.scaling
        made = Matrices(down, down_bias, up, up_bias).scaled(
            named[scaling.name] if isinstance(scaling, TensorRef) else scaling
        )
        return made.split() if self.split else made


def _projection_refs(projection: Dense | Hypercomplex) -> tuple[TensorRef, ...]:
    if isinstance(projection, Dense):
        return projection.weight, projection.bias
    bias = () if projection.bias is None else (projection.bias,)
    return projection.rule, projection.left, projection.right, *bias


@dataclass(frozen=True)
class FoldWeight:
    """Computes (I + sUD) W. `transposed`: W is stored (in, out). Inputs: W, then the bottleneck's tensors."""

    name: str
    dtype: DType
    source: Source
    transposed: bool

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Works by blocks of columns of W, to keep little in memory in float64."""
        import torch

        made = self.source.matrices(inputs[1:])
        weight = inputs[0].cpu()
        result = torch.empty(weight.shape, dtype=torch_dtype(self.dtype))
        columns, out = (weight, result) if self.transposed else (weight.mT, result.mT)  # (in, out)
        for begin, end in blocks(columns):
            block = made.through_weight(columns[begin:end].mT)  # (out, n)
            out[begin:end] = round_once(block, self.dtype).mT
        return changed(self.name, weight, result, Fate.MERGED)


@dataclass(frozen=True)
class FoldBias:
    """Computes (I + sUD) b + s(U·b_D + b_U). Inputs: b, then the bottleneck's tensors."""

    name: str
    dtype: DType
    source: Source

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """In one piece."""
        result = round_once(self.source.matrices(inputs[1:]).through_bias(inputs[0]), self.dtype)
        return changed(self.name, inputs[0].cpu(), result, Fate.MERGED)


@dataclass(frozen=True)
class NewBias:
    """Makes s(U b_D + b_U) the bias of a projection that had none; zeros if no bottleneck follows it.

    Inputs: the bottleneck's tensors, if there is one.
    """

    result: TensorSpec
    source: Source | None

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """In one piece."""
        import torch

        exact = torch.zeros(self.result.shape, dtype=torch.float64)
        if self.source is not None:
            exact = self.source.matrices(inputs).through_bias(exact)
        bias = round_once(exact, self.result.dtype)
        name = self.result.name
        _check(bias, name)
        return Outcome((bias,), {}, MergeFigures(after={name: tensor_hash(bias)}, changed=True))


class Neurons(Enum):
    """Which tensor of an MLP gets more neurons."""

    FIRST = "W1 (neurons, in)"
    FIRST_BIAS = "b1 (neurons)"
    SECOND = "W2 (out, neurons)"
    SECOND_BIAS = "b2 (out)"  # gets no new elements, only + s·b_U


@dataclass(frozen=True)
class Widen:
    """Appends a bottleneck's neurons to an MLP's tensor, padded with zeros, which add nothing.

    Inputs: the tensor, then the bottleneck's tensors, if the layer has one.
    """

    name: str
    dtype: DType
    part: Neurons
    source: Source | None
    neurons: int

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Appends the neurons."""
        import torch

        before = inputs[0].cpu()
        dim = 1 if self.part is Neurons.SECOND else 0
        if self.part is Neurons.SECOND_BIAS:
            assert self.source is not None  # else it is copied
            exact = before.to(torch.float64) + self.source.matrices(inputs[1:]).up_bias
            return changed(self.name, before, round_once(exact, self.dtype), Fate.WIDENED)
        shape = list(before.shape)
        shape[dim] = self.neurons
        more = torch.zeros(shape, dtype=torch_dtype(self.dtype))
        if self.source is not None:
            made = self.source.matrices(inputs[1:])
            exact = {Neurons.FIRST: made.down, Neurons.FIRST_BIAS: made.down_bias, Neurons.SECOND: made.up}[self.part]
            more.narrow(dim, 0, exact.shape[dim]).copy_(round_once(exact.contiguous(), self.dtype))
        return changed(self.name, before, torch.cat([before, more], dim), Fate.WIDENED)


@dataclass(frozen=True)
class Branch:
    """Writes a bottleneck's down, down_bias, up and up_bias as asides.

    Inputs: the bottleneck's tensors, and others before them. If it `reads` the projection's input, these are W and, if
    `biased`, b; down and down_bias are then DW and D b + b_D. If it reads W x, it is b; they are then D and D b + b_D.
    `transposed`: W is stored (in, out).
    """

    dtype: DType
    source: Source
    reads: Value
    biased: bool
    transposed: bool

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Computes and rounds once."""
        import torch

        own = len(inputs) - len(self.source.refs)
        made = self.source.matrices(inputs[own:])
        if self.reads is Value.PRODUCT:
            made = made.before(made.down, inputs[0])
        elif self.reads is Value.INPUT:
            columns = inputs[0].cpu() if self.transposed else inputs[0].cpu().mT  # (in, out)
            rows = torch.cat([made.rows(columns[begin:end].mT) for begin, end in blocks(columns)], 1)
            made = made.before(rows, inputs[1] if self.biased else None)
        return aside([made.down, made.down_bias, made.up, made.up_bias], self.dtype, self.source.refs)


@dataclass(frozen=True)
class KeysAndValues:
    """Writes a prefix's keys and values as asides, a pair per layer. Inputs: flat values or a network's tensors."""

    dtype: DType
    prefix: Prefix

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The input tensors."""
        values = self.prefix.values
        if isinstance(values, TensorRef):
            return (values,)
        return values.embedding, *_projection_refs(values.first), *_projection_refs(values.second)

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Runs the network, if there is one, and splits the result by layers."""
        import torch

        values = self.prefix.values
        if isinstance(values, Network):
            first, second = dense(*inputs[1:3]), dense(*inputs[3:5])
            flat = keys_and_values(inputs[0], first, second, function(values.non_linearity))
        else:
            flat = inputs[0].to("cpu", torch.float64)
        states = flat.view(self.prefix.length, -1, self.prefix.width)  # (length, 2 · layers, width)
        return aside(list(states.unbind(1)), self.dtype, self.refs)


@dataclass(frozen=True)
class Embedding:
    """Writes a prompt's embedding as an aside."""

    dtype: DType
    ref: TensorRef

    def __call__(self, *inputs: torch.Tensor) -> Outcome:
        """Casts it to the model's dtype."""
        import torch

        return aside([inputs[0].to("cpu", torch.float64)], self.dtype, (self.ref,))


def aside(exact: Sequence[torch.Tensor], dtype: DType, refs: Sequence[TensorRef]) -> Outcome:
    """Rounds float64 tensors once, for the second output; `refs` are the adapter's tensors behind them."""
    results = tuple(round_once(tensor.contiguous(), dtype) for tensor in exact)
    for result in results:
        _check(result, refs[0].name)
    return Outcome((), {f"adapter:{ref.name}": Fate.GRAFTED for ref in refs}, asides=results)


def changed(name: str, before: torch.Tensor, result: torch.Tensor, fate: Fate) -> Outcome:
    """The outcome for a changed tensor of the base."""
    _check(result, name)
    old, new = tensor_hash(before), tensor_hash(result)
    return Outcome((result,), {name: fate}, MergeFigures({name: old}, {name: new}, changed=old != new))


def _check(result: torch.Tensor, name: str) -> None:
    import torch

    if not bool(torch.isfinite(result).all()):
        if result.dtype == torch.float16:
            raise out_of_range(name, result.dtype)
        check_finite(result, name)
