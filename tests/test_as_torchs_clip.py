"""What PyTorch's own tests ask of clipping: odd norms, limits and gradients give what torch.nn.utils gives.

``test_clip_grad.py`` has the numbers, ``test_clip_grad_drop_in.py`` what may be passed.
"""

import math
from functools import partial

import pytest
import torch
from as_torchs import check
from targets import over
from torch import nn
from torch.nn import utils as torch_utils
from training import with_grads

import trainops

DTYPES = [torch.float32, torch.float64]


def check_clip(case):
    check(case, trainops, torch_utils)


def clip(module, grads, *args, **kwargs):
    """What a clip returns, and the gradients that it leaves."""
    params = with_grads([grad.clone() for grad in grads])
    return [module.clip_grad_norm_(params, *args, **kwargs), [p.grad for p in params]]


GRADS = [torch.arange(1.0, 101.0).view(10, 10), torch.full((10,), 1e-3)]


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", [0, 0.5, 1, 1.5, 2, 3, 4.0, "2", "inf", math.inf, -1, -2.0, -math.inf])
def test_norms_of_every_order(norm_type, foreach):
    check_clip(partial(clip, grads=GRADS, max_norm=2, norm_type=norm_type, foreach=foreach))


LIMITS = [0, 1, -1.0, True, "1", torch.tensor(1.0), torch.tensor([1.0]), math.inf, math.nan, None, "often"]


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_limits_of_every_kind(limit):
    check_clip(partial(clip, grads=GRADS, max_norm=limit))


VALUES = [0, 2.5, -1.0, True, "2", torch.tensor(2.5), math.inf, math.nan, None, "often"]


@pytest.mark.parametrize("limit", VALUES, ids=str)
def test_values_of_every_kind(limit):
    def clip_values(module):
        params = with_grads([grad.clone() - 50.0 for grad in GRADS])
        return [module.clip_grad_value_(params, limit), [p.grad for p in params]]

    check_clip(clip_values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0.0])
def test_values_that_are_not_finite(value, norm_type, error, dtype):
    """An error leaves the gradients alone; without one, they are scaled by 0 or NaN."""

    def clip_one(module):
        grads = [torch.full((4,), 2.0, dtype=dtype) for _ in range(3)]
        grads[1][2] = value
        params = with_grads(grads)
        try:
            return [module.clip_grad_norm_(params, 1.0, norm_type, error), grads]
        except RuntimeError as raised:
            return [str(raised), grads]

    check_clip(clip_one)


CASES = {
    "one_tensor": lambda module: clip(module, [torch.full((3,), 4.0)], 1.0),
    "two_tensors": lambda module: module.get_total_norm([torch.ones(3) * 3, torch.ones(2)], 3.0),
    "complex": lambda module: clip(module, [torch.full((3,), 3 + 4j)], 1.0),
    "with_gaps": lambda module: clip(module, [torch.arange(48.0).view(8, 6)[::2]], 1.0),
    "meta": lambda module: clip(module, [torch.ones(3, device="meta")], 1.0)[0].shape,
    "integers": lambda module: type(raised(module.get_total_norm, [torch.ones(3, dtype=torch.int64)])),
    "expanded": lambda module: type(raised(clip, module, [torch.ones(6).expand(4, 6)], 1.0)),
    "no_tensors": lambda module: clip_these(module, [1.0, 2.0]),
    "a_dictionary": lambda module: clip_these(module, {"a": nn.Parameter(torch.ones(1))}),
    "a_module": lambda module: clip_these(module, nn.Linear(2, 2)),
}


def clip_these(module, parameters):
    return module.clip_grad_norm_(parameters, 1.0)


def raised(call, *args):
    try:
        return call(*args)
    except Exception as error:
        return error


@over("case", CASES)
def test_gradients_and_arguments_of_every_kind(case):
    check_clip(case)


def test_gradients_stay_the_same_tensors():
    def clip_one(module):
        (param,) = with_grads([torch.full((3,), 9.0)])
        grad, version = param.grad, param.grad._version
        total_norm = module.clip_grad_norm_([param, param], 1.0)  # clipped twice, as PyTorch does
        return [param.grad is grad, grad._version > version, total_norm, grad]

    check_clip(clip_one)
