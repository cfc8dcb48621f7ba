"""Stochastic gradient descent with momentum, optionally Nesterov's, in the form that PyTorch gives it.

    g <- coefficient * g + weight_decay * p
    b <- g                                      in the first step
    b <- momentum * b + (1 - dampening) * g     later
    p <- p - lr * b                             or, with nesterov, lr * (g + momentum * b); without momentum, lr * g

Agrees with: torch.optim.SGD (torch/optim/sgd.py, _single_tensor_sgd), and csrc/math/sgd.h.
"""

import triton
import triton.language as tl

from trainops import core

from ._common import penalized
from .control import setting

LR, MOMENTUM, DAMPENING, WEIGHT_DECAY, NESTEROV, MAXIMIZE = (
    tl.constexpr(core.setting("sgd", name))
    for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
)
SCALARS = 6  # that `store_scalars` stores


@triton.jit
def store_scalars(out, group, step):
    """Stores the scalars of the formula for a row at its step count, in float64."""
    momentum = setting(group, MOMENTUM)
    tl.store(out + 0, setting(group, WEIGHT_DECAY))
    tl.store(out + 1, tl.where(step == 1.0, 0.0, momentum))
    tl.store(out + 2, tl.where(step == 1.0, 1.0, 1.0 - setting(group, DAMPENING)))
    tl.store(out + 3, tl.where(setting(group, NESTEROV) != 0.0, momentum, 0.0))
    tl.store(out + 4, setting(group, LR))
    tl.store(out + 5, setting(group, MAXIMIZE))


@triton.jit
def load_scalars(scalars, coefficient, WIDE: tl.constexpr):
    """The scalars in the type of arithmetic, as :func:`new_state` names them. ``coefficient``: of the gradients."""
    coefficient = tl.where(tl.load(scalars + 5) != 0.0, -coefficient, coefficient).to(WIDE)
    penalty, keep, take = tl.load(scalars).to(WIDE), tl.load(scalars + 1).to(WIDE), tl.load(scalars + 2).to(WIDE)
    return coefficient, penalty, keep, take, tl.load(scalars + 3).to(WIDE), tl.load(scalars + 4).to(WIDE)


@triton.jit
def new_state(param, grad, momentum_buffer, direction, _, scalars):
    """The momentum after a step, if there is one, and the direction for :func:`new_param`, which is no column."""
    coefficient, penalty, keep, take, look_ahead, _ = scalars
    grad = penalized(coefficient * grad, penalty, param)
    direction = grad
    if momentum_buffer is not None:
        momentum_buffer = keep * momentum_buffer + take * grad
        direction = tl.where(look_ahead != 0.0, grad + look_ahead * momentum_buffer, momentum_buffer)
    return momentum_buffer, direction, None


@triton.jit
def new_param(param, momentum_buffer, direction, _, scalars):
    """The parameter after a step, from the direction that :func:`new_state` has found."""
    _, _, _, _, _, lr = scalars
    return param - lr * direction
