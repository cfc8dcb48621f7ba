"""Sums of Triton kernels: short runs in the type of arithmetic, joined in float64, in an order that sizes decide."""

import pytest
import torch
from contract import same_bits
from norms import assert_norm, gradients, in_every_type
from norms import reduced as reduced_by
from targets import Target
from triton_fixtures import BFLOAT16, FLOAT16, FLOAT32, INF, NAN

from trainops.adapters import _triton, triton

CHUNK = 8192
NARROWER = [FLOAT32, BFLOAT16, FLOAT16]


@pytest.fixture(autouse=True)
def blocks_as_on_gpus(monkeypatch):
    """The interpreter has larger ones in other tests, of the same size for every type."""
    common = _triton.kernels()._common
    monkeypatch.setattr(common, "block_numel", lambda *sizes: common.THREADS * 16 // min(sizes))


def target_of(tensors):
    return Target("triton", tensors[0].device.type)


def reduced(norm_type, tensors):
    return reduced_by(target_of(tensors), tensors, norm_type)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, INF])
@pytest.mark.parametrize("numel", [5, 1029, CHUNK, 2 * CHUNK + 1500])
def test_the_same_values_have_the_same_norm_in_every_type_and_place(device, norm_type, numel):
    x = in_every_type(numel)
    expected = reduced(norm_type, [x.to(device)])
    for dtype in NARROWER:
        for offset in (0, 1, 8):
            placed = torch.empty(numel + offset, dtype=dtype, device=device)[offset:].copy_(x)
            assert all(map(same_bits, reduced(norm_type, [placed]), expected))


def test_a_total_is_that_of_its_rows_in_their_order(device):
    """Rows of one type are launched together, but not joined before others."""
    sizes = [7, CHUNK + 3, 130, 2 * CHUNK, 1, 999]
    x = [in_every_type(size).to(device) * 3.0**i for i, size in enumerate(sizes)]
    x = [y.to(BFLOAT16).float() for y in x]
    mixed = [y.to(BFLOAT16) if i % 2 else y for i, y in enumerate(x)]
    assert all(map(same_bits, reduced(2.0, mixed), reduced(2.0, x)))


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_norms_of_gradients_are_as_exact_as_their_runs(device, dtype, norm_type):
    tensors = [x.to(device) for x in gradients(dtype, [768, 3 * CHUNK + 77, 2304, 50_257, 64, CHUNK])]
    total, norms = reduced(norm_type, tensors)
    for got, its in zip([total, *norms], [tensors, *([x] for x in tensors)], strict=True):
        assert_norm(target_of(tensors), got, its, norm_type)


def test_what_a_run_is_joined_with_is_not_lost(device):
    """Next to 1, float32 loses each of these squares, which are less than 2^-24."""
    x = torch.zeros(CHUNK, device=device)
    x[0] = 1.0
    x[[8 << i for i in range(7)]] = 3 * 2.0**-14
    total, _ = reduced(2.0, [x])
    assert total.item() ** 2 == pytest.approx(1 + 7 * 9 * 2.0**-28, rel=1e-14)


def test_which_chunks_are_gathered_again(monkeypatch, device):
    """Only those whose sum is infinite or tiny: each is read once more."""
    if triton.refusal(torch.device("cpu")):
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
