"""DropPath's kernels where the branch holds some samples alone, and where chunks and samples begin anywhere."""

import importlib
import math

import numpy as np
import pytest
import torch
from contract import assert_contract, exact
from controls import must_fail
from drop_path_controls import wrong_forward, wrong_gradient
from drop_path_formulas import (
    LAYOUTS,
    NARROW,
    adding,
    assert_equal,
    assert_same_bits,
    exact_sum,
    operands,
    seeded,
    timm_drop_path,
    timm_drop_path_add,
    timm_mask,
    with_broken_dropped_samples,
    with_specials,
)
from targets import INTERPRETER, KERNELS, REFERENCE, thorough
from test_drop_path_gradients import check_gradients

import trainops
from trainops.adapters import select

# Samples that are no whole packs, samples of which a chunk has several, and samples of several chunks.
CASES = [
    ((5, 7), "contiguous"),
    ((12, 50, 24), "contiguous"),
    ((12, 50, 24), "unaligned"),
    ((3, 3, 2801), "contiguous"),
    ((3, 2, 8200), "contiguous"),
    ((5, 8, 3, 4), "channels_last"),
]
FULL = [(torch.float32,) * 3, (torch.float64,) * 3, (torch.bfloat16,) * 3]
DTYPES = [*FULL, (torch.float32, torch.bfloat16, torch.bfloat16)]
FORMULA_DTYPES = [
    *DTYPES,
    (torch.float16,) * 3,
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.float16, torch.bfloat16),
]
FAULTS = ["nothing", "last_element", "last_sample", "unscaled", "of_another_seed", "leaking"]

cases = pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
some_dtypes = pytest.mark.parametrize("dtypes", DTYPES, ids=str)
faults = pytest.mark.parametrize("fault", FAULTS)


def slow_for_the_interpreter(target, shape, dtypes, **_):
    """Its time goes with the elements; how its blocks begin and end is the same for all dtypes."""
    return target == INTERPRETER and math.prod(shape) > 1000 and dtypes not in (DTYPES[0], DTYPES[-1])


def formula(branch, mask, layer_scale):
    """``branch * layer_scale * mask`` as people write it."""
    return (branch if layer_scale is None else branch * layer_scale) * mask


def assert_layer_scale(ours, grad, mask, branch):
    """The contract for the gradient of layer scale."""
    with np.errstate(invalid="ignore"):  # of infinities
        true = exact_sum(exact(grad) * exact(mask) * exact(branch), ours.shape)
    assert_contract(ours, true, (grad * mask * branch).sum_to_size(ours.shape).to(ours.dtype))


def rows_operands(target, shape, layout, dtypes, mask_samples):
    """Three tensors as of ``operands``, what lays them out, and a mask of so many samples, which keeps all."""
    tensors = operands(torch.float32, target.device, shape[-1:], shape)
    dtype = torch.promote_types(*dtypes[1:])
    mask = torch.full((mask_samples, *[1] * (len(shape) - 1)), 1.4, dtype=dtype, device=target.device)
    return *(x.to(dtype) for x, dtype in zip(tensors, dtypes, strict=True)), LAYOUTS[layout], mask


def check_rows_of_the_branch(target, shape, layout, dtypes, layer_scaled):
    """The branch has the kept samples alone, in any order, and one more that all dropped ones name: it has no say."""
    samples = shape[0]
    residual, branch, layer_scale, lay, mask = rows_operands(target, shape, layout, dtypes, samples)
    dropped, kept = torch.randperm(samples, device=target.device).split([samples - samples // 2, samples // 2])
    mask[dropped] = 0
    rows = torch.full((samples,), len(kept), device=target.device)
    rows[kept] = torch.arange(len(kept), device=target.device)
    branch = branch[: len(kept) + 1]
    branch[-1] = math.nan
    assert len(branch) < samples
    residual, branch = lay(residual), lay(branch)
    layer_scale = layer_scale if layer_scaled else None
    ours = select(target.backend, target.device).drop_path(branch, mask, residual, layer_scale, rows)
    expected = residual.clone()
    expected[kept] += formula(branch[rows[kept]], mask[kept], layer_scale)
    assert_same_bits(ours, expected)


def check_rows_of_the_gradient(target, shape, layout, dtypes, branch_given, layer_scaled):
    """The branch has some of the gradient's samples, in any order; of those, the last is dropped all the same."""
    samples = shape[0] // 2 + 1
    grad, branch, layer_scale, lay, mask = rows_operands(target, shape, layout, dtypes, samples)
    rows = torch.randperm(shape[0], device=target.device)[:samples]
    branch = branch[:samples]
    branch[-1], mask[-1] = math.nan, 0
    grad, branch = lay(grad), lay(branch)
    layer_scale = layer_scale if layer_scaled else None
    kernels = select(target.backend, target.device)
    ours, of_scale = kernels.drop_path_backward(grad, branch if branch_given else None, mask, layer_scale, rows)
    taken = grad.to(mask.dtype)[rows]
    assert_same_bits(ours, formula(taken, mask, layer_scale).to(ours.dtype))
    assert ours.dtype == (branch.dtype if branch_given else mask.dtype)
    assert (of_scale is None) == (not branch_given)
    if branch_given:
        assert_layer_scale(of_scale, taken, mask, branch.nan_to_num())


@thorough(slow_for_the_interpreter)
@pytest.mark.parametrize("layer_scaled", [False, True])
@some_dtypes
@cases
def test_rows_of_the_branch(target, shape, layout, dtypes, layer_scaled):
    check_rows_of_the_branch(target, shape, layout, dtypes, layer_scaled)


BACKWARDS = [(False, False), (False, True), (True, True)]
backwards = pytest.mark.parametrize(
    ("branch_given", "layer_scaled"), BACKWARDS, ids=["no_scale", "frozen_scale", "layer_scale"]
)


@thorough(slow_for_the_interpreter)
@backwards
@some_dtypes
@cases
def test_rows_of_the_gradient(target, shape, layout, dtypes, branch_given, layer_scaled):
    check_rows_of_the_gradient(target, shape, layout, dtypes, branch_given, layer_scaled)


def check_backward(target, shape, dtypes, branch_given, layer_scaled):
    """The formula's bits, also of infinities and NaN where they are not dropped."""
    grad, branch, layer_scale = operands(torch.float32, target.device, shape[-1:], shape)
    grad, branch, layer_scale = (x.to(dtype) for x, dtype in zip((grad, branch, layer_scale), dtypes, strict=True))
    mask = timm_mask(branch[:, :1, :1] * layer_scale[:1], 0.3)
    kept = mask.flatten() != 0
    grad[kept, ..., :3] = with_specials(grad[kept, ..., :3])  # the sums of the other channels are finite
    layer_scale = layer_scale if layer_scaled else None
    kernels = select(target.backend, target.device)
    ours, of_scale = kernels.drop_path_backward(grad, branch if branch_given else None, mask, layer_scale)
    assert ours.dtype in (mask.dtype, branch.dtype)
    assert_same_bits(ours, formula(grad.to(mask.dtype), mask, layer_scale).to(ours.dtype))
    assert (of_scale is None) == (not branch_given)
    if branch_given:
        assert_layer_scale(of_scale, grad.to(mask.dtype), mask, branch)


@backwards
@pytest.mark.parametrize("dtypes", FORMULA_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 9, 48), (5, 3, 7)], ids=str)
def test_backward_is_the_formula(target, shape, dtypes, branch_given, layer_scaled):
    check_backward(target, shape, dtypes, branch_given, layer_scaled)


@thorough(lambda dtype, shape, **_: dtype == torch.bfloat16 and shape != (5, 41, 3))
@pytest.mark.parametrize("target", [target for target in KERNELS if target.backend == "triton"], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(6, 9, 32), (5, 41, 3), (300, 2), (1300, 2)], ids=str)
def test_small_chunks(target, dtype, shape, monkeypatch):
    """Chunks that lie in one sample, kept or dropped, and of several samples; sums of one run, and of several."""
    kernels = importlib.import_module("trainops.triton_kernels")
    monkeypatch.setattr(kernels._common, "CHUNK", 128)
    monkeypatch.setattr(kernels._common, "block_numel", lambda *_: 64)
    monkeypatch.setattr(kernels.drop_path, "PARTIALS", 9)
    residual, branch, layer_scale = operands(dtype, target.device, shape[-1:], shape)
    for scale in (None, layer_scale):
        args = (residual, branch, 0.3, True, True, scale)
        assert_equal(seeded(adding(target), *args), seeded(timm_drop_path_add, *args))
    ours = seeded(trainops.drop_path, branch, 0.3, True, backend=target.backend)
    assert_same_bits(ours, seeded(timm_drop_path, branch, 0.3, True))
    dropped, broken = with_broken_dropped_samples(branch)
    ours = seeded(adding(target), residual, broken, 0.5, True)
    assert_same_bits(ours[dropped], residual[dropped])
    check_gradients(target, residual, branch, layer_scale)


# Controls: what the checks above must notice.


@faults
@some_dtypes
@cases
def test_wrong_rows_of_the_branch_are_noticed(shape, layout, dtypes, fault):
    for layer_scaled in (False, True):
        args = (REFERENCE, shape, layout, dtypes, layer_scaled)
        must_fail(lambda: wrong_forward(fault), check_rows_of_the_branch, *args)


@pytest.mark.parametrize("check", [check_rows_of_the_gradient, check_backward])
@faults
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_wrong_gradient_is_noticed(dtypes, fault, check):
    args = (REFERENCE, (12, 50, 24), *(["contiguous"] if check is check_rows_of_the_gradient else []), dtypes)
    for options in BACKWARDS:
        must_fail(lambda: wrong_gradient("branch", fault), check, *args, *options)
    if fault != "last_sample":
        must_fail(lambda: wrong_gradient("layer_scale", fault), check, *args, True, True)


@cases
@some_dtypes
def test_other_faults_are_noticed(shape, layout, dtypes):
    """A layer scale or a sample that is left out, and rounding to zero."""
    must_fail(
        lambda: wrong_forward("no_layer_scale"), check_rows_of_the_branch, REFERENCE, shape, layout, dtypes, True
    )
    args = (check_rows_of_the_gradient, REFERENCE, shape, layout, dtypes, True, True)
    must_fail(lambda: wrong_gradient("branch", "no_layer_scale"), *args)
    must_fail(lambda: wrong_gradient("layer_scale", "forgets_a_sample"), *args)
    if set(dtypes) <= set(NARROW):
        must_fail(lambda: wrong_forward("truncated"), check_rows_of_the_branch, *args[1:5], True)
        must_fail(lambda: wrong_gradient("branch", "truncated"), *args)
        must_fail(lambda: wrong_gradient("layer_scale", "truncated"), *args)
