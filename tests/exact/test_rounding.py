"""Products whose bits depend on nothing but their factors, and one rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.spec import DType
from formats.tensors import torch_dtype
from surgery.exact.certain import CertainSum
from surgery.exact.rounded_sum import add_rounded
from surgery.exact.rounding import StackedProducts, exact_product, fixed_point_bits, round_once

pytestmark = pytest.mark.processor

SHAPES = {
    DType.BF16: (8, -126, 127),
    DType.F16: (11, -14, 15),
    DType.F8_E4M3: (4, -6, 8),
    DType.F8_E5M2: (3, -14, 15),
}  # significand bits, exponents of normal numbers


def nearest(values: np.ndarray, dtype: DType) -> np.ndarray:
    """Round to nearest, ties to even, by scaling to integers: independent of any conversion."""
    bits, lowest, _ = SHAPES[dtype]
    _, exponent = np.frexp(values)
    unit = np.maximum(exponent - bits, lowest + 1 - bits)
    return np.ldexp(np.rint(np.ldexp(values, -unit)), unit)


@pytest.mark.parametrize("dtype", SHAPES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_rounding_is_to_nearest_even_also_next_to_ties(dtype: DType, seed: int) -> None:
    """Values on ties, a hair beside them, subnormal ones: never rounded twice."""
    bits, lowest, highest = SHAPES[dtype]
    generator = np.random.default_rng(seed)
    exponents = generator.integers(lowest - bits, highest - 1, 2000)
    ties = np.ldexp(generator.integers(1 << bits, 2 << bits, 2000) * generator.choice([-1, 1], 2000), exponents - bits)
    hairs = generator.choice([0.0, 1e-13, -1e-13, 1e-9, 0.3], 2000)
    values = ties * (1 + hairs)
    ours = round_once(torch.from_numpy(values), dtype).double().numpy()
    assert np.array_equal(ours, nearest(values, dtype))


def test_torch_itself_rounds_twice() -> None:
    """The reason for round_once: this value is nearer to the lower bfloat16, torch gives the upper."""
    value = torch.tensor([1 + 2.0**-8 - 2.0**-40], dtype=torch.float64)
    assert value.to(torch.bfloat16).item() == 1.0  # 1 + 2^-8 ties to even, 1.0 happens to be right
    value = torch.tensor([1 + 3 * 2.0**-8 - 2.0**-40], dtype=torch.float64)
    assert value.to(torch.bfloat16).item() == 1 + 2.0**-6
    assert round_once(value, DType.BF16).item() == 1 + 2.0**-7


def test_infinities_and_overflow_pass_through() -> None:
    """Beyond the range is Inf, NaN stays NaN: for the caller to report."""
    values = torch.tensor([1e300, -1e300, float("inf"), float("nan"), 0.0, -0.0], dtype=torch.float64)
    for dtype in (DType.BF16, DType.F16, DType.F32):
        rounded = round_once(values, dtype).double()
        assert rounded[:3].tolist() == [float("inf"), float("-inf"), float("inf")]
        assert rounded[3].isnan()
        assert torch.signbit(rounded[5])


@pytest.mark.parametrize(("dtype", "limit"), [(DType.F8_E4M3, 464.0), (DType.F8_E5M2, 61440.0)])
def test_beyond_float8_is_never_its_largest_number(dtype: DType, limit: float) -> None:
    """Whatever this version of torch makes of it: up to the limit it rounds, from there on it is not finite."""
    inside = limit if dtype is DType.F8_E4M3 else math.nextafter(limit, 0)
    values = torch.tensor([inside, -inside, math.nextafter(limit, math.inf), -2 * limit, math.inf], dtype=torch.float64)
    rounded = round_once(values, dtype).float()
    assert rounded[:2].abs().tolist() == [torch.finfo(rounded_dtype(dtype)).max] * 2
    assert not bool(rounded[2:].isfinite().any())


def rounded_dtype(dtype: DType) -> torch.dtype:
    """torch's."""
    return torch.float8_e4m3fn if dtype is DType.F8_E4M3 else torch.float8_e5m2


@given(seed=st.integers(0, 10_000), terms=st.sampled_from([1, 7, 512, 513, 1100]))
@settings(max_examples=20, deadline=None)
def test_order_of_terms_blocks_and_threads_do_not_show(seed: int, terms: int) -> None:
    """Permuting the terms within a chunk, other row blocks, another thread count: the same bits."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(33, terms, generator=generator)
    right = torch.randn(terms, 29, generator=generator)
    whole = exact_product(left, right, 0.3).rows(0, 33)
    first = torch.randperm(min(terms, 512), generator=generator)
    order = torch.cat([first, torch.arange(min(terms, 512), terms)])
    shuffled = exact_product(left[:, order], right[order], 0.3)
    pieces = torch.cat([shuffled.rows(begin, min(33, begin + 5)) for begin in range(0, 33, 5)])
    assert torch.equal(pieces, whole)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(exact_product(left, right, 0.3).rows(0, 33), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("terms", "bits"), [(1, 26), (2, 26), (16, 24), (32, 24), (33, 23), (512, 22), (9000, 22)])
def test_a_sum_of_products_fits_float64(terms: int, bits: int) -> None:
    """As many bits as possible, and not one more: 2 bits + log2(terms) is at most 53."""
    assert fixed_point_bits(terms) == bits
    assert 2 * bits + math.log2(min(terms, 512)) <= 53


def test_the_product_is_right_to_its_bits() -> None:
    """Against float64: the error is bounded by the fixed point's."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 16, generator=generator), torch.randn(16, 80, generator=generator)
    exact = left.double() @ right.double()
    error = (exact_product(left, right, 1.0).rows(0, 64) - exact).abs()
    assert float((error / exact.abs().amax()).max()) < 16 * 2.0**-24


def test_lines_of_zeros_and_wild_scales_stay_exact() -> None:
    """Rows from 1e-30 to 1e30, and a row of zeros: powers of two pass through untouched."""
    left = torch.tensor([[0.0], [2.0**-100], [2.0**100]])
    right = torch.tensor([[1.0, 2.0**-20, 0.0]])
    expected = left.double() @ right.double()
    assert torch.equal(exact_product(left, right, 1.0).rows(0, 3), expected)


def test_add_rounded_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time or all at once."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 23, generator=generator).to(torch.bfloat16)
    deltas = [exact_product(torch.randn(37, 4), torch.randn(4, 23), 0.5) for _ in range(2)]
    whole = add_rounded(weight, deltas, DType.BF16)
    monkeypatch.setattr("surgery.exact.rounding._BLOCK_ELEMENTS", 1)
    monkeypatch.setattr("surgery.exact.rounded_sum.BLOCK_ELEMENTS", 1)
    assert torch.equal(add_rounded(weight, deltas, DType.BF16), whole)


@given(heights=st.integers(1, 5), stack=st.integers(1, 4), data=st.data())
@settings(max_examples=30, deadline=None)
def test_stacked_products_are_the_same_by_any_blocks(heights: int, stack: int, data: st.DataObject) -> None:
    """Rows across the border of two experts are those of one and of the other."""
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(heights, 2, generator=generator), torch.randn(2, 3, generator=generator))] * stack
    stacked = StackedProducts(tuple(exact_product(left, right, 0.5) for left, right in pairs))
    whole = torch.cat([product.rows(0, heights) for product in stacked.products])
    begin = data.draw(st.integers(0, heights * stack - 1))
    end = data.draw(st.integers(begin + 1, heights * stack))
    assert torch.equal(stacked.rows(begin, end), whole[begin:end])


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
@pytest.mark.parametrize("terms", [1, 16, 120])
@pytest.mark.parametrize("size", [1e-36, 1e-8, 1e-2, 10.0])
def test_what_float32_decides_has_the_bits_of_float64(dtype: DType, terms: int, size: float) -> None:
    """Row by row in float64 against blocks in float32, for deltas from nothing to larger than the weight."""
    torch.manual_seed(terms)
    weight = (torch.randn(70, 257) * 0.02).to(torch_dtype(dtype))
    weight[3] = 0
    weight[4] = -0.0
    weight[5, :7] = 3e4
    products = [
        exact_product(torch.randn(70, terms) * 0.02, torch.randn(terms, 257) * size, scale) for scale in (0.3, -1.7)
    ]
    exact = weight.double() + (products[0].rows(0, 70) + products[1].rows(0, 70))
    assert torch.equal(
        add_rounded(weight, products, dtype).view(torch.int16), round_once(exact, dtype).view(torch.int16)
    )


def test_float32_decides_nearly_everything() -> None:
    """Of a weight and a delta as they are found: but for two in a thousand."""
    torch.manual_seed(0)
    weight = (torch.randn(64, 512) * 0.02).bfloat16()
    product = exact_product(torch.randn(64, 16).bfloat16() * 0.02, torch.randn(16, 512).bfloat16() * 0.02, 0.5)
    left = CertainSum([product], DType.BF16).round(weight, 0, torch.empty_like(weight))
    assert left is not None
    assert len(left) < 0.002 * weight.numel()


@pytest.mark.parametrize("value", [math.inf, math.nan, 3e38])
def test_float32_decides_nothing_beyond_its_range(value: float) -> None:
    """There float64 does, and what overflows on the way comes back."""
    weight = torch.full((4, 8), value, dtype=torch.float64)
    products = [exact_product(torch.full((4, 1), 1e38), torch.ones(1, 8), scale) for scale in (1.0, -1.0)]
    assert CertainSum(products, DType.BF16).round(weight, 0, torch.empty(4, 8, dtype=torch.bfloat16)) is None
    torch.testing.assert_close(
        add_rounded(weight, products, DType.BF16), torch.full((4, 8), value).bfloat16(), equal_nan=True
    )


def test_factors_too_small_for_float32_are_not_lost() -> None:
    """A tiny factor times a huge one."""
    torch.manual_seed(2)
    weight = (torch.randn(64, 64) * 1e-5).bfloat16()
    products = [exact_product(torch.randn(64, 2) * 1e-42, torch.randn(2, 64) * 1e37, 1.0)]
    exact = weight.double() + products[0].rows(0, 64)
    assert torch.equal(add_rounded(weight, products, DType.BF16), round_once(exact, DType.BF16))


def test_float32_that_is_none_is_not_trusted() -> None:
    """Where somebody lets torch take less for float32."""
    product = exact_product(torch.ones(4, 1), torch.ones(1, 8), 1.0)
    assert CertainSum.serves([product], DType.BF16)
    torch.set_float32_matmul_precision("medium")
    try:
        assert not CertainSum.serves([product], DType.BF16)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_stacks_are_added_product_by_product() -> None:
    """With the bits they have as one."""
    torch.manual_seed(1)
    weight = (torch.randn(3, 5, 7) * 0.02).bfloat16()
    stack = StackedProducts(tuple(exact_product(torch.randn(5, 2), torch.randn(2, 7) * 0.01, 0.5) for _ in range(3)))
    exact = weight.view(15, 7).double() + stack.rows(0, 15)
    assert torch.equal(add_rounded(weight, [stack], DType.BF16).view(15, 7), round_once(exact, DType.BF16))
