"""Stochastic depth that computes the kept samples alone: what is kept, the numbers, the statistics, autograd."""

import importlib
import math

import pytest
import torch
from contract import assert_contract, same_bits
from controls import must_fail
from drop_path_controls import two_dtypes, wrong_forward, wrong_gradient
from drop_path_formulas import NARROW, assert_equal, draws_of, seeded, timm_drop_path
from stochastic_depth_formulas import (
    SHAPE,
    Branch,
    bernoulli_formula,
    exact_results,
    fixed_formula,
    modes,
)
from targets import INTERPRETER, REFERENCE, over_kernels, thorough

import trainops
from trainops.stochastic_depth import MODES

LAYER_SCALES = {"no_scale": None, "last_dim": (8,), "positions": (5, 1), "scalar": ()}
FAULTS = ["nothing", "last_element", "last_sample", "unscaled", "of_another_seed"]

scales = pytest.mark.parametrize("scale_shape", LAYER_SCALES.values(), ids=LAYER_SCALES)


def both_ways(target, mode, inputs, drop_prob=0.4, scale_by_keep=True):
    """Output and gradients of ours and of the formula, for the same numbers and the same seed."""
    residual, layer_scale, grad = inputs
    results = []
    for ours in (True, False):
        branch = Branch(residual.dtype, target.device)
        x = residual.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        scale = None if layer_scale is None else layer_scale.detach().clone().requires_grad_()
        args = (x, branch, drop_prob, True, scale_by_keep)
        if ours:
            out = seeded(trainops.stochastic_depth, *args, layer_scale=scale, mode=mode, backend=target.backend)
        else:
            out = seeded(fixed_formula if mode == "fixed" else bernoulli_formula, *args, layer_scale=scale)
        needed = [p for p in (x, branch.weight, scale) if p is not None]
        results.append([out.detach(), *torch.autograd.grad(out, needed, grad)])
    return results


def make_inputs(dtype, device, scale_shape=None, shape=SHAPE):
    residual, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return residual, None if scale_shape is None else torch.randn(scale_shape, device=device).to(dtype), grad


RESULTS = ("out", "residual", "weight", "layer_scale")


def check_numbers(target, dtype, mode, scale_shape, scale_by_keep=True, results=RESULTS):
    """Output and gradients by the contract; in mode "bernoulli" the output is timm's to the bit."""
    draws = [make_inputs(dtype, target.device, scale_shape) for _ in range(draws_of(dtype, scale_shape))]
    for inputs in draws:
        ours, torchs = both_ways(target, mode, inputs, scale_by_keep=scale_by_keep)
        if mode == "bernoulli" and "out" in results:
            assert_equal(ours[0], torchs[0])
        true = exact_results(mode, *inputs, 0.4, scale_by_keep)
        for name, our, expected, result in zip(RESULTS, ours, torchs, true, strict=False):
            if name in results:
                # PyTorch's error is no measure where it is that of a single number, which may have none at all.
                assert_contract(our, result, expected if our.numel() > 1 else None, name)


def alike_for_kernels(target, mode, scale_by_keep, scale_shape, **_):
    """The modes differ in what is drawn, the scaling in the value of the mask: no kernel can tell."""
    again = mode == "bernoulli" if scale_by_keep else scale_shape != (8,)
    return again and (target == INTERPRETER or not scale_by_keep)


@thorough(alike_for_kernels)
@modes
@scales
@pytest.mark.parametrize("scale_by_keep", [True, False], ids=["scaled", "unscaled"])
def test_numbers(target, dtype, mode, scale_shape, scale_by_keep):
    check_numbers(target, dtype, mode, scale_shape, scale_by_keep)


@modes
@pytest.mark.parametrize("drop_prob", [0.05, 0.3, 0.7, 0.99, 1.0])
def test_the_branch_is_run_on_kept_samples_alone(target, mode, drop_prob):
    residual = torch.randn(SHAPE, device=target.device)
    branch = Branch(device=target.device)
    out = seeded(trainops.stochastic_depth, residual, branch, drop_prob, True, mode=mode, backend=target.backend)
    changed = (out != residual).flatten(1).any(1)
    if mode == "fixed":
        count = max(1, round(len(residual) * (1 - drop_prob)))
        assert len(branch.calls[0]) == count
        assert changed.sum() == (count if drop_prob < 1 else 0)
    else:
        mask = seeded(timm_drop_path, torch.ones_like(residual), drop_prob, True)
        assert torch.equal(changed, mask[:, 0, 0] != 0)
        assert len(branch.calls[0]) == max(1, changed.sum())
    assert len(branch.calls) == 1
    assert same_bits(out[~changed], residual[~changed])
    if changed.any():
        rows = {tuple(x.flatten().tolist()) for x in branch.calls[0]}
        assert rows == {tuple(x.flatten().tolist()) for x in residual[changed]}


@modes
@pytest.mark.parametrize(("drop_prob", "training"), [(0.0, True), (0.5, False), (1.0, False)])
def test_nothing_is_dropped_where_nothing_can_be(target, mode, drop_prob, training):
    residual, branch = torch.randn(SHAPE, device=target.device), Branch(device=target.device)
    scale = torch.randn(8, device=target.device)
    state = torch.get_rng_state()
    out = trainops.stochastic_depth(
        residual, branch, drop_prob, training, layer_scale=scale, mode=mode, backend=target.backend
    )
    assert torch.equal(out, residual + branch(residual) * scale)
    assert len(branch.calls[0]) == len(residual)
    assert torch.equal(state, torch.get_rng_state())


@modes
@pytest.mark.parametrize("drop_prob", [0.5, 1.0])
def test_batches_of_none_and_of_one(target, mode, drop_prob):
    branch = Branch(device=target.device)
    for batch in (0, 1):
        residual = torch.randn((batch, *SHAPE[1:]), device=target.device, requires_grad=True)
        out = trainops.stochastic_depth(residual, branch, drop_prob, True, False, mode=mode, backend=target.backend)
        out.sum().backward()
        assert residual.grad.shape == residual.shape
        if drop_prob == 1.0:
            assert same_bits(out, residual)
        elif mode == "fixed":
            assert torch.equal(out, residual + branch(residual))


CUTS = {
    "class_token": lambda x: x[:, 0],
    "channels": lambda x: x[:, :3],
    "expanded": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.transpose(1, 2),
}


@modes
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_residuals_with_gaps(target, mode, cut):
    """Also where one sample is kept, whose stride says nothing, and the branch's result is such a cut, too."""
    residual = cut(torch.randn(SHAPE, device=target.device))

    def branch(x):
        return x.as_strided(x.shape, (residual.stride(0), *x.stride()[1:])) * 2 if len(x) == 1 else x * 2

    for drop_prob in (0.4, 0.9):
        for seed in range(5):
            outs = []
            for backend in (target.backend, "reference"):
                torch.manual_seed(seed)
                outs.append(trainops.stochastic_depth(residual, branch, drop_prob, True, mode=mode, backend=backend))
            assert_equal(*outs)


FUSED = {
    "contiguous": (SHAPE, None, torch.contiguous_format),
    "last_dim": (SHAPE, (8,), torch.contiguous_format),
    "last_dim_of_3": (SHAPE, (1, 1, 8), torch.contiguous_format),
    "channels_last": ((12, 5, 4, 8), None, torch.channels_last),
    "channels_last_scaled": ((12, 5, 4, 8), (5, 1, 1), torch.channels_last),
}


@over_kernels
@pytest.mark.parametrize("function", ["drop_path_add", *MODES])
@pytest.mark.parametrize(("shape", "scale_shape", "memory_format"), FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16)], ids=["same", "mixed"])
def test_kernels_serve(target, monkeypatch, function, shape, scale_shape, memory_format, dtypes):
    """None of these is left to the reference, forward or backward, and the branch gets the layout of its residual."""
    residual, layer_scale, grad = make_inputs(torch.float32, target.device, scale_shape, shape)
    residual, grad = (x.to(dtypes[0]).contiguous(memory_format=memory_format) for x in (residual, grad))
    layer_scale = None if layer_scale is None else layer_scale.to(dtypes[1]).requires_grad_()
    monkeypatch.setattr(importlib.import_module("trainops.adapters._drop_path"), "reference", None)

    def branch(x):
        assert x.is_contiguous(memory_format=memory_format)
        return x.to(dtypes[1]) * 2

    args = (0.4, True, True, layer_scale)
    residual.requires_grad_()
    if function == "drop_path_add":
        out = trainops.drop_path_add(residual, branch(residual), *args, backend=target.backend)
    else:
        out = trainops.stochastic_depth(residual, branch, *args, function, backend=target.backend)
    assert out.is_contiguous(memory_format=memory_format)
    out.backward(grad)


@modes
@scales
def test_where_nothing_is_kept_gradients_are_zero(target, mode, scale_shape):
    """DDP waits for a gradient of every parameter. A branch that is dropped does no harm, whatever it holds."""
    residual, layer_scale, grad = make_inputs(torch.float32, target.device, scale_shape)
    branch = Branch(device=target.device)
    inputs = [x.requires_grad_() for x in (residual, layer_scale) if x is not None]
    out = trainops.stochastic_depth(
        residual, lambda x: branch(x) * math.inf, 1.0, True, True, layer_scale, mode, backend=target.backend
    )
    assert same_bits(out, residual)
    assert len(branch.calls[0]) == 1
    out = trainops.stochastic_depth(residual, branch, 1.0, True, True, layer_scale, mode, backend=target.backend)
    of_residual, *others = torch.autograd.grad(out, [*inputs, branch.weight], grad)
    assert same_bits(of_residual, grad)
    assert all(x.count_nonzero() == 0 for x in others)


@modes
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layouts_are_kept(target, mode, memory_format):
    residual, _, grad = make_inputs(torch.float32, target.device, None, (12, 5, 4, 8))
    inputs = [residual.contiguous(memory_format=memory_format), None, grad.contiguous(memory_format=memory_format)]
    ours, torchs = both_ways(target, mode, inputs)
    for our, expected in zip(ours, torchs, strict=True):
        torch.testing.assert_close(our, expected)
    assert ours[0].is_contiguous(memory_format=memory_format)


# All numerical derivatives at once are those of a random direction.
@thorough(lambda target, mode, fast, **_: not fast or (target == INTERPRETER and mode == "bernoulli"))
@pytest.mark.parametrize("fast", [True, False], ids=["one_direction", "every_element"])
@modes
@scales
def test_gradcheck(target, mode, scale_shape, fast):
    shape = (5, 2, 2)
    scale_shape = {(8,): (2,), (5, 1): (2, 1)}.get(scale_shape, scale_shape)
    residual, layer_scale, _ = make_inputs(torch.float64, target.device, scale_shape, shape)
    weight = torch.randn(2, dtype=torch.float64, device=target.device)
    inputs = [x.requires_grad_() for x in (residual, weight, layer_scale) if x is not None]

    def function(residual, weight, layer_scale=None):
        return seeded(
            trainops.stochastic_depth,
            residual,
            lambda x: torch.tanh(x) * weight,
            0.4,
            True,
            layer_scale=layer_scale,
            mode=mode,
            backend=target.backend,
        )

    assert torch.autograd.gradcheck(function, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=fast)


@modes
def test_func_grad(mode):
    residual, branch = torch.randn(SHAPE), Branch()

    def loss(function, residual, **options):
        return function(residual, branch, 0.4, True, **options).square().sum()

    ours = seeded(torch.func.grad(loss, argnums=1), trainops.stochastic_depth, residual, mode=mode)
    formula = fixed_formula if mode == "fixed" else bernoulli_formula
    torch.testing.assert_close(ours, seeded(torch.func.grad(loss, argnums=1), formula, residual))


@modes
@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 0.9])
def test_rate_and_expectation(target, mode, drop_prob):
    batch, draws, places = 2000, 10, 50
    zeros = torch.zeros(batch, 1, device=target.device)
    args = (zeros, torch.ones_like, drop_prob, True)
    rows = [trainops.stochastic_depth(*args, mode=mode, backend=target.backend) for _ in range(draws)]
    kept = torch.stack(rows).view(draws, batch)
    counts = (kept != 0).sum(1)
    if mode == "fixed":
        assert set(counts.tolist()) == {round(batch * (1 - drop_prob))}
    # Six standard deviations of a binomial distribution: over all, and for each place in the batch by itself.
    of_place = (kept == 0).double().view(draws, places, -1).mean((0, 2))
    total_bound, bound = (
        6 * math.sqrt(drop_prob * (1 - drop_prob) / n) for n in (kept.numel(), kept.numel() / places)
    )
    assert abs((kept == 0).double().mean().item() - drop_prob) <= total_bound
    assert (of_place - drop_prob).abs().max() < bound
    assert abs(kept.double().mean().item() - 1) <= total_bound / (1 - drop_prob)
    assert not torch.equal(kept[0], kept[1])


def test_the_expected_value_is_exact_where_the_rate_is_rounded():
    kept = trainops.stochastic_depth(torch.zeros(7, 1), torch.ones_like, 0.4, True)  # 4 of 7
    torch.testing.assert_close(kept.sum(), torch.tensor(7.0))


# Controls: what the checks above must notice.


@two_dtypes
@modes
@scales
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_output_is_noticed(dtype, mode, scale_shape, fault):
    must_fail(lambda: wrong_forward(fault), check_numbers, REFERENCE, dtype, mode, scale_shape, results=["out"])


@two_dtypes
@modes
@scales
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "unscaled"])
def test_a_wrong_gradient_of_the_residual_is_noticed(dtype, mode, scale_shape, fault):
    # It is the sum that the forward kernel makes, of gradients.
    args = (REFERENCE, dtype, mode, scale_shape)
    must_fail(lambda: wrong_forward(fault), check_numbers, *args, results=["residual"])


@two_dtypes
@modes
@pytest.mark.parametrize("fault", ["nothing", "last_element", "last_sample", "unscaled"])
@pytest.mark.parametrize("result", ["residual", "weight"])
def test_a_wrong_gradient_of_the_branch_is_noticed(dtype, mode, fault, result):
    for scale_shape in LAYER_SCALES.values():
        args = (REFERENCE, dtype, mode, scale_shape)
        must_fail(lambda: wrong_gradient("branch", fault), check_numbers, *args, results=[result])


scale_shapes = pytest.mark.parametrize("scale_shape", [(8,), (5, 1), ()], ids=str)


@two_dtypes
@modes
@scale_shapes
@pytest.mark.parametrize("fault", ["nothing", "last_element", "unscaled", "forgets_a_sample"])
def test_a_wrong_gradient_of_layer_scale_is_noticed(dtype, mode, scale_shape, fault):
    args = (REFERENCE, dtype, mode, scale_shape)
    must_fail(lambda: wrong_gradient("layer_scale", fault), check_numbers, *args, results=["layer_scale"])


@two_dtypes
@modes
@scale_shapes
def test_a_forgotten_layer_scale_is_noticed(dtype, mode, scale_shape):
    args = (REFERENCE, dtype, mode, scale_shape)
    must_fail(lambda: wrong_forward("no_layer_scale"), check_numbers, *args, results=["out"])
    must_fail(lambda: wrong_gradient("branch", "no_layer_scale"), check_numbers, *args, results=["residual"])


@modes
@scales
@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_truncation_is_noticed(narrow, mode, scale_shape):
    args = (REFERENCE, narrow, mode, scale_shape)
    for result in ("out", "residual"):
        must_fail(lambda: wrong_forward("truncated"), check_numbers, *args, results=[result])
    for result in ("residual", "weight"):
        must_fail(lambda: wrong_gradient("branch", "truncated"), check_numbers, *args, results=[result])
    if scale_shape is not None:
        must_fail(lambda: wrong_gradient("layer_scale", "truncated"), check_numbers, *args, results=["layer_scale"])
