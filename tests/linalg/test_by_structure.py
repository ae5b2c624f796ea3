"""ΔW by its structure: the same singular values as its dense form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from surgery.exact.rounding import Delta, Hadamard, Kronecker, RowsOf, exact_product
from surgery.linalg.by_structure import Form, KroneckerPair, Thin, factored, form_of, nothing, spectrum

pytestmark = pytest.mark.processor

CPU = torch.device("cpu")


def randn(*shape: int) -> torch.Tensor:
    """float64."""
    return torch.randn(*shape, dtype=torch.float64)


def product(rows: int, inner: int, columns: int, scale: float = 1.5):  # type: ignore[no-untyped-def]
    """A product in fixed point."""
    return exact_product(randn(rows, inner), randn(inner, columns), scale)


MADE: dict[str, tuple[Callable[[], Delta], int, type]] = {
    "product": (lambda: product(14, 3, 9), 14, Thin),
    "product of full rank": (lambda: product(14, 9, 9), 14, Thin),
    "element by element": (lambda: Hadamard(product(14, 2, 9), product(14, 3, 9)), 14, Thin),
    "element by element, rank above": (lambda: Hadamard(product(14, 4, 9), product(14, 3, 9)), 14, object),
    "kronecker": (lambda: Kronecker(randn(2, 3), randn(7, 3)), 14, KroneckerPair),
    "rows": (lambda: (lambda whole: RowsOf(9, lambda begin, end: whole[begin:end]))(randn(14, 9)), 14, object),
}


def made(name: str, turned: bool) -> tuple[torch.Tensor, Form]:
    """ΔW (out, in), dense in float64, and its form."""
    torch.manual_seed(3)
    build, rows, kind = MADE[name]
    delta = build()
    form = form_of(delta, rows, CPU, turned=turned)
    assert isinstance(form, kind)
    assert kind is not object or not isinstance(form, (Thin, KroneckerPair))
    dense = delta.rows(0, rows)
    return dense.mT if turned else dense, form


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_values_and_optimum_are_the_dense_ones(name: str, turned: bool) -> None:
    """At every rank: the residual is the optimum's, and the report's is that of the factors."""
    dense, form = made(name, turned)
    values = torch.linalg.svdvals(dense)
    found, total, complete = spectrum(form, len(values))
    assert complete
    assert total == pytest.approx(float(dense.square().sum()), rel=1e-6)
    torch.testing.assert_close(torch.tensor(found), values[: len(found)], rtol=1e-6, atol=1e-6)
    assert float(values[len(found) :].square().sum()) < 1e-12 * total
    for rank in (1, 2, len(found)):
        factors, _, exact = factored(form, rank, torch.float64)
        loss = float((dense - factors.lora_B.double() @ factors.lora_A.double()).norm() / dense.norm())
        optimum = float(values[rank:].norm() / values.norm())
        assert loss == pytest.approx(optimum, rel=1e-5, abs=2e-7)
        assert factors.residual == pytest.approx(loss, rel=1e-5, abs=2e-7)
        assert factors.rank == rank
        assert exact == (rank == len(found))


def test_more_rank_than_there_is_is_not_made_up() -> None:
    """The rank of a structure bounds that of its factors."""
    assert factored(made("product", False)[1], 8, torch.float32)[0].rank == 3
    assert factored(made("kronecker", False)[1], 8, torch.float32)[0].rank == 6


def test_nothing_is_nothing() -> None:
    """ΔW = 0: factors of zero, exact."""
    formed = form_of(RowsOf(4, lambda begin, end: torch.zeros(end - begin, 4).double()), 3, CPU, turned=False)
    for form in (nothing((3, 4)), formed):
        factors, total, exact = factored(form, 2, torch.float32)
        assert (factors.rank, total, exact) == (1, 0.0, True)
        assert not factors.lora_B.any()
        assert spectrum(form, 2)[1:] == (0.0, True)
