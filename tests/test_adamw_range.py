"""Steps of AdamW on numbers that training may meet late, or with tiny, large or broken gradients."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from contract import DTYPES, assert_contract, exact
from controls import STEP_CONTROLS, kernels, must_fail, of_steps
from exact import adamw_step
from targets import REFERENCE, over_kernels
from training import check_one_step, make_grads, make_model, set_grads

import trainops

NAN, INF = float("nan"), float("inf")
NUMEL = 73  # whole vectors, and a tail
OPTIONS = {"lr": 0.05, "betas": (0.9, 0.999), "weight_decay": 0.3}
MOMENTS = ("exp_avg", "exp_avg_sq")

STEPS = [0, 1, 10, 100_000]
SCALES = [1e-25, 1e-12, 1e-6, 1.0, 1e15]
# float16 holds neither gradients of other scales nor their squares.
CASES = [(dtype, scale) for dtype in DTYPES for scale in SCALES if dtype != torch.float16 or scale == 1.0]
over_cases = pytest.mark.parametrize(("dtype", "scale"), CASES, ids=str)


def one_step(make, param, grad, state, device, **options):
    """What an optimizer makes of a parameter whose state is given."""
    p = torch.nn.Parameter(param.to(device, copy=True))
    p.grad = grad.to(device)
    optimizer = make([p], **OPTIONS, **options)
    optimizer.state[p] = {name: x.to(device, copy=True) for name, x in state.items()}
    if make is torch.optim.AdamW:
        optimizer.state[p]["step"] = state["step"].clone()
    optimizer.step()
    assert optimizer.state[p]["step"] == state["step"] + 1
    return {"param": p.detach(), **optimizer.state[p]}


def check_range(target, dtype, scale, step):
    """A step after ``step`` others, with gradients of such a size."""
    generator = torch.Generator().manual_seed(step)
    param, grad, exp_avg = (torch.randn(NUMEL, generator=generator) for _ in range(3))
    exp_avg_sq = torch.rand(NUMEL, generator=generator, dtype=torch.float64)
    started = 1.0 if step else 0.0
    param, grad, exp_avg = param.to(dtype), (scale * grad).to(dtype), (started * 0.3 * scale * exp_avg).to(dtype)
    state = {"step": torch.tensor(float(step)), "exp_avg": exp_avg, "exp_avg_sq": started * scale**2 * exp_avg_sq}
    state["exp_avg_sq"] = state["exp_avg_sq"].to(dtype)
    eps = 1e-4 if dtype == torch.float16 else 1e-8
    arrays = [exact(x) for x in (param, grad, *(state[name] for name in MOMENTS))]
    true = adamw_step(*arrays, None, step + 1, eps=eps, **OPTIONS)
    ours = one_step(trainops.AdamW, param, grad, state, target.device, eps=eps, backend=target.backend)
    torchs = one_step(torch.optim.AdamW, param, grad, state, target.device, eps=eps, foreach=False)
    for name, result in true.items():
        assert_contract(ours[name], result, torchs[name], name)


@over_kernels
@over_cases
@pytest.mark.parametrize("step", STEPS)
def test_error_at_any_step_count_and_scale(target, dtype, scale, step):
    check_range(target, dtype, scale, step)


# Rows of one step: each thread of a block of 256 advances four step counts at a time.
ROWS = {"cuda": 1030, "cpu": 300, "triton": 40, "reference": 40}


def check_rows(target):
    """A step of two groups, whose parameters have taken different numbers of steps before."""
    count = ROWS[target.backend]
    model = make_model([(3,)] * count, torch.float32, target.device)
    set_grads(model.params, make_grads([(3,)] * count, torch.float32, target.device, 1)[0])
    params = list(model.params)
    groups = [{"params": params[:36]}, {"params": params[36:], "lr": 0.2, "betas": (0.5, 0.7), "maximize": True}]
    optimizer = trainops.AdamW(groups, lr=0.05, max_grad_norm=1.0, backend=target.backend)
    steps = [float(i % 8 + 8 * (i // 24)) for i in range(count)]  # that of 8 rows on is the same, or not
    for p, step in zip(params, steps, strict=True):
        moments = {"exp_avg": torch.randn_like(p.detach()), "exp_avg_sq": torch.rand_like(p.detach())}
        optimizer.state[p] = {"step": torch.tensor(step, device=target.device), **moments}
    check_one_step(optimizer)
    assert [optimizer.state[p]["step"].item() for p in params] == [step + 1 for step in steps]


@over_kernels
def test_every_row_has_a_step_count_and_settings_of_its_own(target):
    check_rows(target)


@over_kernels
def test_nan_and_infinity_pass_through_as_in_torch(target, dtype):
    grad = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0]).to(target.device, dtype)
    results = []
    for make, chosen in ((trainops.AdamW, {"backend": target.backend}), (torch.optim.AdamW, {"foreach": False})):
        param = torch.nn.Parameter(torch.ones(6, dtype=dtype, device=target.device))
        param.grad = grad.clone()
        optimizer = make([param], lr=0.1, eps=1e-3, amsgrad=True, **chosen)
        for _ in range(2):
            optimizer.step()
        state = optimizer.state[param]
        results.append((param.detach(), *(state[name] for name in (*MOMENTS, "max_exp_avg_sq"))))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, equal_nan=True)


# Controls: what the first check must notice.


def counts(groups):
    return [x for group in groups for x in group.columns["step"]]


def counting_twice():
    """A fault: the bias corrections are those of the next step."""

    def update(rule, groups, *args, right=kernels.update):
        for x in counts(groups):
            x.add_(1)
        result = right(rule, groups, *args)
        for x in counts(groups):
            x.sub_(1)
        return result

    return mock.patch.object(kernels, "update", update)


def has_no_say(control, dtype, scale):
    """Squares that underflow are nothing, kept or not."""
    return control == "exp_avg_sq_kept" and scale == 1e-25 and dtype != torch.float64


@pytest.mark.parametrize("step", STEPS)
@over_cases
def test_a_wrong_step_is_noticed(dtype, scale, step):
    for name, control in STEP_CONTROLS.items():
        if not has_no_say(name, dtype, scale):
            must_fail(control, check_range, REFERENCE, dtype, scale, step)


# Where the gradient is much less than eps, or the corrections are 1, the count of steps does not matter.
@pytest.mark.parametrize("step", STEPS[:3])
@pytest.mark.parametrize(("dtype", "scale"), [case for case in CASES if case[1] >= 1e-6], ids=str)
def test_a_wrong_count_of_steps_is_noticed(dtype, scale, step):
    must_fail(counting_twice, check_range, REFERENCE, dtype, scale, step)


def of_the_first_row():
    """A fault: every parameter of a group is said to have taken as many steps as the first."""

    def update(rule, groups, *args, right=kernels.update):
        firsts = [[group.columns["step"][0].clone() for _ in range(group.rows)] for group in groups]
        pairs = zip(groups, firsts, strict=True)
        wrong = [replace(group, columns=group.columns | {"step": steps}) for group, steps in pairs]
        result = right(rule, wrong, *args)
        for x in counts(groups):
            x.add_(1)  # the counts are right: what is made of them is to be noticed
        return result

    return mock.patch.object(kernels, "update", update)


def of_the_first_group():
    """A fault: all groups have the learning rate of the first."""

    def change(groups):
        lr = groups[0].settings["lr"]
        return [replace(group, settings={**group.settings, "lr": lr}) for group in groups]

    return of_steps(change)


WRONG_ROWS = STEP_CONTROLS | {"step_of_the_first_row": of_the_first_row, "lr_of_the_first_group": of_the_first_group}


@pytest.mark.parametrize("control", WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_a_wrong_row_is_noticed(control):
    check_rows(REFERENCE)
    must_fail(control, check_rows, REFERENCE)
