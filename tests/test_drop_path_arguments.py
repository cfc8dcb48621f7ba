"""What DropPath does not take, and says so before anything is drawn."""

import math

import numpy as np
import pytest
import torch
from drop_path_formulas import OPERANDS, seeded, timm_drop_path, timm_drop_path_add

import trainops

RATES_OUT_OF_RANGE = [-0.1, 1.0001, math.nan, math.inf]


@pytest.mark.parametrize("drop_prob", RATES_OUT_OF_RANGE, ids=str)
def test_drop_prob_out_of_range(drop_prob):
    x, state = torch.randn(3, 2), torch.get_rng_state()
    for call in (
        lambda: trainops.drop_path(x, drop_prob, True),
        lambda: trainops.drop_path_add(x, x, drop_prob, True),
        lambda: trainops.DropPath(drop_prob)(x),
        lambda: trainops.DropPathAdd(drop_prob)(x, x),
    ):
        with pytest.raises(ValueError, match=f"drop_prob.*{drop_prob}"):
            call()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("drop_prob", ["often", None])
def test_drop_prob_that_is_no_number(drop_prob):
    x = torch.randn(3, 2)
    for call in (trainops.DropPath(drop_prob), lambda x: trainops.DropPathAdd(drop_prob)(x, x)):
        with pytest.raises(TypeError, match=f"drop_prob must be a number in .*{drop_prob}"):
            call(x)


@pytest.mark.parametrize("drop_prob", [*RATES_OUT_OF_RANGE, None, "often"], ids=str)
def test_where_nothing_can_drop_any_rate_will_do_as_for_timm(drop_prob):
    x = torch.randn(3, 2)
    assert trainops.drop_path(x, drop_prob) is x
    assert trainops.DropPath(drop_prob).eval()(x) is x
    assert torch.equal(trainops.DropPathAdd(drop_prob).eval()(x, x), x + x)


@pytest.mark.parametrize("drop_prob", [0.3, 1.0])
@pytest.mark.parametrize("wrapped", [torch.tensor, lambda rate: torch.nn.Parameter(torch.tensor(rate))])
def test_a_rate_may_be_a_tensor_as_for_timm(drop_prob, wrapped):
    x = torch.randn(64, 3)
    rate = wrapped(drop_prob)
    for ours, timms in (
        (trainops.DropPath(rate), lambda x: timm_drop_path(x, rate, True)),
        (lambda x: trainops.DropPathAdd(rate)(x, x), lambda x: timm_drop_path_add(x, x, rate, True)),
    ):
        assert torch.equal(seeded(ours, x), seeded(timms, x))
        assert seeded(ours, x).requires_grad == rate.requires_grad
    with pytest.raises(RuntimeError, match="p"):
        trainops.DropPath(torch.tensor(1.5))(x)


def test_a_tensor_of_rate_0_draws_nothing_as_for_timm():
    x, state = torch.randn(64, 3), torch.get_rng_state()
    assert trainops.DropPath(torch.tensor(0.0))(x) is x
    assert torch.equal(trainops.DropPathAdd(torch.tensor(0.0))(x, x), x + x)
    assert torch.equal(torch.get_rng_state(), state)


def test_names_of_modules_with_odd_rates():
    assert repr(trainops.DropPath(None)) == "DropPath(drop_prob=None)"
    assert repr(trainops.DropPath(torch.tensor(0.25))) == "DropPath(drop_prob=0.25)"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("residual", "branch", "layer_scale", "message"),
    [
        ((), (), None, "at least one dimension"),
        ((4, 3), (), None, "at least one dimension"),
        ((4, 3), (4, 5), None, r"residual.*\(4, 3\).*\(4, 5\)"),
        ((2, 4, 5), (3, 5), None, r"residual.*\(2, 4, 5\).*\(3, 5\)"),
        ((4, 3), (4, 3), (4,), r"layer_scale.*\(4,\).*\(4, 3\)"),
        ((4, 3), (4, 3), (2, 4, 3), r"layer_scale.*\(2, 4, 3\).*\(4, 3\)"),
        ((4, 3), (4, 1), (3,), r"layer_scale.*\(3,\).*\(4, 1\)"),
        ((4, 3), (4, 3), (0,), r"layer_scale.*\(0,\).*\(4, 3\)"),
    ],
)
def test_shapes_that_do_not_fit(residual, branch, layer_scale, message, training):
    residual, branch = torch.randn(residual), torch.randn(branch)
    layer_scale = None if layer_scale is None else torch.randn(layer_scale)
    with pytest.raises(ValueError, match=message):
        trainops.drop_path_add(residual, branch, 0.5, training, layer_scale=layer_scale)


@pytest.mark.parametrize("operand", OPERANDS)
def test_operands_are_tensors(operand):
    inputs = {name: torch.ones(3) for name in OPERANDS} | {operand: np.ones(10_000)}
    with pytest.raises(TypeError, match=f"^{operand} must be a tensor, got ndarray$"):
        trainops.drop_path_add(**inputs)
    with pytest.raises(TypeError, match=r"^x must be a tensor, got ndarray$"):
        trainops.drop_path(np.ones(10_000), 0.5, True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_only_floating_point_branches_are_dropped(dtype, scale_by_keep):
    x, state = torch.ones(4, 3).to(dtype), torch.get_rng_state()
    with pytest.raises(TypeError, match=f"floating-point tensors.*got {dtype}"):
        trainops.drop_path_add(x, x, 0.5, True, scale_by_keep)
    assert trainops.drop_path_add(x, x, 0.5, False, scale_by_keep).dtype == dtype
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_what_pytorch_can_drop_of_other_types_is_dropped_as_by_timm(dtype, scale_by_keep):
    x = torch.ones(64, 3).to(dtype)
    try:
        expected = seeded(timm_drop_path, x, 0.5, True, scale_by_keep)
    except (RuntimeError, NotImplementedError) as error:
        with pytest.raises(type(error)):
            trainops.drop_path(x, 0.5, True, scale_by_keep)
    else:
        assert not scale_by_keep
        assert torch.equal(seeded(trainops.drop_path, x, 0.5, True, scale_by_keep), expected)


def test_a_scalar_has_no_samples():
    with pytest.raises(ValueError, match="at least one dimension"):
        trainops.drop_path(torch.tensor(1.0), 0.5, True)


@pytest.mark.parametrize("elsewhere", OPERANDS)
def test_operands_on_different_devices(elsewhere):
    devices = {name: "meta" if name == elsewhere else "cpu" for name in OPERANDS}
    inputs = {name: torch.ones(3, device=device) for name, device in devices.items()}
    with pytest.raises(ValueError, match=r"branch is on.*but"):
        trainops.drop_path_add(**inputs, drop_prob=0.5, training=True)
