"""Steps of AdamW on parameters, moments and averages of different types: every pair of them, aligned and not."""

from unittest import mock

import pytest
import torch
from contract import DTYPES, assert_contract, exact
from controls import AVERAGE_CONTROLS, STEP_CONTROLS, kernels, leaving, must_fail, of_steps, with_columns
from exact import adamw_step, ema
from surroundings import MARGIN, Surrounded
from targets import REFERENCE, thorough
from training import MOMENTS, Model

import trainops

FLOAT64, NARROW = torch.float64, (torch.bfloat16, torch.float16)
SHAPES = ((33, 31), (127,), ())
DECAY, OPTIONS = 0.9, {"lr": 0.05, "betas": (0.7, 0.8), "eps": 1e-3, "weight_decay": 0.3}
STEPS = 100_000  # before this one: the corrections of the moments' bias are 1, to the last bit

# Types of parameter, moments (exp_avg, exp_avg_sq, max_exp_avg_sq) and average. In the first 16, and again in the
# others, each pair of types occurs in each pair of columns once. (They are an orthogonal array, over the field of
# four elements, in which a sum is `^`.)
DOUBLE, TRIPLE = (0, 2, 3, 1), (0, 3, 1, 2)
TYPES = [
    tuple(DTYPES[i] for i in (a, b, a ^ b ^ c, a ^ DOUBLE[b] ^ DOUBLE[c], a ^ TRIPLE[b] ^ TRIPLE[c]))
    for c in range(4)
    for a in range(4)
    for b in range(4)
]


def is_no_sample(types, **_):
    return types not in TYPES[:16]


over_types = pytest.mark.parametrize("types", TYPES, ids=lambda types: "-".join(str(x)[6:] for x in types))


def assert_stored(ours, true, arithmetic, what):
    """Hold to the contract what is stored of arithmetic that may be less wide."""
    if ours.dtype == FLOAT64 and arithmetic != FLOAT64:
        assert torch.equal(ours.float().double(), ours), what
        ours = ours.float()
    assert_contract(ours, true, what=what)


def check_types(target, types, is_aligned, **options):
    """One step of a parameter of each shape, whose tensors lie at different offsets where they are not aligned.

    There is no AMSGrad, or no average, where its type is None.
    """
    param_type, *state_types, average_type = types
    formula = OPTIONS | {"amsgrad": state_types[2] is not None}
    names = MOMENTS if formula["amsgrad"] else MOMENTS[:2]
    torch.manual_seed(0)
    every = []

    def draw(shape, dtype, role):
        x = torch.randn(shape).to(target.device, dtype)
        every.append(Surrounded(x if role < 4 else x.abs(), MARGIN if is_aligned else 1 + role))
        return every[-1].tensor

    model = Model([draw(shape, param_type, 0) for shape in SHAPES])
    average, shadows = None, [None] * len(SHAPES)
    if average_type is not None:
        average = trainops.EMA(model, DECAY, dtype=average_type, update_after_step=-2, backend=target.backend)
        shadows = average.module.params
    optimizer = trainops.AdamW(model.parameters(), **formula, **options, ema=average, backend=target.backend)
    true = []
    for p, shadow in zip(model.params, shadows, strict=True):
        p.grad = draw(p.shape, param_type, 1)
        if shadow is not None:
            shadow.data = draw(p.shape, average_type, 2)
        moments = {name: draw(p.shape, state_types[i], 3 + i) for i, name in enumerate(names)}
        optimizer.state[p] = {"step": torch.tensor(float(STEPS), device=target.device), **moments}
        arrays = [exact(p), exact(p.grad), *(exact(moments[name]) if name in names else None for name in MOMENTS)]
        true.append((adamw_step(*arrays, STEPS + 1, **formula), None if shadow is None else exact(shadow)))
    optimizer.step()
    assert all(x.is_whole() for x in every)
    for i, (p, shadow) in enumerate(zip(model.params, shadows, strict=True)):
        ours, (results, before) = {"param": p.detach(), **optimizer.state[p]}, true[i]
        for name in ("param", *names):
            assert_stored(ours[name], results[name], param_type, f"{name} {i}")
        if shadow is not None:
            wide = FLOAT64 if FLOAT64 in (param_type, average_type) else torch.float32
            assert_stored(shadow.detach(), ema(before, exact(p), DECAY), wide, f"average {i}")
        assert ours["step"] == STEPS + 1
        stored = [x.dtype for x in (p, *(ours[name] for name in names), shadow) if x is not None]
        assert stored == [dtype for dtype in types if dtype is not None]


@thorough(is_no_sample)
@over_types
@pytest.mark.parametrize("is_aligned", [True, False], ids=["aligned", "unaligned"])
def test_a_step_of_any_types_is_exact(target, types, is_aligned):
    check_types(target, types, is_aligned)


# Controls: what the check must notice.


def reinterpreted(column):
    """A fault: 16-bit numbers of a column are taken for those of the other 16-bit type."""

    def other(x):
        return x.view(NARROW[1 - NARROW.index(x.dtype)])

    return of_steps(lambda groups: with_columns(groups, other, column))


def exchanged():
    """A fault: each of the moments is written where the other belongs."""

    def update(rule, groups, *args, right=kernels.update):
        result = right(rule, groups, *args)
        for group in groups:
            for x, y in zip(group.columns["exp_avg"], group.columns["exp_avg_sq"], strict=True):
                x[...], y[...] = y.clone(), x.clone()
        return result

    return mock.patch.object(kernels, "update", update)


def in_float32():
    """A fault: the arithmetic on float64 is in float32."""

    def update(rule, groups, *args, right=kernels.update):
        names = ("param", "grad", *MOMENTS)
        narrow = with_columns(groups, torch.Tensor.float, *names)
        result = right(rule, narrow, *args)
        for group, own in zip(groups, narrow, strict=True):
            for name in names:
                for x, y in zip(group.columns[name], own.columns[name], strict=True):
                    x.copy_(y)
        return result

    return mock.patch.object(kernels, "update", update)


WRONG = STEP_CONTROLS | AVERAGE_CONTROLS
WRONG |= {"max_exp_avg_sq_kept": lambda: leaving(slice(None), "max_exp_avg_sq"), "moments_exchanged": exchanged}


@thorough(is_no_sample)
@over_types
def test_a_wrong_step_is_noticed(types):
    for control in WRONG.values():
        must_fail(control, check_types, REFERENCE, types, is_aligned=True)


@pytest.mark.parametrize("column", ["param", "grad", *MOMENTS, "average"])
@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_a_wrong_16_bit_type_is_noticed(narrow, column):
    must_fail(lambda: reinterpreted(column), check_types, REFERENCE, (narrow,) * 5, is_aligned=True)


def test_arithmetic_that_is_not_wide_enough_is_noticed():
    must_fail(in_float32, check_types, REFERENCE, (FLOAT64,) * 5, is_aligned=True)
