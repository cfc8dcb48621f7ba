"""What lies next to a tensor in memory is neither read nor written."""

import functools
from unittest import mock

import pytest
import torch
from contract import same_bits
from controls import kernels as reference
from controls import must_fail, with_columns
from exact import STATISTICS
from surroundings import MARGIN, Surrounded
from targets import REFERENCE, over_kernels

import trainops
from trainops.adapters import select

NUMELS = (1, 37, 4096 + 5, 8192, 8192 + 4096 + 3)


def step(kernels, target, tensors):
    """A step whose columns are the tensors, six to a row."""
    model = torch.nn.Module()
    model.params = torch.nn.ParameterList(torch.nn.Parameter(x) for x in tensors[::6])
    ema = trainops.EMA(model, 0.9, update_after_step=-2, backend=target.backend)
    options = {"lr": 0.1, "amsgrad": True, "max_grad_norm": 1.0, "skip_nonfinite": True}
    optimizer = trainops.AdamW(model.parameters(), **options, ema=ema, backend=target.backend)
    for row, (p, shadow) in enumerate(zip(model.params, ema.module.params, strict=True)):
        _, p.grad, *state, shadow.data = tensors[6 * row : 6 * row + 6]
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        optimizer.state[p] = {"step": torch.tensor(1.0, device=p.device), **dict(zip(names, state, strict=True))}
    optimizer.step()
    assert optimizer.skipped_steps == 0
    return [optimizer.grad_norm, optimizer.grad_norms]


def norms(kernels, target, tensors, orders=(1.0, 2.0)):
    results = []
    for order in orders:
        total, each = kernels.reduce(STATISTICS[order], tensors)
        true = torch.stack([torch.linalg.vector_norm(x.double(), order) for x in tensors])
        torch.testing.assert_close(each.double(), true, rtol=1e-5, atol=0)  # an element is 4e-5
        results += [total, each]
    return results


def scale(kernels, target, tensors):
    kernels.scale_(tensors, torch.tensor(0.5, device=target.device))


# What to do with so many tensors of each size.
OPS = {
    "step": (step, 6),
    "norms": (norms, 1),
    "maxima": (functools.partial(norms, orders=(torch.inf,)), 1),
    "scale": (scale, 1),
    "clamp": (lambda kernels, target, tensors: kernels.clamp_(tensors, 0.5), 1),
    "ema": (lambda kernels, target, tensors: kernels.ema_(tensors[::2], tensors[1::2], 0.7), 2),
}


def check_ends(target, dtype, op, offset=MARGIN):
    run, count = OPS[op]
    kernels = select(target.backend, target.device)
    torch.manual_seed(0)
    plain = [torch.rand(numel).to(target.device, dtype) for numel in NUMELS for _ in range(count)]
    results = []
    for outside in (-3.0, -9.0):
        every = [Surrounded(x, offset, outside - i) for i, x in enumerate(plain)]
        measured = run(kernels, target, [x.tensor for x in every]) or []
        results.append([*measured, *(x.tensor for x in every)])
        assert all(x.is_whole() for x in every)
    assert all(map(same_bits, *results))


@over_kernels
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("offset", [MARGIN, 1], ids=["aligned", "unaligned"])
def test_what_is_beyond_the_ends_is_left_alone(target, dtype, op, offset):
    check_ends(target, dtype, op, offset)


def longer(x):
    """With one element more than there is, where there is memory for it."""
    room = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
    return x.as_strided((min(room, x.numel() + 1),), (1,))


def one_further():
    """A fault: every kernel takes an element more."""

    def on_lists(kernel):
        return lambda *args: kernel(*(list(map(longer, x)) if isinstance(x, list) else x for x in args))

    def update(rule, groups, *args, right=reference.update):
        return right(rule, with_columns(groups, longer), *args)

    faults = {name: on_lists(getattr(reference, name)) for name in ("reduce", "scale_", "clamp_", "ema_")}
    return mock.patch.multiple(reference, update=update, **faults)


@pytest.mark.parametrize("op", OPS)
def test_an_element_too_many_is_noticed(dtype, op):
    check_ends(REFERENCE, dtype, op)
    must_fail(one_further, check_ends, REFERENCE, dtype, op)
