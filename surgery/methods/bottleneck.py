"""Bottleneck adapters, h + s·U f(D x) with biases (Houlsby et al., arXiv 1902.00751; He et al., arXiv 2110.04366).

Computes the part of an adapter that goes into the weights W (out, in) and b (out) of h = W x + b. Everything is
float64, with bits that do not depend on the order of summation. Tensors in, tensors out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.exact.fixed_order import matmul

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Matrices:
    """A bottleneck up f(down x + down_bias) + up_bias, with its scaling multiplied in; all float64 on the CPU.

    Attributes:
        down: D (rank, width).
        down_bias: (rank).
        up: sU (out, rank).
        up_bias: (out).
    """

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor

    def scaled(self, scaling: float | torch.Tensor) -> Matrices:
        """The bottleneck times a number, a tensor (1), or a tensor (out) with one value per output."""
        if not isinstance(scaling, float):
            scaling = _wide(scaling)
        column = scaling if isinstance(scaling, float) else scaling[:, None]
        return replace(self, up=self.up * column, up_bias=(self.up_bias * scaling).expand(self.up_bias.shape))

    def through_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """(I + sUD) W for columns of W, if f is linear.  # (out, n) float64"""
        weight = _wide(weight)
        return weight + matmul(self.up, matmul(self.down, weight))  # (out, rank) @ (rank, n)

    def through_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """(I + sUD) b + s(U·b_D + b_U), if f is linear.  # (out) float64"""
        bias = _wide(bias)
        return bias + _apply(self.up, _apply(self.down, bias) + self.down_bias) + self.up_bias

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """DW for columns of W: it maps x to what D makes of h = W x.  # (rank, n) float64"""
        return matmul(self.down, weight)

    def before(self, rows: torch.Tensor, bias: torch.Tensor | None) -> Matrices:
        """The same branch with x rather than h as input, for any f: D h + b_D = (DW) x + (D b + b_D).

        Args:
            rows: all of DW.
            bias: b; None if there is none.
        """
        down_bias = self.down_bias if bias is None else _apply(self.down, _wide(bias)) + self.down_bias
        return replace(self, down=rows, down_bias=down_bias)

    def split(self) -> Matrices:
        """The branch with twice the width and g instead of a linear f, where g(z) − g(−z) = z: [D; −D] and
        [sU, −sU]."""
        import torch

        return Matrices(
            torch.cat([self.down, -self.down]),
            torch.cat([self.down_bias, -self.down_bias]),
            torch.cat([self.up, -self.up], 1),
            self.up_bias,
        )


def dense(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A projection (out, in) and its bias in float64."""
    return _wide(weight), _wide(bias)


def hypercomplex(
    rule: torch.Tensor, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A compacter's projection as a dense matrix, (Σᵢ ruleᵢ ⊗ (leftᵢ rightᵢ))ᵀ, and its bias (arXiv 2106.04647,
    equation 5).

    Args:
        rule: (n, n, n).
        left, right: (n, in / n, rank) and (n, rank, out / n).
        bias: (out); None for zeros.

    Returns:
        (out, in) and (out) float64.
    """
    import torch

    blocks, rule = matmul(_wide(left), _wide(right)), _wide(rule)  # (n, in / n, out / n)
    total = torch.kron(rule[0], blocks[0])
    for one, block in zip(rule[1:], blocks[1:], strict=True):
        total += torch.kron(one, block)
    weight = total.mT.contiguous()  # (out, in)
    return weight, weight.new_zeros(len(weight)) if bias is None else _wide(bias)


def keys_and_values(
    embedding: torch.Tensor,
    first: tuple[torch.Tensor, torch.Tensor],
    second: tuple[torch.Tensor, torch.Tensor],
    f: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The output of a prefix's network, second(f(first(embedding))) (arXiv 2101.00190).

    Args:
        embedding: (length, width).
        first, second: weight (out, in) and bias (out) of each projection.
        f: an elementwise function.

    Returns:
        (length, outputs of the second projection) float64.
    """
    hidden = f(matmul(_wide(embedding), first[0].mT) + _wide(first[1]))  # (length, hidden)
    return matmul(hidden, second[0].mT) + _wide(second[1])


def _apply(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return matmul(matrix, vector[:, None])[:, 0]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.to("cpu", torch.float64)
