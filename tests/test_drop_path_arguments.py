"""What DropPath does not take, and says so before anything is drawn."""

import math

import numpy as np
import pytest
import torch
from drop_path_formulas import OPERANDS

import trainops


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("drop_prob", [-0.1, 1.0001, math.nan, math.inf], ids=str)
def test_drop_prob_out_of_range(drop_prob, training):
    x = torch.randn(3, 2)
    for call in (
        lambda: trainops.drop_path(x, drop_prob, training),
        lambda: trainops.drop_path_add(x, x, drop_prob, training),
        lambda: trainops.DropPath(drop_prob),
        lambda: trainops.DropPathAdd(drop_prob),
    ):
        with pytest.raises(ValueError, match=f"drop_prob.*{drop_prob}"):
            call()


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
        trainops.drop_path(np.ones(10_000))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_only_floating_point_samples_are_dropped(dtype, scale_by_keep):
    x, state = torch.ones(4, 3).to(dtype), torch.get_rng_state()
    for call in (trainops.drop_path, lambda x, *options: trainops.drop_path_add(x, x, *options)):
        with pytest.raises(TypeError, match=f"floating-point tensors.*got {dtype}"):
            call(x, 0.5, True, scale_by_keep)
        assert call(x, 0.5, False, scale_by_keep).dtype == dtype
    assert torch.equal(torch.get_rng_state(), state)


def test_a_scalar_has_no_samples():
    with pytest.raises(ValueError, match="at least one dimension"):
        trainops.drop_path(torch.tensor(1.0), 0.5, True)


@pytest.mark.parametrize("elsewhere", OPERANDS)
def test_operands_on_different_devices(elsewhere):
    devices = {name: "meta" if name == elsewhere else "cpu" for name in OPERANDS}
    inputs = {name: torch.ones(3, device=device) for name, device in devices.items()}
    with pytest.raises(ValueError, match=r"branch is on.*but"):
        trainops.drop_path_add(**inputs, drop_prob=0.5, training=True)
