"""AdamW and the fused step: numbers, clipping, scaling and skipping."""

import conftest
import numpy as np
import pytest
import torch
from contract import exact, same_bits
from controls import AVERAGE_CONTROLS, CONTROLS, STEP_CONTROLS, must_fail, of_groups, truncated, wrong_norm
from targets import REFERENCE, interpreted
from training import OPTIONS, check_one_step, check_steps, make_grads, make_model, run, set_grads, snapshot, twins

import trainops

SHAPES = ((33, 31), (127,))
LR = 0.05  # large, so that a step moves 16-bit weights by several units in the last place


STEPS = [1, 100]
WIDE_AND_NARROW = (torch.float32, torch.bfloat16)


def some_hundred_steps(dtype, steps, options=None, max_norm=0.5):
    """A hundred steps are a thousand kernel programs."""
    return steps == 1 or (not options and max_norm == 0.5 and dtype in WIDE_AND_NARROW)


@interpreted(some_hundred_steps)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_matches_exact_for_all_options(target, dtype, options, steps):
    check_steps(target, dtype, SHAPES, {"lr": LR} | options, steps)


@interpreted(lambda dtype, shapes: shapes != "many" or dtype in WIDE_AND_NARROW)
def test_matches_exact_for_all_shapes(target, dtype, shapes):
    check_steps(target, dtype, shapes, {"lr": LR})


@interpreted(some_hundred_steps)
@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e9, float("inf"), 0.0])
@pytest.mark.parametrize("steps", STEPS)
def test_clipping_matches_exact(target, dtype, max_norm, steps):
    options = {"lr": LR, "weight_decay": 0.5}  # so that a step moves 16-bit weights also without gradients
    optimizer = check_steps(target, dtype, SHAPES, options, steps, max_norm)
    grads = [exact(p.grad) for p in optimizer.param_groups[0]["params"]]
    norms = np.array([np.sqrt((grad**2).sum()) for grad in grads], float)
    np.testing.assert_allclose(optimizer.grad_norms.double().cpu(), norms, rtol=1e-6)
    np.testing.assert_allclose(optimizer.grad_norm.item(), np.sqrt((norms**2).sum()), rtol=1e-6)


# Not float64: a fused average has the bits of a separate update (test_ema_fused.py), which test_ema.py checks.
NARROW = [torch.bfloat16, torch.float16]
AVERAGES = [*((dtype, None) for dtype in (torch.float32, *NARROW)), *((dtype, torch.float32) for dtype in NARROW)]


def check_averages(target, dtype, average_dtype, steps=3):
    """Steps that clip and average, each held to the contract by itself."""
    model = make_model(SHAPES, dtype, target.device)
    ema = trainops.EMA(model, 0.9, dtype=average_dtype, update_after_step=-2, backend=target.backend)
    optimizer = trainops.AdamW(model.parameters(), lr=LR, max_grad_norm=0.5, ema=ema, backend=target.backend)
    for grads in make_grads(SHAPES, dtype, target.device, steps):
        set_grads(model.params, grads)
        check_one_step(optimizer)


@pytest.mark.parametrize(("dtype", "average_dtype"), AVERAGES, ids=str)
def test_averages_match_exact(target, dtype, average_dtype):
    check_averages(target, dtype, average_dtype)


# Controls: what the checks above must notice.


@pytest.mark.parametrize("control", STEP_CONTROLS.values(), ids=STEP_CONTROLS.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_wrong_step_is_noticed(dtype, options, control):
    must_fail(control, check_steps, REFERENCE, dtype, SHAPES, {"lr": LR} | options)


@pytest.mark.parametrize("shapes", [x for x in conftest.SHAPES if x != "empty"])
@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS.keys())
def test_a_wrong_step_is_noticed_for_all_shapes(dtype, shapes, control):
    must_fail(control, check_steps, REFERENCE, dtype, conftest.SHAPES[shapes], {"lr": LR})


@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS.keys())
@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e9])
def test_a_wrong_step_is_noticed_with_clipping(dtype, max_norm, control):
    must_fail(control, check_steps, REFERENCE, dtype, SHAPES, {"lr": LR}, max_norm=max_norm)


@pytest.mark.parametrize("steps", STEPS)
def test_forgetting_weight_decay_is_noticed(dtype, steps):
    must_fail(lambda: of_groups(weight_decay=0.0), check_steps, REFERENCE, dtype, SHAPES, {"lr": LR}, steps)


@pytest.mark.parametrize("wrong", [{"maximize": True}, {"eps": 1e-3}, {"beta1": 0.91}, {"beta2": 0.998}], ids=str)
def test_wrong_options_are_noticed(dtype, wrong):
    must_fail(lambda: of_groups(**wrong), check_steps, REFERENCE, dtype, SHAPES, {"lr": LR}, 2)


@pytest.mark.parametrize("max_norm", [1e-3, 0.5])
def test_clipping_to_a_wrong_norm_is_noticed(dtype, max_norm):
    must_fail(wrong_norm, check_steps, REFERENCE, dtype, SHAPES, {"lr": LR}, max_norm=max_norm)


# Each column by itself. Only AMSGrad has the last one, and without clipping a beta1 of 0 makes no rounding.
TRUNCATED = [
    (options, column, max_norm)
    for options in OPTIONS
    for column in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    for max_norm in (None, 0.5)
    if (column != "max_exp_avg_sq" or OPTIONS[options].get("amsgrad"))
    and (options, column, max_norm) != ("zero_betas", "exp_avg", None)
]


@pytest.mark.parametrize(("options", "column", "max_norm"), TRUNCATED)
@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_truncation_is_noticed(narrow, options, column, max_norm):
    options = {"lr": LR} | OPTIONS[options]
    must_fail(lambda: truncated(column), check_steps, REFERENCE, narrow, SHAPES, options, max_norm=max_norm)


@pytest.mark.parametrize("column", ["param", "exp_avg", "exp_avg_sq", "average"])
@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_truncation_is_noticed_with_averages(narrow, column):
    must_fail(lambda: truncated(column), check_averages, REFERENCE, narrow, None, steps=1)


@pytest.mark.parametrize("control", AVERAGE_CONTROLS.values(), ids=AVERAGE_CONTROLS.keys())
@pytest.mark.parametrize(("dtype", "average_dtype"), AVERAGES, ids=str)
def test_a_wrong_average_is_noticed(dtype, average_dtype, control):
    must_fail(control, check_averages, REFERENCE, dtype, average_dtype, steps=1)


# Scaling and skipping


def test_gradients_are_read_only(target, dtype):
    model = make_model([(33, 31)], dtype, target.device)
    (grad,) = make_grads([(33, 31)], dtype, target.device, 1)[0]
    model.params[0].grad = grad.clone()
    trainops.AdamW(model.parameters(), max_grad_norm=1e-3, backend=target.backend).step()
    assert same_bits(model.params[0].grad, grad)


@interpreted(lambda bad, how, dtype: dtype in WIDE_AND_NARROW and (bad != bad) == (how != "both"))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("how", ["skip_nonfinite", "found_inf", "both"])
def test_a_skipped_step_changes_no_bit(target, dtype, bad, how):
    shapes = [(33, 31), (127,), (), (70001,)]
    model = make_model(shapes, dtype, target.device)
    ema = trainops.EMA(model, 0.5, backend=target.backend)
    optimizer = trainops.AdamW(
        model.parameters(), amsgrad=True, skip_nonfinite=how != "found_inf", ema=ema, backend=target.backend
    )
    good, more = make_grads(shapes, dtype, target.device, 2)
    run(optimizer, model.params, [good])
    before = snapshot(model, optimizer, ema)
    more[3][-1] = bad
    if how != "skip_nonfinite":
        optimizer.found_inf = torch.ones((), device=target.device)
    run(optimizer, model.params, [more])
    assert all(map(same_bits, snapshot(model, optimizer, ema), before))
    assert optimizer.skipped_steps == 1
    if how != "skip_nonfinite":
        del optimizer.found_inf
    run(optimizer, model.params, [good])
    assert optimizer.skipped_steps == 1
    assert not any(map(same_bits, snapshot(model, optimizer, ema), before))


def test_nonfinite_gradients_propagate_as_in_torch_unless_skipped(target):
    ours, torchs = twins([(5,), (3,)], torch.float32, target.device)
    grads = [torch.tensor([1.0, float("nan"), 2.0, 3.0, 4.0]), torch.tensor([1.0, float("inf"), 2.0])]
    grads = [[grad.to(target.device) for grad in grads]]
    run(trainops.AdamW(ours.parameters(), backend=target.backend), ours.params, grads)
    run(torch.optim.AdamW(torchs.parameters()), torchs.params, grads)
    for p, q in zip(ours.params, torchs.params, strict=True):
        torch.testing.assert_close(p, q, equal_nan=True)


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"max_grad_norm": 0.1, "skip_nonfinite": True}])
def test_grad_scaler(target, options, unscale_first):
    """Losses of 1, inf and 1 again: the second step is skipped, and the scale is taken out of the others."""
    ours, torchs = twins([(33, 31), (7,)], torch.float32, target.device)
    our_optimizer = trainops.AdamW(ours.parameters(), lr=1e-2, backend=target.backend, **options)
    torch_optimizer = torch.optim.AdamW(torchs.parameters(), lr=1e-2)
    scalers = [torch.amp.GradScaler(target.device, init_scale=1024.0) for _ in range(2)]
    for factor in (1.0, float("inf"), 1.0):
        for model, optimizer, scaler in zip((ours, torchs), (our_optimizer, torch_optimizer), scalers, strict=True):
            optimizer.zero_grad()
            scaler.scale(factor * sum((p * p).sum() for p in model.params)).backward()
            if unscale_first or model is torchs:
                scaler.unscale_(optimizer)
            if model is torchs and "max_grad_norm" in options:
                norm = torch.nn.utils.clip_grad_norm_(torchs.parameters(), options["max_grad_norm"])
                if factor == 1.0:
                    last_norm = norm
            scaler.step(optimizer)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert our_optimizer.skipped_steps == bool(options)  # else the scaler does not even call step()
    for p, q in zip(ours.params, torchs.params, strict=True):
        torch.testing.assert_close(p, q)
    if "max_grad_norm" in options:
        torch.testing.assert_close(our_optimizer.grad_norm, last_norm)


def test_large_gradients_do_not_overflow_the_norm(target):
    model = make_model([(4,)], torch.float32, target.device)
    model.params[0].grad = torch.full((4,), 1e30, device=target.device)
    optimizer = trainops.AdamW(model.parameters(), max_grad_norm=1.0, skip_nonfinite=True, backend=target.backend)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(2e30)
    assert optimizer.skipped_steps == 0
