"""Sums of Triton kernels: short runs in the type of arithmetic, joined in float64, in an order that sizes decide."""

import numpy as np
import pytest
import torch
from contract import exact, same_bits
from exact import norm as exact_norm
from triton_fixtures import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INF, NAN

from trainops.adapters import _triton, triton

CHUNK = 8192
ORDERS = {"l1_norm": 1.0, "l2_norm": 2.0, "inf_norm": np.inf}
NARROWER = [FLOAT32, BFLOAT16, FLOAT16]


@pytest.fixture(autouse=True)
def blocks_as_on_gpus(monkeypatch):
    """The interpreter has larger ones in other tests, of the same size for every type."""
    common = _triton.kernels()._common
    monkeypatch.setattr(common, "block_numel", lambda *sizes: common.THREADS * 16 // min(sizes))


def reduced(statistic, tensors):
    """The results in float64: a float64 number, which adds nothing, lets them be so."""
    zero = torch.zeros(1, dtype=FLOAT64, device=tensors[0].device)
    total, norms = triton.reduce(statistic, [*tensors, zero])
    assert total.dtype == norms.dtype == FLOAT64
    return total, norms[:-1]


def in_every_type(numel):
    """Numbers that bfloat16 and float16 hold, so far from each other that float64 rounds the sum of their squares."""
    x = torch.randn(numel).to(BFLOAT16).float()
    return torch.where(x.abs() < 2.0**-6, 1.0, x) * 2.0 ** torch.randint(-8, 13, x.shape)


@pytest.mark.parametrize("statistic", ORDERS)
@pytest.mark.parametrize("numel", [5, 1029, CHUNK, 2 * CHUNK + 1500])
def test_the_same_values_have_the_same_norm_in_every_type_and_place(device, statistic, numel):
    x = in_every_type(numel)
    expected = reduced(statistic, [x.to(device)])
    for dtype in NARROWER:
        for offset in (0, 1, 8):
            placed = torch.empty(numel + offset, dtype=dtype, device=device)[offset:].copy_(x)
            assert all(map(same_bits, reduced(statistic, [placed]), expected))


def test_a_total_is_that_of_its_rows_in_their_order(device):
    """Rows of one type are launched together, but not joined before others."""
    sizes = [7, CHUNK + 3, 130, 2 * CHUNK, 1, 999]
    x = [in_every_type(size).to(device) * 3.0**i for i, size in enumerate(sizes)]
    x = [y.to(BFLOAT16).float() for y in x]
    mixed = [y.to(BFLOAT16) if i % 2 else y for i, y in enumerate(x)]
    assert all(map(same_bits, reduced("l2_norm", mixed), reduced("l2_norm", x)))


# An element of a run of n is rounded when it is squared, and in at most n - 1 sums; then the sum is joined three
# times. Each rounding is off by 2^-24 at most, and what is joined in float64 by nothing that counts.
ROUNDINGS = 1 + (CHUNK // 1024 - 1) + 3


def gradients(dtype):
    """As those of a language model: each tensor has its own scale, and few elements are much larger than others."""
    scales = 10.0 ** torch.linspace(-7, -1, 6, dtype=FLOAT64)
    sizes = [768, 3 * CHUNK + 77, 2304, 50_257, 64, CHUNK]
    draws = (torch.randn(size, dtype=FLOAT64) * torch.randn(size, dtype=FLOAT64).exp() for size in sizes)
    return [(scale * x).to(dtype) for scale, x in zip(scales, draws, strict=True)]


@pytest.mark.parametrize("statistic", ["l1_norm", "l2_norm"])
def test_norms_of_gradients_are_as_exact_as_their_runs(device, dtype, statistic):
    tensors = [x.to(device) for x in gradients(dtype)]
    total, norms = reduced(statistic, tensors)
    roundings = ROUNDINGS / 2 if statistic == "l2_norm" else ROUNDINGS - 1
    allowed = 2.0**-50 if dtype == FLOAT64 else roundings * 2.0**-24
    assert allowed < 1e-6
    for got, its in zip([total, *norms], [tensors, *([x] for x in tensors)], strict=True):
        true = exact_norm([exact(x) for x in its], ORDERS[statistic])
        assert abs(exact(got) - true) <= allowed * true


def test_what_a_run_is_joined_with_is_not_lost(device):
    """Next to 1, float32 loses each of these squares, which are less than 2^-24."""
    x = torch.zeros(CHUNK, device=device)
    x[0] = 1.0
    x[[8 << i for i in range(7)]] = 3 * 2.0**-14
    total, _ = reduced("l2_norm", [x])
    assert total.item() ** 2 == pytest.approx(1 + 7 * 9 * 2.0**-28, rel=1e-14)


# Numbers of which float32 does not hold the squares or the sums.

EXTREMES = [1e-30, 1e-23, 3e-20, 2.0**-50, 2.0**-51, 1e19, 1e20, 1e30, 2e34, 3e38]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("statistic", ["l1_norm", "l2_norm"])
@pytest.mark.parametrize("size", EXTREMES, ids=str)
def test_norms_of_tiny_and_huge_numbers(device, size, statistic, dtype):
    x = (size * torch.rand(CHUNK + 100, dtype=FLOAT64)).to(dtype)
    x[CHUNK:] = 1.0  # another chunk, which is gathered once
    total, _ = reduced(statistic, [x.to(device)])
    assert total.item() == pytest.approx(float(exact_norm([exact(x)], ORDERS[statistic])), rel=1e-6)
    _, (norm,) = reduced(statistic, [x[:CHUNK].to(device)])
    assert norm.item() == pytest.approx(float(exact_norm([exact(x[:CHUNK])], ORDERS[statistic])), rel=1e-6)


@pytest.mark.parametrize("statistic", ["l1_norm", "l2_norm"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize(
    ("bad", "result"), [((INF,), INF), ((NAN,), NAN), ((INF, NAN), NAN), ((-INF,), INF)], ids=str
)
def test_what_is_not_finite_stays_so(device, size, statistic, bad, result):
    x = torch.full((CHUNK + 5,), size, device=device)
    x[[100 + 1000 * i for i in range(len(bad))]] = torch.tensor(bad, device=device)
    total, _ = triton.reduce(statistic, [x])
    assert str(total.item()) == str(result)


def test_which_chunks_are_gathered_again(monkeypatch, device):
    """Only those whose sum is infinite or tiny: each is read once more."""
    if not triton.serves("cpu"):
        pytest.skip("the interpreter alone can count")
    reduce, loads = _triton.kernels().reduce, []
    gather = reduce.gather_chunk

    def counted(*args, **kwargs):
        loads.append(args)
        return gather(*args, **kwargs)

    monkeypatch.setattr(reduce, "gather_chunk", counted)
    for size, reads in ((1.0, 1), (2.0**-55, 1), (1e-18, 2), (1e20, 2), (NAN, 1)):
        loads.clear()
        triton.reduce("l2_norm", [torch.full((CHUNK,), size)])
        assert len(loads) == reads, size
