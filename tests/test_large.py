"""More than 2**31 elements, which no 32-bit index can count. Left out unless asked for: ``pytest -m large``."""

import math
import os

import pytest
import torch
from contract import same_bits
from torch import nn

import trainops
from trainops.adapters import cpu, select

pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(not cpu.probe().available, reason=f"backend cpu: {cpu.probe().reason}"),
]

SAMPLES = 4
NUMEL = SAMPLES * (2**29 + 17_501)  # 2**31, a chunk of parallel work, and a tail

# Values repeat after so many elements: a prime, so that an index that is off by a power of two finds another value.
PERIOD = 9_973


def need_memory(tensors):
    """Skip the test unless there is room for so many tensors of bfloat16."""
    if not os.path.exists("/proc/meminfo"):
        pytest.skip("this system does not say how much memory is available")
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    if available < (needed := tensors * NUMEL * 2 + 2**29):
        pytest.skip(f"{needed / 2**30:.1f} GiB of memory are needed, {available / 2**30:.1f} are available")


def random_values(seed):
    return torch.randn(PERIOD, generator=torch.Generator().manual_seed(seed)).bfloat16()


def repeated(values):
    x = torch.empty(NUMEL, dtype=values.dtype)
    whole = NUMEL // PERIOD * PERIOD
    x[:whole].view(-1, PERIOD).copy_(values)
    x[whole:].copy_(values[: NUMEL - whole])
    return x


def assert_repeats(x, values, first=0):
    """Every element of ``x`` has the bits of its value, the values having been repeated from element ``first`` on."""
    block = values.roll(-(first % PERIOD)).repeat(1000)
    for part in x.split(len(block)):
        assert same_bits(part, block[: len(part)])


def repeated_norm(values):
    """The norm of ``repeated(values)``."""
    squares = values.double().square()
    whole, rest = divmod(NUMEL, PERIOD)
    return math.sqrt(whole * squares.sum().item() + squares[:rest].sum().item())


def test_adamw_step():
    need_memory(4)
    param, grad = random_values(1), random_values(2)
    steps = []
    for make in (repeated, torch.clone):
        p = nn.Parameter(make(param))
        p.grad = make(grad)
        optimizer = trainops.AdamW([p], lr=0.1, skip_nonfinite=True, backend="cpu")
        optimizer.step()
        steps.append((p.detach(), optimizer))
    (large, large_optimizer), (small, small_optimizer) = steps
    assert not same_bits(small, param)
    assert_repeats(large, small)
    [state], [small_state] = large_optimizer.state.values(), small_optimizer.state.values()
    for name in ("exp_avg", "exp_avg_sq"):
        assert_repeats(state[name], small_state[name])
    assert large_optimizer.grad_norm.item() == pytest.approx(repeated_norm(grad), rel=1e-6)


def test_ema_update():
    need_memory(2)
    average, param = random_values(1), random_values(2)
    large = repeated(average)
    trainops.ema_update_([large], [repeated(param)], 0.75, backend="cpu")
    small = average.clone()
    trainops.ema_update_([small], [param], 0.75, backend="cpu")
    assert not same_bits(small, average)
    assert_repeats(large, small)


def test_norms():
    need_memory(1)
    grad = torch.full((NUMEL,), 0.5, dtype=torch.bfloat16)
    for norm_type, true in ((2.0, 0.5 * math.sqrt(NUMEL)), (1.0, 0.5 * NUMEL), (math.inf, 0.5)):
        norm = trainops.get_total_norm([grad], norm_type, backend="cpu")
        assert norm.item() == pytest.approx(true, rel=1e-6)


def test_clipping():
    need_memory(2)
    values = random_values(1)
    large, small = (nn.Parameter(torch.empty(n, dtype=torch.bfloat16)) for n in (NUMEL, PERIOD))
    large.grad, small.grad = repeated(values), values.clone()
    norm = trainops.clip_grad_norm_([large], 1000.0, backend="cpu")
    assert norm.item() == pytest.approx(repeated_norm(values), rel=1e-6)
    trainops.clip_grads_with_norm_([small], 1000.0, norm, backend="cpu")
    assert not same_bits(small.grad, values)
    assert_repeats(large.grad, small.grad)

    bound = small.grad.abs().mean().item()
    for param in (large, small):
        trainops.clip_grad_value_([param], bound, backend="cpu")
    assert small.grad.abs().max() <= bound
    assert_repeats(large.grad, small.grad)


def test_drop_path_add():
    need_memory(3)
    residual, branch = random_values(1), random_values(2)
    kernels = select("cpu", "cpu")
    mask = torch.tensor([2.0, 0.0, 0.0, 2.0], dtype=torch.bfloat16).view(SAMPLES, 1)
    large = kernels.drop_path(repeated(branch).view(SAMPLES, -1), mask, repeated(residual).view(SAMPLES, -1))
    kept = kernels.drop_path(branch.view(1, -1), mask[:1], residual.view(1, -1))[0]
    assert not same_bits(kept, residual)
    for sample, expected in enumerate((kept, residual, residual, kept)):
        assert_repeats(large[sample], expected, first=sample * large[0].numel())
