"""DropPath of small tensors, which PyTorch's operations serve: the same checks as for the kernels."""

from unittest import mock

import pytest
import torch
from contract import same_bits
from drop_path_formulas import SHAPE, adding, operands, seeded, timm_drop_path_add, with_specials
from targets import Target
from test_drop_path import LAYOUTS, check_add, check_drop_path, check_dropped_samples
from test_drop_path_gradients import check_gradients, check_same_gradients

import trainops
from trainops import drop_path_small
from trainops.adapters import backends, cpu

CPU = Target(None, "cpu")  # the default backend: whoever asks for one gets its kernels

pytestmark = pytest.mark.skipif(not backends()["cpu"].available, reason="backend cpu is missing")


def takes(*args, **options):
    """Whether a call is served by PyTorch's operations."""
    results = []

    def spy(*args, drop_path=drop_path_small.drop_path):
        results.append(drop_path(*args))
        return results[-1]

    with mock.patch.object(drop_path_small, "drop_path", spy):
        out = trainops.drop_path_add(*args, 0.5, True, **options)
    return any(result is out for result in results)


def test_who_is_small():
    largest = drop_path_small.LARGEST
    small, large = torch.ones(2, largest // 2), torch.ones(2, largest // 2 + 1)
    assert takes(small, small)
    assert not takes(large, large)
    assert not takes(small, small, backend="cpu")
    assert not takes(small, small, layer_scale=torch.ones(1))  # the kernel's gradient of it is more exact
    assert not takes(small.double(), small)
    assert not takes(small[:1], small)
    assert not takes(torch.stack((small, small), -1)[..., 0], small)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0, 3), (1,), (64,), (16, 7), (8, 5, 33), (3, 1025)], ids=str)
def test_the_sum_is_timms(dtype, shape):
    residual, branch, _ = operands(dtype, "cpu", None, shape)
    assert takes(residual, branch)
    for drop_prob in (0.1, 0.5, 1.0):
        for scale_by_keep in (True, False):
            check_add(CPU, residual, branch, drop_prob, True, scale_by_keep)
            check_drop_path(
                CPU, with_specials(branch.clone()) if branch.numel() else branch, drop_prob, scale_by_keep
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_kept(layout):
    residual, branch, _ = operands(torch.float32, "cpu")
    for residual_layout in LAYOUTS.values():
        check_add(CPU, residual_layout(residual), LAYOUTS[layout](branch))
    check_drop_path(CPU, LAYOUTS[layout](branch), 0.3)


def test_a_dropped_sample_has_no_effect(dtype):
    residual, branch, _ = operands(dtype, "cpu")
    check_dropped_samples(CPU, residual, branch, None)
    check_same_gradients(CPU, residual, branch, None)
    minus_zero = torch.full(SHAPE, -0.0, dtype=dtype)
    assert same_bits(trainops.drop_path_add(minus_zero, minus_zero + 1, 1.0, True), minus_zero)


def test_gradients(dtype):
    check_gradients(CPU, *operands(dtype, "cpu"))


@pytest.mark.parametrize("needs_grad", [(True, False), (False, True), (False, False)], ids=str)
def test_gradients_of_some_operands(needs_grad):
    residual, branch, _ = operands(torch.float32, "cpu")
    inputs = [x.requires_grad_(needed) for x, needed in zip((residual, branch), needs_grad, strict=True)]
    before = [x.detach().clone() for x in inputs]
    ours, expected = (seeded(add, *inputs, 0.5, True) for add in (adding(CPU), timm_drop_path_add))
    assert ours.requires_grad == expected.requires_grad == any(needs_grad)
    assert torch.equal(ours, expected)
    assert all(map(same_bits, inputs, before))
    if any(needs_grad):
        needing = [x for x in inputs if x.requires_grad]
        grads = [torch.autograd.grad(out.square().sum(), needing) for out in (ours, expected)]
        assert all(map(torch.equal, *grads))


def test_inference_mode_and_second_derivatives():
    residual, branch, _ = operands(torch.float64, "cpu", None, (8, 3))
    with torch.inference_mode():
        inferred = seeded(trainops.drop_path_add, residual, branch, 0.5, True)
    assert same_bits(inferred.clone(), seeded(trainops.drop_path_add, residual, branch, 0.5, True))

    def add(residual, branch):
        return seeded(trainops.drop_path_add, residual, branch, 0.5, True)

    inputs = (residual.requires_grad_(), branch.requires_grad_())
    assert torch.autograd.gradgradcheck(add, inputs)


def test_a_sample_that_is_not_restored_is_noticed():
    residual, branch, _ = operands(torch.float32, "cpu")
    with mock.patch.object(cpu, "restore_dropped"), pytest.raises(AssertionError, match="elements differ"):
        check_dropped_samples(CPU, residual, branch, None)
