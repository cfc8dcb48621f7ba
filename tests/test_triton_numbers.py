"""Numbers that Triton kernels may meet: not finite, beyond float32, and all that 16 bits hold."""

import pytest
import torch
from contract import same_bits
from triton_fixtures import BFLOAT16, BLOCK, CHUNK, FLOAT16, FLOAT32, FLOAT64, INF, NAN, NORMS, NUMEL

import trainops
from trainops.adapters import pytorch, triton

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_norms_of_nonfinite_numbers(device, norm, bad):
    for place in (0, BLOCK - 1, CHUNK, NUMEL - 1):
        tensors = [torch.ones(3, device=device), torch.ones(NUMEL, device=device)]
        tensors[1][place] = bad
        total, norms = triton.reduce(norm, tensors)
        expected, each = pytorch.reduce(norm, tensors)
        torch.testing.assert_close(total, expected, equal_nan=True)
        torch.testing.assert_close(norms, each, equal_nan=True)


@pytest.mark.parametrize("kind", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_norms_whose_squares_float32_cannot_hold(device, kind):
    tensors = [torch.full((NUMEL,), 1e30, device=device, dtype=kind), torch.ones(3, device=device, dtype=kind)]
    total, norms = triton.reduce("l2_norm", tensors)
    expected = NUMEL**0.5 * tensors[0][0].item()
    assert total.item() == norms[0].item() == pytest.approx(expected, rel=1e-6)
    assert norms[1].item() == pytest.approx(3**0.5)


def every_number(narrow):
    """All numbers of 16 bits in float32, what lies midway between neighbours, and next to that."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(narrow)
    finite = numbers[numbers.isfinite()].double().unique()
    gaps = finite.diff()
    middle = torch.cat((finite[1:] - gaps / 2, finite[-1:] + gaps[-1:] / 2, finite[:1] - gaps[:1] / 2)).float()
    infinity = torch.full_like(middle, INF)
    small = torch.tensor([1, 2, 2**22, 2**23 - 1], dtype=torch.int32).view(FLOAT32)  # subnormal, also in bfloat16
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1], dtype=torch.int32).view(FLOAT32)
    others = torch.tensor([0.0, -0.0, INF, -INF, NAN, torch.finfo(FLOAT32).max, torch.finfo(narrow).max])
    near = (middle.nextafter(infinity), middle.nextafter(-infinity))
    return torch.cat((numbers.float(), middle, *near, small, -small, payloads, others))


@pytest.mark.parametrize("narrow", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("wide", [FLOAT32, FLOAT64], ids=["float32", "float64"])
def test_rounding_is_that_of_torch(device, divide, narrow, wide):
    """Of the interpreter too, which ``conftest.py`` corrects."""
    if triton._device_type() == "cpu":
        divide(16384, 16384)
    x = every_number(narrow).to(wide)
    if wide == FLOAT64:
        x = torch.cat([x * (1 + sign * 2.0**-40) for sign in (-1, 0, 1)])  # rounds to float32 first, as in torch
    rounded = torch.full_like(x, 3.0, dtype=narrow, device=device)
    trainops.ema_update_([rounded], [x.to(device)], 0.0, backend="triton")
    expected, rounded = x.to(narrow), rounded.cpu()
    assert torch.equal(rounded.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert same_bits(rounded[finite], expected[finite])


@pytest.mark.parametrize("narrow", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("wide", [FLOAT32, FLOAT64], ids=["float32", "float64"])
def test_16_bit_numbers_widen_exactly(device, divide, narrow, wide):
    if triton._device_type() == "cpu":
        divide(16384, 16384)
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(narrow)
    widened = torch.full_like(x, 3.0, dtype=wide, device=device)
    trainops.ema_update_([widened], [x.to(device)], 0.0, backend="triton")
    widened, numbers = widened.cpu(), ~x.isnan()
    assert same_bits(widened[numbers], x.to(wide)[numbers])
    assert widened[~numbers].isnan().all()
