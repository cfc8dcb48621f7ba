"""Adam (arXiv:1412.6980, algorithm 1), whose weight decay is an L2 penalty (AMSGrad: arXiv:1904.09237).

    g <- coefficient * g + weight_decay * p

and then AdamW (``adamw.py``) without a decay of its own.

Agrees with: torch.optim.Adam (torch/optim/adam.py, _single_tensor_adam), and csrc/math/adam.h.
"""

import triton
import triton.language as tl

from . import adamw
from ._common import penalized
from .adamw import WEIGHT_DECAY
from .control import setting

PENALTY = tl.constexpr(adamw.SCALARS)
SCALARS = adamw.SCALARS + 1  # that `store_scalars` stores


@triton.jit
def store_scalars(out, group, step):
    """Stores the scalars of the formula for a row at its step count, in float64."""
    adamw.store_scalars(out, group, step)
    tl.store(out + 0, 1.0)  # what AdamW's decay leaves
    tl.store(out + PENALTY, setting(group, WEIGHT_DECAY))


@triton.jit
def load_scalars(scalars, coefficient, WIDE: tl.constexpr):
    """The scalars in the type of arithmetic: those of AdamW, of gradients that are scaled, then the others."""
    one = tl.full((), 1.0, WIDE)
    factor, keep, weight1, beta1, beta2, weight2, step_size, scaled_eps = adamw.load_scalars(
        scalars, coefficient, WIDE
    )
    adamws = (one, keep, weight1, beta1, beta2, weight2, step_size, scaled_eps)
    return adamws, factor, tl.load(scalars + PENALTY).to(WIDE)


@triton.jit
def new_state(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, scalars):
    """The state after a step, as that of AdamW."""
    adamws, coefficient, penalty = scalars
    grad = penalized(coefficient * grad, penalty, param)
    return adamw.new_state(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, adamws)


@triton.jit
def new_param(param, exp_avg, exp_avg_sq, second_moment, scalars):
    """The parameter after a step, from the new state, as that of AdamW."""
    adamws, _, _ = scalars
    return adamw.new_param(param, exp_avg, exp_avg_sq, second_moment, adamws)
