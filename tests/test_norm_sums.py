"""Sums of norms: short runs in the type of the arithmetic, joined in float64, in an order that sizes alone decide."""

import numpy as np
import pytest
import torch
from contract import DTYPES, exact, same_bits
from norms import assert_norm, exact_norm, gradients, in_every_type, reduced, rounding_share
from targets import interpreted, over_kernels, thorough

INF, NAN = float("inf"), float("nan")
NARROWER = [torch.float32, torch.bfloat16, torch.float16]
CHUNK = 1 << 16  # as many elements, or more, as a chunk of any backend has

over_orders = pytest.mark.parametrize("norm_type", [1.0, 2.0, INF])
over_narrower = pytest.mark.parametrize("dtype", NARROWER, ids=["float32", "bfloat16", "float16"])
never_interpreted = interpreted(lambda **_: False)


def placed(x, dtype, offset, device):
    return torch.empty(x.numel() + offset, dtype=dtype, device=device)[offset:].copy_(x)


# The order of sums


@never_interpreted
@over_kernels
@over_orders
@pytest.mark.parametrize("numel", [1, 7, 9, 127, 1029, 2047, 2056, 8192, CHUNK + 33, 2 * CHUNK + 2055])
def test_types_and_places_change_no_bit(target, norm_type, numel):
    x = in_every_type(numel)
    total, _ = reduced(target, [x.to(target.device)], norm_type)
    for dtype in NARROWER:
        for offset in (0, 1, 3, 8):
            assert same_bits(reduced(target, [placed(x, dtype, offset, target.device)], norm_type)[0], total)


@over_kernels
@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_another_order_has_other_bits(target, norm_type):
    """Or else the other tests of the order would pass whatever it is."""
    x = in_every_type(3001).to(target.device)
    total, _ = reduced(target, [x], norm_type)
    moved = [reduced(target, [x.roll(places)], norm_type)[0] for places in (1, 2, 4, 8, 16, 100)]
    assert not all(same_bits(other, total) for other in moved)


@never_interpreted
@over_kernels
def test_types_of_rows_change_no_bit(target):
    x = [in_every_type(numel).to(target.device) for numel in (5, CHUNK + 9, 1, 2000, 3 * CHUNK, 64)]
    mixed = [y.to(dtype) for y, dtype in zip(x, 2 * NARROWER, strict=True)]
    assert all(map(same_bits, reduced(target, mixed), reduced(target, x)))


@never_interpreted
@over_kernels
@over_orders
@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 1100])
def test_norms_of_many_rows(target, norm_type, rows):
    tensors = [in_every_type(1 + i % 3).to(target.device) for i in range(rows)]
    total, norms = reduced(target, tensors, norm_type)
    for got, its in zip([total, *norms], [tensors, *([x] for x in tensors)], strict=True):
        assert_norm(target, got, its, norm_type)


# How exact they are

# Of GPT-2: the attention of a layer, and its norms.
LAYER = [768 * 2304, 2304, 768 * 768, 768, 768, 768, 768, 768]


@never_interpreted
@thorough(lambda dtype, norm_type, **_: dtype != torch.float32 or norm_type == INF)
@over_kernels
@over_orders
def test_norms_of_gradients(target, dtype, norm_type):
    tensors = [x.to(target.device) for x in gradients(dtype, LAYER)]
    assert rounding_share(target, norm_type) < 1e-6
    for got, its in zip(reduced(target, tensors, norm_type), [tensors, tensors[:1]], strict=True):
        assert_norm(target, got.reshape(-1)[0], its, norm_type)


@never_interpreted
@over_kernels
@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_norms_of_equal_numbers(target, norm_type):
    """Their sums are rounded in one direction again and again: runs must not be longer than their bound says."""
    tensors = [torch.full((70_001,), 1 + i / 37, device=target.device) for i in range(37)]
    for got, its in zip(reduced(target, tensors, norm_type)[1], tensors, strict=True):
        assert_norm(target, got, [its], norm_type)


@over_kernels
@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_a_millionth_is_noticed(target, norm_type):
    tensors = [x.to(target.device) for x in gradients(torch.float32, [3000, 5])]
    total, _ = reduced(target, tensors, norm_type)
    assert_norm(target, total, tensors, norm_type)
    for factor in (1 - 1e-6, 1 + 1e-6):
        with pytest.raises(AssertionError, match="is allowed"):
            assert_norm(target, factor * total, tensors, norm_type)


@over_kernels
def test_what_a_run_is_joined_with_is_not_lost(target):
    """Next to 1, float32 loses each of these squares, which are less than 2^-24. They are in other runs."""
    x = torch.zeros(2048, device=target.device)
    x[0] = 1.0
    x[[11 + 256 * i for i in range(1, 8)]] = 3 * 2.0**-14
    total, _ = reduced(target, [x])
    assert total.item() ** 2 == pytest.approx(1 + 7 * 9 * 2.0**-28, rel=1e-14)


# Numbers of which float32 does not hold the squares or the sums

EXTREMES = [1e-45, 1e-38, 1e-30, 1e-23, 2.0**-66, 3e-20, 2.0**-50, 1e19, 1e20, 1e30, 3e38]
NUMEL = 8192 + 100


def scaled(size, dtype=torch.float32, numel=NUMEL):
    return (size * (0.5 + torch.rand(numel, dtype=torch.float64) / 2)).to(dtype)


@never_interpreted
@thorough(lambda dtype, size, **_: dtype == torch.bfloat16 and size not in (1e-23, 1e20))
@over_kernels
@over_orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", EXTREMES, ids=str)
def test_tiny_and_huge_numbers(target, size, norm_type, dtype):
    """Alone, beside others in the same chunk, and in another chunk or row."""
    alone = scaled(size, dtype)
    with_one = alone.clone()
    with_one[4000] = 3.0
    several = torch.cat([scaled(size, dtype, CHUNK), scaled(1.0, dtype)])
    tensors = [x.to(target.device) for x in (alone, with_one, several, scaled(1.0, dtype), scaled(size, dtype, 3))]
    total, norms = reduced(target, tensors, norm_type)
    for got, its in zip([total, *norms], [tensors, *([x] for x in tensors)], strict=True):
        assert_norm(target, got, its, norm_type)


@never_interpreted
@over_kernels
@pytest.mark.parametrize("exponent", [*range(-76, -49, 2), *range(54, 71, 2)])
def test_squares_that_float32_rounds_to_multiples_of_its_smallest_number(target, exponent):
    """All by the same, so that the loss is not averaged away."""
    tensors = [torch.full((numel,), 1.0009 * 2.0**exponent, device=target.device) for numel in (1, 100, NUMEL)]
    _, norms = reduced(target, tensors)
    for got, x in zip(norms, tensors, strict=True):
        assert_norm(target, got, [x])


@over_kernels
@pytest.mark.parametrize("end", ["smallest", "largest"])
def test_which_chunks_are_gathered_again(target, end):
    """Powers of two change no mantissa of a sum in float32. In float64 it has another one."""
    x = 1 + torch.rand(1000, dtype=torch.float64).float().to(target.device)
    x[0] = 1.9
    square = exact_norm([x]) ** 2
    in_float32 = reduced(target, [x])[0]
    assert abs(exact(in_float32) - np.sqrt(square)) > 2.0**-45  # or nothing could be seen
    # The least sum that is at least 2^-100. A sum of 1000 squares, less than 4 each, that is below 2^128; then
    # squares that are not.
    least = int(np.ceil((-100 - np.log2(square)) / 2))
    cases = {"smallest": {least + 1: 0, least: 0, least - 1: 1}, "largest": {57: 0, 58: 0, 64: 1}}
    for exponent, again in cases[end].items():
        total = reduced(target, [x * 2.0**exponent])[0] * 2.0**-exponent
        assert same_bits(total, in_float32) != again, exponent
        assert again == (abs(exact(total) - np.sqrt(square)) <= 2.0**-50 * np.sqrt(square))


@over_kernels
@over_narrower
@over_orders
def test_zeros(target, dtype, norm_type):
    tensors = [torch.zeros(numel, dtype=dtype, device=target.device) for numel in (NUMEL, 1, 0)]
    total, norms = reduced(target, [tensors[0], -tensors[1], tensors[2]], norm_type)
    assert same_bits(total, torch.zeros_like(total))
    assert same_bits(norms, torch.zeros_like(norms))


@over_kernels
@over_orders
@pytest.mark.parametrize("size", [0.0, 1e-23, 1.0, 1e20])
@pytest.mark.parametrize(
    ("bad", "result"), [((INF,), INF), ((-INF,), INF), ((NAN,), NAN), ((INF, NAN), NAN), ((NAN, INF), NAN)], ids=str
)
def test_what_is_not_finite_stays_so(target, size, norm_type, bad, result):
    for first in (0, 4000, NUMEL - 2):
        x = scaled(size)
        x[first : first + len(bad)] = torch.tensor(bad)
        total, norms = reduced(target, [x.to(target.device), scaled(1.0).to(target.device)], norm_type)
        assert [str(total.item()), str(norms[0].item())] == [str(result)] * 2
        assert norms[1].isfinite()


def test_every_type_is_among_these():
    assert {*NARROWER, torch.float64} == set(DTYPES)
