"""AdamW (arXiv:1711.05101, algorithm 2; AMSGrad: arXiv:1904.09237).

    g <- coefficient * g
    p <- p * (1 - lr * weight_decay)
    m <- m + (1 - beta1) * (g - m)
    v <- beta2 * v + (1 - beta2) * g^2
    p <- p - step_size * m / (sqrt(v) + scaled_eps)
    with step_size = lr * sqrt(1 - beta2^t) / (1 - beta1^t) and scaled_eps = eps * sqrt(1 - beta2^t)

Agrees with: torch.optim.AdamW (torch/optim/adam.py, _single_tensor_adam), and csrc/math/adamw.h.
"""

import triton
import triton.language as tl

from trainops import core

from ._common import divide, square_root
from .control import setting

LR, BETA1, BETA2, EPS, WEIGHT_DECAY, MAXIMIZE = (
    tl.constexpr(core.setting("adamw", name)) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")
)
SCALARS = 8  # that `store_scalars` stores


@triton.jit
def bias_correction(beta, step):
    """``1 - beta ** step`` in float64, 1 for a beta of 0.

    ``1 - exp(x)`` loses digits where ``exp(x)`` is near 1. Kahan's ``(1 - e) * x / log(e)`` with ``e = exp(x)`` does
    not: the rounding of ``e`` is in both factors.
    """
    x = step * tl.log(tl.where(beta > 0.0, beta, 0.5))
    power = tl.exp(x)
    quotient = x / tl.where(power == 1.0, 1.0, tl.log(power))
    correction = tl.where(power == 1.0, -x, tl.where(power > 0.0, (1.0 - power) * quotient, 1.0))
    return tl.where(beta > 0.0, correction, 1.0)


@triton.jit
def store_scalars(out, group, step):
    """Stores the scalars of the formula for a row at its step count, in float64."""
    lr, beta1, beta2 = setting(group, LR), setting(group, BETA1), setting(group, BETA2)
    correction = tl.sqrt(bias_correction(beta2, step))
    tl.store(out + 0, 1.0 - lr * setting(group, WEIGHT_DECAY))
    tl.store(out + 1, 1.0 - beta1)
    tl.store(out + 2, beta1)
    tl.store(out + 3, beta2)
    tl.store(out + 4, 1.0 - beta2)
    tl.store(out + 5, lr / bias_correction(beta1, step) * correction)
    tl.store(out + 6, setting(group, EPS) * correction)
    tl.store(out + 7, setting(group, MAXIMIZE))


@triton.jit
def load_scalars(scalars, coefficient, WIDE: tl.constexpr):
    """The scalars in the type of arithmetic, as :func:`new_state` names them. ``coefficient``: of the gradients."""
    coefficient = tl.where(tl.load(scalars + 7) != 0.0, -coefficient, coefficient).to(WIDE)
    keep, weight1, beta1 = tl.load(scalars).to(WIDE), tl.load(scalars + 1).to(WIDE), tl.load(scalars + 2).to(WIDE)
    beta2, weight2 = tl.load(scalars + 3).to(WIDE), tl.load(scalars + 4).to(WIDE)
    step_size, scaled_eps = tl.load(scalars + 5).to(WIDE), tl.load(scalars + 6).to(WIDE)
    return coefficient, keep, weight1, beta1, beta2, weight2, step_size, scaled_eps


@triton.jit
def new_state(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, scalars):
    """The state after a step, in the order of the columns.

    The third value is the second moment for :func:`new_param`. It is a column only with AMSGrad.
    """
    coefficient, _, weight1, beta1, beta2, weight2, _, _ = scalars
    grad = coefficient * grad
    difference = grad - exp_avg
    exp_avg = tl.where(weight1 < 0.5, exp_avg + weight1 * difference, grad - beta1 * difference)
    exp_avg_sq = exp_avg_sq * beta2 + weight2 * grad * grad
    second_moment = exp_avg_sq
    if max_exp_avg_sq is not None:
        second_moment = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    return exp_avg, exp_avg_sq, second_moment


@triton.jit
def new_param(param, exp_avg, exp_avg_sq, second_moment, scalars):
    """The parameter after a step, from the new state.

    Separate from ``new_state``: storing the state before the division frees registers. The division's slow path
    branches.
    """
    _, keep, _, _, _, _, step_size, scaled_eps = scalars
    return param * keep - divide(step_size * exp_avg, square_root(second_moment) + scaled_eps)
