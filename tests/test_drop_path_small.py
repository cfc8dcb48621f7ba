"""DropPath of small tensors, which PyTorch's operations serve: the same checks as for the kernels."""

import itertools
from unittest import mock

import pytest
import torch
from contract import same_bits
from drop_path_formulas import (
    SHAPE,
    adding,
    gradients,
    operands,
    seeded,
    timm_drop_path,
    timm_drop_path_add,
    with_specials,
)
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
    for fits, layer_scale in (
        (True, torch.ones(largest // 2)),
        (False, torch.ones(1)),
        (False, torch.ones(2, 1)),
        (False, torch.ones(largest // 2).double()),
        (False, torch.ones(largest)[::2]),
        (False, torch._neg_view(torch.ones(largest // 2))),
    ):
        assert takes(small, small, layer_scale=layer_scale) == fits
    for shape in ((5,), (0, 5), (4, 0, 3), (4, 3, 0)):
        x = torch.ones(shape)
        assert not takes(x, x, layer_scale=torch.ones(shape[-1:]))
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


@pytest.mark.parametrize("shape", [(1, 1), (16, 7), (8, 5, 33), (3, 1025)], ids=str)
def test_with_layer_scale(dtype, shape):
    inputs = operands(dtype, "cpu", shape[-1:], shape)
    assert takes(*inputs[:2], layer_scale=inputs[2])
    for drop_prob in (0.1, 0.5, 1.0):
        for scale_by_keep in (True, False):
            expected = seeded(timm_drop_path_add, *inputs[:2], drop_prob, True, scale_by_keep, inputs[2])
            assert torch.equal(
                seeded(trainops.drop_path_add, *inputs[:2], drop_prob, True, scale_by_keep, inputs[2]), expected
            )
            check_gradients(CPU, *inputs, drop_prob, scale_by_keep)


def test_masks_have_timms_bits(dtype):
    x = torch.ones(300, 1, dtype=dtype)
    for rate in torch.rand(200, dtype=torch.float64).tolist():
        assert same_bits(seeded(trainops.drop_path, x, rate, True), seeded(timm_drop_path, x, rate, True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_kept(layout):
    residual, branch, _ = operands(torch.float32, "cpu")
    for residual_layout in LAYOUTS.values():
        check_add(CPU, residual_layout(residual), LAYOUTS[layout](branch))
    check_drop_path(CPU, LAYOUTS[layout](branch), 0.3)


def test_a_dropped_sample_has_no_effect(dtype):
    residual, branch, layer_scale = operands(dtype, "cpu", SHAPE[-1:])
    for scale in (None, layer_scale):
        check_dropped_samples(CPU, residual, branch, scale)
        check_same_gradients(CPU, residual, branch, scale)
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
    layer_scale = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert takes(residual, branch, layer_scale=layer_scale)

    def add_scaled(residual, branch, layer_scale):
        return seeded(trainops.drop_path_add, residual, branch, 0.5, True, layer_scale=layer_scale)

    inputs = (*inputs, layer_scale)
    first = torch.autograd.grad(add_scaled(*inputs).square().sum(), inputs, create_graph=True)
    assert all(x.requires_grad for x in first)  # gradgradcheck passes over those that do not
    assert torch.autograd.gradgradcheck(add_scaled, inputs)


@pytest.mark.parametrize("grad", ["expanded", "transposed", "negated"])
def test_gradients_that_kernels_do_not_take(grad):
    inputs = operands(torch.float32, "cpu", (7,), (8, 5, 7))
    up = {
        "expanded": torch.ones(()).expand(8, 5, 7),
        "transposed": torch.randn(7, 5, 8).transpose(0, 2),
        "negated": torch._neg_view(torch.randn(8, 5, 7)),
    }[grad]
    ours, timms = (gradients(add, inputs, up) for add in (adding(CPU), timm_drop_path_add))
    for x, y in zip(ours, timms, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("needs_grad", list(itertools.product((True, False), repeat=3)), ids=str)
def test_gradients_of_some_operands_with_layer_scale(needs_grad):
    inputs = operands(torch.float32, "cpu", (7,), (8, 5, 7))
    for x, needed in zip(inputs, needs_grad, strict=True):
        x.requires_grad_(needed)
    ours, expected = (
        seeded(add, *inputs[:2], 0.5, True, True, inputs[2]) for add in (adding(CPU), timm_drop_path_add)
    )
    assert ours.requires_grad == expected.requires_grad == any(needs_grad)
    assert torch.equal(ours, expected)
    needing = [x for x in inputs if x.requires_grad]
    if needing:
        for x, y in zip(*(torch.autograd.grad(out.square().sum(), needing) for out in (ours, expected)), strict=True):
            torch.testing.assert_close(x, y)


def test_a_sample_that_is_not_restored_is_noticed():
    residual, branch, _ = operands(torch.float32, "cpu")
    with mock.patch.object(cpu, "restore_dropped"), pytest.raises(AssertionError, match="elements differ"):
        check_dropped_samples(CPU, residual, branch, None)
